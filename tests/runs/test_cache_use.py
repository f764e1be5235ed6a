"""The cache's contents: who uses what, and what may be removed."""

import json
import os
import time

import pytest

from nesso_tune import cache
from nesso_tune.files import acquire_lock
from nesso_tune.runs.cache_use import DAY_S, cached_results, record_use, remove_result, unneeded
from tests.support.runs import main_here


@pytest.fixture
def results(tmp_path, monkeypatch):
    """Prepared data of a finished run, of an unfinished one and of none, all 40 days old; and a new reference."""
    monkeypatch.setenv("NESSO_TUNE_CACHE", str(tmp_path / "cache"))

    def build(size):
        return lambda folder: (folder / "ids").write_bytes(bytes(size)) and {}

    for kind, key, size in (("documents", "of-finished", 3000), ("documents", "of-unfinished", 2000),
                            ("documents", "of-none", 1000), ("reference", "new", 10)):  # fmt: skip
        cache.get_or_build(kind, key, build(size), lambda path, note: path)
    for name in ("finished", "unfinished"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        record_use("documents", f"of-{name}", tmp_path / "runs" / name)
        record_use("documents", f"of-{name}", tmp_path / "runs" / name)
        record_use("documents", f"of-{name}", tmp_path / "runs" / "removed")
    (tmp_path / "runs" / "finished" / "final").mkdir()
    (tmp_path / "cache" / "documents" / "killed.partial").mkdir()
    old = time.time() - 40 * DAY_S
    for path in (tmp_path / "cache" / "documents").rglob("*"):
        os.utime(path, (old, old))
    return tmp_path


def test_each_result_has_its_size_its_age_and_its_runs(results):
    found = {result.folder.name: result for result in cached_results()}
    assert list(found) == ["of-finished", "of-unfinished", "of-none", "new"], "the largest first"
    assert found["of-finished"].runs == (results / "runs" / "finished",)
    assert found["of-finished"].unfinished_runs == [] != found["of-unfinished"].unfinished_runs
    assert found["of-none"].size == sum(file.stat().st_size for file in found["of-none"].folder.iterdir()) > 1000
    assert [round(result.days()) for result in found.values()] == [40, 40, 40, 0]


def test_only_what_is_old_and_not_needed_is_removed(results):
    def names(days):
        return {result.folder.name for result in unneeded(cached_results(), days)}

    assert names(30) == {"of-finished", "of-none"}
    assert names(50) == set()
    assert names(0) == {"of-finished", "of-none", "new"}
    record_use("documents", "of-none", results / "runs" / "finished")
    assert names(30) == {"of-finished"}, "it was used now"


def test_a_result_in_use_stays(results):
    (result,) = [result for result in cached_results() if result.folder.name == "of-none"]
    with acquire_lock(results / "cache" / "documents" / "of-none.lock", ""):
        assert not remove_result(result)
    assert result.folder.is_dir()
    assert remove_result(result)
    assert not result.folder.exists()
    assert cache.find("documents", "of-none") is None


def test_the_command_removes_only_with_yes(results, capsys):
    code, out, _ = main_here(capsys, "cache", "list")
    assert code == 0
    assert "of-finished" in out
    assert str(results / "runs" / "finished") in out
    assert out.endswith(f" in 4 results of {results / 'cache'}\n")
    code, out, _ = main_here(capsys, "cache", "prune")
    assert (code, out.splitlines()[-1]) == (0, "nothing is removed yet: add --yes")
    assert len(cached_results()) == 4
    code, out, _ = main_here(capsys, "cache", "prune", "--yes", "--json")
    assert {row["key"] for row in json.loads(out)} == {"of-finished", "of-none"}
    assert {result.folder.name for result in cached_results()} == {"of-unfinished", "new"}
    assert not [*(results / "cache" / "documents").glob("of-finished*[!k]")], "its notes are gone too"
    assert main_here(capsys, "cache", "clear")[0] == main_here(capsys, "cache", "list", "--yes")[0] == 2
