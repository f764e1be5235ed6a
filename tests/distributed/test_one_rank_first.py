"""Two simulated machines of four processes on a file system whose locks exclude only processes of one machine."""

import time
from collections import Counter

from nesso_tune import cache
from tests.support.processes import Ranks
from tests.support.runs import recipe, write_recipe


class Machines:
    """Eight ranks on two machines prepare the data of a recipe."""

    def __init__(self, tmp_path, talks, build="slow", seconds=2, timeout_s=60):
        some = recipe("sft", tmp_path / "run", [talks], distributed={"timeout_s": timeout_s})
        self.log = tmp_path / "log"
        own = [{"LOCAL_RANK": rank % 4, "LOCAL_WORLD_SIZE": 4, "MACHINE": f"machine{rank // 4}"} for rank in range(8)]
        self.began = time.monotonic()
        ranks = Ranks(
            write_recipe(tmp_path / "r.yaml", some), module="tests.support.two_machines", processes=8, own=own,
            LOG=str(self.log), BUILD=build, SECONDS=str(seconds),
        )  # fmt: skip
        self.ranks = ranks.ranks
        self.codes = [rank.wait(60) for rank in self.ranks]
        self.seconds = time.monotonic() - self.began

    def count(self, what):
        """{rank: number} of the lines about it in the log."""
        return Counter(int(line.split()[0]) for line in self.log.read_text().splitlines() if what in line)


def test_one_rank_of_all_prepares_and_one_of_each_machine_reads(tmp_path, talks):
    eight = Machines(tmp_path, talks)
    assert eight.codes == [0] * 8, [rank.stderr for rank in eight.ranks]
    assert eight.count("built") == {0: 1}
    assert set(eight.count("hashed")) == {0, 4}, "the others trust the first of their machine"
    assert len({rank.stdout for rank in eight.ranks}) == 1
    said = "data and base model: waiting for rank 0 on machine0, "
    for rank in (1, 4):
        assert f"rank {rank} on machine{rank // 4}: {said}" in eight.ranks[rank].stderr
        assert "s so far (at most 60 s)" in eight.ranks[rank].stderr
    assert not [rank.stderr for rank in eight.ranks[2:4] + eight.ranks[6:] if rank.stderr], "one of a machine is enough"
    assert not [path for path in (cache.cache_root() / "documents").iterdir() if path.suffix == ".partial"]


def test_a_wait_ends_at_the_timeout(tmp_path, talks):
    eight = Machines(tmp_path, talks, seconds=45, timeout_s=3)
    assert eight.codes == [5] * 8
    assert eight.seconds < 30, "rank 0 would still build"
    said = "".join(rank.stderr for rank in eight.ranks)
    assert said.count("data and base model: rank 0 on machine0 was not done within 3 s; run `nesso-tune prepare`") == 1


def test_an_error_of_the_first_rank_ends_all(tmp_path, talks):
    eight = Machines(tmp_path, talks, "wrong")
    assert eight.codes == [3] * 8, "with its exit code"
    assert eight.count("built") == {0: 1}, "no other rank tries again"
    said = "".join(rank.stderr for rank in eight.ranks)
    assert said.count("rows.jsonl: is wrong; correct it") == 1
    assert "cannot go on: rank 0 on machine0 failed (exit code 3)" in said
