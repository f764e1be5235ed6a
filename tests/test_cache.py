"""The cache: keyed by content, complete or absent, built once."""

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from filelock import FileLock

from nesso_tune import DataError, cache, prepare_data
from nesso_tune.chat.tokenizer import chat_tokenizer
from nesso_tune.data.cache_key import is_prepared
from nesso_tune.errors import RunEnvironmentError
from tests.support.logs import logged
from tests.support.processes import Forked

ROOT = Path(__file__).parents[1]


@pytest.fixture
def recipe(sft, write_rows, chats):
    return sft(write_rows(chats))


def the_folder():
    (folder,) = (path for path in (cache.cache_root() / "documents").iterdir() if path.is_dir())
    return folder


def ids(data):
    return [row["input_ids"] for row in data.train]


def test_the_second_time_is_a_hit_with_the_same_rows(recipe):
    chat = chat_tokenizer(recipe.model, recipe.chat)
    assert not is_prepared(recipe, chat)
    first = prepare_data(recipe)
    assert is_prepared(recipe, chat)
    second = prepare_data(recipe)
    assert (first.summary.cache_hit, second.summary.cache_hit) == (False, True)
    assert replace(first.summary, cache_hit=True) == second.summary
    assert ids(first) == ids(second)


def test_one_changed_character_is_seen_though_size_and_time_are_the_same(recipe):
    file = Path(recipe.data.sources[0].path)
    before, times = prepare_data(recipe), file.stat()
    file.write_text(file.read_text().replace("Roma.", "Toma."))
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert file.stat().st_size == times.st_size
    after = prepare_data(recipe)
    assert not after.summary.cache_hit
    assert after.summary.fingerprint != before.summary.fingerprint
    assert ids(after) != ids(before)


def test_another_time_alone_changes_nothing(recipe):
    before = prepare_data(recipe)
    os.utime(recipe.data.sources[0].path, (1, 1))
    after = prepare_data(recipe)
    assert after.summary.cache_hit
    assert after.summary.fingerprint == before.summary.fingerprint


ENCODED_ANEW = {
    "length": {"sequence_len": 300},
    "roles": {"roles_to_train": ["user"]},
    "end tokens": {"train_on_eos": "all"},
    "system message": {"chat": {"default_system": "Sii breve."}},
}
ARRANGED_ANEW = {"packing": {"packing": False}, "seed": {"seed": 1}, "split": {"validation_size": 2}}


@pytest.mark.parametrize("change", ENCODED_ANEW.values(), ids=ENCODED_ANEW)
def test_what_decides_the_ids_is_encoded_anew(recipe, sft, change):
    before = prepare_data(recipe).report
    after = prepare_data(sft(recipe.data.sources[0].path, **change)).report
    assert not after["cache_hit"]
    assert after["fingerprint"] != before["fingerprint"]


@pytest.mark.parametrize("change", ARRANGED_ANEW.values(), ids=ARRANGED_ANEW)
def test_what_only_arranges_rows_uses_what_is_encoded(recipe, sft, change):
    before = prepare_data(recipe).report
    after = prepare_data(sft(recipe.data.sources[0].path, **change)).report
    assert after["cache_hit"]
    assert after["fingerprint"] != before["fingerprint"]


def test_a_changed_mapping_file_is_seen(sft, write_rows, tmp_path):
    mapping = tmp_path / "mine.yaml"
    mapping.write_text("kind: instruction\nprompt_field: [a]\nresponse_field: [b]\n")
    recipe = sft({"path": write_rows([{"a": "x", "b": "y", "c": "zz"}]), "format": str(mapping)})
    before = ids(prepare_data(recipe))
    mapping.write_text(mapping.read_text().replace("[b]", "[c]"))
    assert ids(prepare_data(recipe)) != before


def test_what_a_killed_run_left_is_not_trusted(recipe):
    whole = ids(prepare_data(recipe))
    folder = the_folder()
    folder.rename(folder.with_suffix(".partial"))  # killed before the last step
    assert prepare_data(recipe).summary.cache_hit is False
    (folder / cache.DONE_FILE).unlink()  # and a folder without its note
    (folder / "ids.bin").write_bytes(b"")
    again = prepare_data(recipe)
    assert again.summary.cache_hit is False
    assert ids(again) == whole
    assert [path.suffix for path in folder.parent.iterdir() if path.is_dir()] == [""]


FILES = ["ids.bin", "trained.bin", "entries.npz", "dropped.jsonl", cache.DONE_FILE]


def flip(file, at=0.5):
    content = bytearray(file.read_bytes())
    content[int(len(content) * at)] ^= 4
    file.write_bytes(content)


@pytest.fixture
def with_drops(sft, write_rows, chats):
    return sft(write_rows([*chats, {"messages": []}]))


@pytest.mark.parametrize("name", FILES)
def test_damaged_files_are_named_and_made_again(with_drops, name):
    whole = ids(prepare_data(with_drops))
    file = the_folder() / name
    for damage in (lambda: flip(file, 0.3), lambda: file.write_bytes(file.read_bytes()[:7]), file.unlink):
        damage()
        with logged() as messages:
            again = prepare_data(with_drops)
        assert again.summary.cache_hit is False
        assert ids(again) == whole
        (message,) = messages
        assert message.startswith(f"prepared data in {the_folder()} is damaged ({name}")
        with logged() as messages:
            assert prepare_data(with_drops).summary.cache_hit
        assert messages == []


