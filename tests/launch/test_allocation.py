"""Comparison of machines by doctor: the bad one is named, by all that was measured."""

import re
from itertools import combinations

from hypothesis import given
from hypothesis import strategies as st

from nesso_tune.errors import Problem
from nesso_tune.launch.allocation import Allocation, Link, find_differences, pair_rounds, slow_links
from nesso_tune.launch.doctor import Disk, MachineReport


def report(host, torch="2.13.0", gpus=("A100",), rate=900e6, problems=()):
    disks = tuple(Disk(label, 10**12, rate, 0.002, True) for label in ("runs", "data cache"))
    return MachineReport(host, {"torch": torch}, gpus, (), problems, disks)


def link(one, other, speed):
    return Link((one, ord(one) - ord("a")), (other, ord(other) - ord("a")), speed)


def links(speed_of, hosts="abcd"):
    return [link(one, other, speed_of(one + other)) for one, other in combinations(hosts, 2)]


def allocation(machines, **found):
    """What four machines with a process each found, all well unless `found` says otherwise."""
    well = {"reduce_s": 0.01, "inside": {}, "links": links(lambda pair: 20.0), "unshared": [], "local_locks": False,
            "clocks": {machine.host: 0.0 for machine in machines}}  # fmt: skip
    return Allocation(machines, **{**well, **found})


@given(st.integers(2, 20))
def test_every_pair_is_measured_once_and_no_rank_twice_in_a_round(count):
    rounds = pair_rounds(range(count))
    assert sorted(pair for pairs in rounds for pair in pairs) == list(combinations(range(count), 2))
    assert all(len({rank for pair in pairs for rank in pair}) == 2 * len(pairs) for pairs in rounds)
    assert len(rounds) == count - 1 + count % 2


def test_the_machine_that_differs_is_named_once():
    machines = [report("a"), report("a"), report("b", torch="2.12.0"), report("b", torch="2.12.0"), report("c"),
                report("c", gpus=("H100",))]  # fmt: skip
    assert find_differences(machines) == [
        Problem("b", "torch is 2.12.0, on the others 2.13.0", "use the same on all machines"),
        Problem("c", "GPUs is H100, on the others A100", "use the same on all machines"),
    ]
    assert find_differences([report("a"), report("b")]) == []


def test_the_machine_with_slow_links_is_named_and_else_the_link():
    slow = slow_links(links(lambda pair: 3.0 if "c" in pair else 20.0))
    assert [(problem.where, problem.what) for problem in slow] == [
        ("c", "its links have at most 3.0 GB/s (usual: 20.0)")
    ]
    slow = slow_links(links(lambda pair: 3.0 if "c" in pair else 20.0, "abc"))
    assert [problem.where for problem in slow] == ["c"]
    on_one = [Link(("a", 0), ("a", rank), speed) for rank, speed in ((1, 20.0), (2, 21.0), (3, 3.0))]
    assert [problem.where for problem in slow_links(on_one)] == ["a (process 0) to a (process 3)"]
    slow = slow_links(links(lambda pair: 3.0 if pair == "bd" else 20.0))
    assert [problem.where for problem in slow] == ["b (process 1) to d (process 3)"]
    assert slow_links([]) == slow_links(links(lambda pair: 20.0)) == slow_links([link("a", "b", 1.0)]) == []


def test_a_disk_of_its_own_is_no_measure_of_the_shared_one():
    both = allocation([report("a", rate=84e6), report("b", rate=699e6)], unshared=["b"])
    assert [problem.where for problem in both.problems()] == ["b"], "which does not see the folder; a is not slow"
    several = [report("a", rate=84e6), *(report(host, rate=899e6) for host in "bcd")]
    assert allocation(several[:2]).problems() == [], "of two, none is usual"
    assert [problem.where for problem in allocation(several).problems()] == ["a", "a"], (
        "the disks of runs and of caches"
    )
    assert [problem.where for problem in allocation(several, unshared=["c", "d"]).problems()] == ["c", "d"]


def test_the_table_names_the_bad_machine():
    machines = [report(host) for host in "abcd"]
    assert allocation(machines).problems() == []
    bad = allocation(
        [*machines[:2], report("c", rate=20e6, problems=(Problem("/runs", "has 1 GB left (runs)", "free some space"),)),
         machines[3]],
        links=links(lambda pair: 4.0 if "c" in pair else 20.0), clocks={"a": 0.0, "b": 0.01, "c": -7.0, "d": 0.0},
        inside={"a": 200.0, "b": 210.0, "c": 40.0, "d": 205.0}, unshared=["c"], local_locks=True,
    )  # fmt: skip
    problems = bad.problems()
    assert {problem.where.partition(":")[0] for problem in problems} == {"c"}
    said = "; ".join(problem.what for problem in problems)
    for words in ("has 1 GB left", "does not see the output folder", "clock differs by -7.0 s", "at most 4.0 GB/s",
                  "among its processes: 40.0 GB/s", "disk of runs: 20.0 MB/s", "disk of data cache"):  # fmt: skip
        assert words in said
    head, *rows = bad.table(problems)
    assert re.split("  +", head)[2:6] == ["inside GB/s", "links GB/s", "clock s", "output folder"]
    assert [row.split()[0] for row in rows] == ["a", "b", "c", "d"]
    assert [row.split()[-1] for row in rows] == ["none", "none", "7", "none"]
    assert rows[2].split()[1:5] == ["1", "40.0", "4.0", "-7.00"]
    assert ("file locks", "of each machine alone (no lock of another machine is seen)") in bad.facts()
    assert ("all-reduce", "64 MiB in 10 ms, 10.1 GB/s") in bad.facts()