def test_any_flipped_bit_of_the_note_is_seen(recipe):
    """What is there twice, in the text and in its hash, disagrees wherever one of them changes."""
    prepare_data(recipe)
    folder, content = the_folder(), (the_folder() / cache.DONE_FILE).read_bytes()
    assert cache.find("documents", folder.name)
    for at in range(0, len(content), 41):
        (folder / cache.DONE_FILE).write_bytes(content[:at] + bytes([content[at] ^ (1 << at % 7)]) + content[at + 1 :])
        assert cache.find("documents", folder.name) is None, content[at - 20 : at + 20]


def test_files_are_hashed_once_a_process_and_not_again_for_what_another_one_hashed(recipe, monkeypatch):
    def run(trusted=None):
        hashed = []
        monkeypatch.setattr(cache, "_verified", dict(trusted or {}))
        monkeypatch.setattr(cache, "sha256", lambda file: hashed.append(file.name) or digest(file))
        prepare_data(recipe)
        prepare_data(recipe)
        return sorted(hashed)

    digest = cache.sha256
    prepare_data(recipe)
    seen, names = cache.verified_files(), sorted(name for name in FILES if name != cache.DONE_FILE)
    assert run() == names
    assert run(seen) == []


def test_a_failed_build_leaves_nothing():
    def fails(folder):
        (folder / "half").write_text("x")
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        cache.get_or_build("kind", "key", fails, lambda folder, note: folder)
    assert cache.find("kind", "key") is None
    assert not [path for path in (cache.cache_root() / "kind").iterdir() if path.is_dir()]


BUILD_SLOWLY = """
import sys, time
from pathlib import Path
from nesso_tune import cache
log = Path(sys.argv[1])
def build(folder):
    log.open("a").write("built\\n")
    time.sleep(0.5)
    (folder / "x").write_text("content")
    return {"a": 1}
opened, note, hit = cache.get_or_build("kind", "key", build, lambda folder, note: (folder / "x").read_text())
print(opened, note, hit)
"""


def test_two_processes_at_once_build_once(tmp_path):
    command = [sys.executable, "-c", BUILD_SLOWLY, str(tmp_path / "log")]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) for _ in range(2)]
    said = sorted(process.communicate(timeout=60)[0].strip() for process in running)
    assert said == ["content {'a': 1} False", "content {'a': 1} True"]
    assert (tmp_path / "log").read_text() == "built\n"


def test_two_machines_without_common_locks_never_remove_what_the_other_builds(tmp_path):
    """Each machine builds, since it does not see the other's lock; the first rename wins, and all read that result."""
    running = [Forked(module="tests.support.two_machines", LOG=str(tmp_path / "log"), MACHINE=name) for name in "aabb"]
    assert [process.wait(60) for process in running] == [0] * 4, [process.stderr for process in running]
    said = [process.stdout.strip() for process in running]
    assert sorted(said) == ["('x', {}, False)", *["('x', {}, True)"] * 3]
    assert (tmp_path / "log").read_text().count("built") == 2, "one on each machine"
    assert {path.name for path in (cache.cache_root() / "kind").iterdir() if path.is_dir()} == {"key"}


def test_abandoned_builds_are_removed_and_those_of_other_machines_a_day_later(recipe):
    prepare_data(recipe)
    root, key = the_folder().parent, the_folder().name
    dead, other, old = (root / f"{key}.{machine}-1-a.partial" for machine in (cache._machine(), "elsewhere", "gone"))
    for staging in (dead, other, old):
        staging.mkdir()
        (staging / "ids.bin").touch()
    for path in (old / "ids.bin", old):
        os.utime(path, (1, 1))
    shutil.rmtree(root / key)
    assert not prepare_data(recipe).summary.cache_hit
    assert not dead.exists()
    assert not old.exists()
    assert other.exists()


def test_a_process_that_waits_says_so_and_stops_at_the_timeout(monkeypatch):
    monkeypatch.setattr(cache, "WAIT_MESSAGES_S", (0.1, 0.2))
    root = cache.cache_root() / "kind"
    root.mkdir(parents=True)
    with FileLock(root / "key.lock"), logged() as messages, pytest.raises(RunEnvironmentError) as stopped:
        cache.get_or_build("kind", "key", lambda folder: {}, lambda folder, note: note, "prepared data", 0.5)
    assert "prepared data: another process on " in str(stopped.value)
    assert "was not done within 0.5 s; run `nesso-tune prepare` first" in str(stopped.value)
    assert len(messages) == 2
    assert "prepared data: waiting for another process on " in messages[0]
    assert messages[0].endswith("0 s so far (at most 0.5 s)")


def test_a_build_killed_half_way_is_done_again(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", BUILD_SLOWLY, str(tmp_path / "log")], cwd=ROOT)
    while not (tmp_path / "log").exists():
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert cache.find("kind", "key") is None
    made = cache.get_or_build("kind", "key", lambda folder: {"b": 2}, lambda folder, note: list(folder.glob("x")))
    assert made == ([], {"b": 2}, False)


def test_the_note_is_plain_json(recipe):
    prepare_data(recipe)
    note = json.loads((the_folder() / cache.DONE_FILE).read_text())
    assert note["note"]["documents"]["languages"] == ["it", "en"]


def test_a_file_that_changes_while_it_is_read_is_not_kept(sft, write_rows, chats, tmp_path):
    path = write_rows(chats)
    (tmp_path / "writes.py").write_text(
        f"def along(row):\n    with open({path!r}, 'a') as file:\n        file.write('\\n')\n    return row\n"
    )
    recipe = sft({"path": path, "format": f"{tmp_path}/writes.py:along"})
    with pytest.raises(DataError, match="changed while it was read; run again"):
        prepare_data(recipe)
    assert not list(cache.cache_root().rglob(cache.DONE_FILE))
