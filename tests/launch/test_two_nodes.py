"""Two nodes, simulated by network namespaces with a virtual cable. Needs root and iproute2; skipped otherwise."""

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from nesso_tune.launch.command import Machines, Rendezvous, accelerate_arguments, train_arguments
from nesso_tune.run import train
from tests.support.runs import ROOT, recipe, steps, thorough, write_recipe
from tests.test_kill import environment_of, when_at, workers

NODES = (f"nessoa{os.getpid()}", f"nessob{os.getpid()}")  # unique among concurrent test runs
ADDRESSES = ("10.97.0.1", "10.97.0.2")


def ip(*words, check=True):
    return subprocess.run(["ip", *words], capture_output=True, text=True, check=check)


def remove_nodes():
    for node in NODES:
        ip("netns", "del", node, check=False)


@pytest.fixture
def nodes():
    """Two network namespaces, connected by a virtual cable."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("needs root and iproute2")
    remove_nodes()
    if ip("netns", "add", NODES[0], check=False).returncode:
        pytest.skip("network namespaces cannot be created")
    ip("netns", "add", NODES[1])
    ip("link", "add", "cablea", "netns", NODES[0], "type", "veth", "peer", "name", "cableb", "netns", NODES[1])
    for node, cable, address in zip(NODES, ("cablea", "cableb"), ADDRESSES, strict=True):
        ip("-n", node, "addr", "add", f"{address}/24", "dev", cable)
        ip("-n", node, "link", "set", cable, "up")
        ip("-n", node, "link", "set", "lo", "up")
    yield NODES
    remove_nodes()


def start(path, rank, timeout_s=60, own_disk=None, **options):
    """Starts a run on one node as the Slurm job does; `own_disk` is a folder that other nodes do not share."""
    return start_on_node(
        train_arguments([path]), rank, timeout_s, [*with_host_name(NODES[rank]), *_with_own_disk(own_disk)], **options
    )


def start_on_node(verb, rank, timeout_s=60, before=(), path=str(ROOT), network=None, module="nesso_tune", **streams):
    """Starts a command on one node; `network` is the interface of gloo, by default the cable."""
    meeting = Rendezvous(str(rank), ADDRESSES[0], "29611", timeout_s)
    words = [*accelerate_arguments(Machines(2, 1), meeting, module), *verb]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": "",
                   "GLOO_SOCKET_IFNAME": network or ("cablea", "cableb")[rank]}  # fmt: skip
    return subprocess.Popen(
        ["ip", "netns", "exec", NODES[rank], *before, sys.executable, *words],
        cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True, **streams,
    )  # fmt: skip


def with_host_name(node):
    """Command prefix that sets the host name."""
    return ["unshare", "-u", "sh", "-c", 'hostname "$0" && exec "$@"', node]


def _with_own_disk(folder):
    """Command prefix that mounts another file system at a folder."""
    if folder is None:
        return []
    return ["unshare", "-m", "sh", "-c", 'mount -t tmpfs none "$0" && exec "$@"', str(folder)]


def make_recipe(tmp_path, name, talks, steps=40, timeout_s=60, **sharing):
    batch = {"max_steps": steps, "micro_batch_size": 1, "global_batch_size": 2}
    sharing = {"fsdp": "none", "timeout_s": timeout_s, **sharing}
    return recipe(
        "sft",
        tmp_path / name,
        [talks],
        train=batch,
        distributed=sharing,
        checkpoint={"every_steps": 3},
        evaluation=None,
    )


def wait_for_end(processes, within):
    """Exit codes and stderr of all processes, which must end within the given seconds."""
    began = time.monotonic()
    said = [process.communicate(timeout=within)[1] for process in processes]
    assert time.monotonic() - began < within
    return [process.returncode for process in processes], said


@pytest.mark.parametrize(
    ("module", "sharing"),
    [pytest.param("tests.support.fsdp_on_cpu", {"fsdp": "full_shard", "state_dict": "sharded"}, id="sharded"),
     pytest.param("nesso_tune", {"fsdp": "none"}, id="DDP")],
)  # fmt: skip
@thorough
def test_two_nodes_give_the_losses_of_one_process(nodes, tmp_path, talks, module, sharing):
    train(one := make_recipe(tmp_path, "one", talks, steps=5, **sharing))
    path = write_recipe(tmp_path / "two.yaml", make_recipe(tmp_path, "two", talks, steps=5, **sharing))
    codes, said = wait_for_end([start(path, rank, module=module) for rank in range(2)], 120)
    assert codes == [0, 0], said
    assert steps(tmp_path / "two") == pytest.approx(steps(one.output_dir), abs=1e-5)


@thorough
def test_a_killed_process_on_the_other_node(nodes, tmp_path, talks):
    path = write_recipe(tmp_path / "r.yaml", make_recipe(tmp_path, "run", talks))
    processes = [start(path, 0), start(path, 1)]
    when_at(processes[0], tmp_path / "run", 5, None)
    (victim,) = [pid for pid in workers(processes[1].pid) if b"RANK=1" in environment_of(pid)]
    os.kill(victim, signal.SIGKILL)
    codes, said = wait_for_end(processes, 60)
    assert all(codes)
    assert f"rank 0 on {NODES[0]}: lost contact with rank 1 on {NODES[1]} (" in said[0]
    codes, said = wait_for_end([start(path, 0), start(path, 1)], 120)
    assert codes == [0, 0], said
    assert "resuming an unfinished run from checkpoint-" in said[0]


@thorough
@pytest.mark.parametrize(
    ("failure", "says"),
    [("memory", f"rank 1 on {NODES[1]}: out of memory: "), ("disk", "the disk is full: a checkpoint needs ")],
    ids=("memory", "disk"),
)
def test_a_node_without_memory_or_disk(nodes, tmp_path, talks, monkeypatch, failure, says):
    """Its own message is in its log, the other node names it, and both exit with the code of the error."""
    variables = {"FAILING_RANK": "1", "FAILURE": failure, "FAILING_STEP": "5", "RAISED_AT": str(tmp_path / "raised")}
    path = write_recipe(tmp_path / "r.yaml", make_recipe(tmp_path, "run", talks, steps=8))
    with monkeypatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        processes = [start(path, rank, module="tests.support.waiting_group") for rank in range(2)]
        codes, said = wait_for_end(processes, 600)
    assert codes == [5, 5]
    assert says in said[1]
    assert f"rank 0 on {NODES[0]}: cannot go on: rank 1 on {NODES[1]} failed (exit code 5)" in said[0]
    assert not any("Traceback" in text for text in said)
    codes, said = wait_for_end([start(path, 0), start(path, 1)], 600)
    assert codes == [0, 0], said
    assert "resuming an unfinished run from checkpoint-3" in said[0]


@thorough
def test_a_node_lost_while_it_waits_for_the_data(nodes, tmp_path, talks):
    """There is no process group yet."""
    log = tmp_path / "log"
    path = write_recipe(tmp_path / "r.yaml", make_recipe(tmp_path, "run", talks, timeout_s=600))
    own = ["env", f"LOG={log}", "BUILD=slow", "SECONDS=600"]
    processes = [
        start_on_node([path], rank, 60, [*with_host_name(node), *own, f"MACHINE={node}"],
                      module="tests.support.two_machines") for rank, node in enumerate(NODES)
    ]  # fmt: skip
    deadline = time.monotonic() + 600
    while not (log.exists() and "0 built" in log.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    (victim,) = [pid for pid in workers(processes[1].pid) if b"RANK=1" in environment_of(pid)]
    os.kill(victim, signal.SIGKILL)
    codes, said = wait_for_end(processes, 60)
    assert codes[0] == 5
    assert f"rank 0 on {NODES[0]}: lost contact with rank 1 on {NODES[1]} (" in said[0]


@thorough
def test_a_cut_cable_ends_both_nodes_within_the_timeout(nodes, tmp_path, talks):
    path = write_recipe(tmp_path / "r.yaml", make_recipe(tmp_path, "run", talks, steps=150, timeout_s=10))
    processes = [start(path, 0), start(path, 1)]
    when_at(processes[0], tmp_path / "run", 5, None)
    ip("-n", NODES[0], "link", "set", "cablea", "down")
    codes, said = wait_for_end(processes, 30)
    assert codes == [5, 5]
    assert f"rank 0 on {NODES[0]}: lost contact with rank 1 on {NODES[1]} (" in said[0]
    assert f"rank 1 on {NODES[1]}: lost contact with the launcher on {ADDRESSES[0]} (" in said[1]
    assert not any("Traceback" in text for text in said)
    ip("-n", NODES[0], "link", "set", "cablea", "up")
    codes, said = wait_for_end([start(path, 0), start(path, 1)], 120)
    assert codes == [0, 0], said
    assert "resuming an unfinished run from checkpoint-" in said[0]


HEARTBEAT_ALONE = """
import os, sys, time
import torch.distributed as dist
from nesso_tune.distributed.heartbeat import Heartbeat

rank, address = int(sys.argv[1]), sys.argv[2]
def lost(states):
    print("lost", *(state.rank for state in states), flush=True)
    os._exit(5)
store = dist.TCPStore(address, 29617, 2, rank == 0, wait_for_workers=True)
Heartbeat(rank, 2, lost).start(store, address, 29617)
print("joined", flush=True)
time.sleep(600)
"""


@thorough  # the probes take a minute
def test_the_heartbeat_finds_a_cut_cable_by_its_probes(nodes):
    """Nothing is sent, as while NCCL's kernels wait: the operating system finds the cable cut."""
    words = [sys.executable, "-c", HEARTBEAT_ALONE]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    ranks = [
        subprocess.Popen(["ip", "netns", "exec", NODES[rank], *words, str(rank), ADDRESSES[0]], env=environment,
                         stdout=subprocess.PIPE, text=True) for rank in range(2)
    ]  # fmt: skip
    assert [rank.stdout.readline() for rank in ranks] == ["joined\n"] * 2
    ip("-n", NODES[0], "link", "set", "cablea", "down")
    assert [rank.communicate(timeout=120)[0] for rank in ranks] == ["lost 1\n", "lost 0\n"]
    assert [rank.returncode for rank in ranks] == [5, 5]


@thorough
def test_ranks_that_join_but_use_the_wrong_network(nodes, tmp_path, talks):
    path = write_recipe(tmp_path / "r.yaml", make_recipe(tmp_path, "run", talks, timeout_s=5))
    codes, said = wait_for_end([start(path, rank, network="lo") for rank in range(2)], 240)
    assert codes == [5, 5], "the first of them ends the other, on which gloo retries five times as long"
    (reason,) = [text for text in said if "cannot connect to the other ranks, though all have joined (" in text]
    assert "set NCCL_SOCKET_IFNAME (GLOO_SOCKET_IFNAME on CPUs) to the network interface" in reason
    assert "Traceback" not in "".join(said)


@thorough  # on one machine: tests/distributed/test_membership.py
@pytest.mark.parametrize(
    ("alone", "says"),
    [pytest.param(0, "node 1: did not join within 5 s; check that the node is up and its process was launched\n",
                  id="the second"),
     pytest.param(1, f"{ADDRESSES[0]}:29612: cannot be reached from ", id="the first")],
)  # fmt: skip
def test_a_node_that_never_joins(nodes, tmp_path, talks, alone, says):
    path = write_recipe(tmp_path / "r.yaml", make_recipe(tmp_path, "run", talks, timeout_s=5))
    codes, (said,) = wait_for_end([start(path, alone, timeout_s=5)], 60)
    assert codes == [5]
    assert says in said
    assert "Traceback" not in said
    assert not (tmp_path / "run").exists()


@thorough
def test_an_output_folder_that_is_not_shared_is_refused(nodes, tmp_path, talks):
    (tmp_path / "disk").mkdir()
    path = write_recipe(tmp_path / "r.yaml", make_recipe(tmp_path, "disk/run", talks))
    codes, said = wait_for_end([start(path, 0), start(path, 1, own_disk=tmp_path / "disk")], 120)
    assert all(codes)
    assert "is not the same folder on all nodes" in said[0]
    assert "set output_dir to a shared file system" in said[0]


@thorough
def test_doctor_reports_both_nodes_and_their_differences(nodes, tmp_path):
    (folder := tmp_path / "trl-0.0.1.dist-info").mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: trl\nVersion: 0.0.1\n")
    alike = [
        start_on_node(["doctor"], rank, 60, with_host_name(node), stdout=subprocess.PIPE)
        for rank, node in enumerate(NODES)
    ]
    out, said = alike[0].communicate(timeout=120)
    assert (alike[0].returncode, alike[1].wait(60)) == (0, 0), said
    assert "processes         2 on 2 machine(s)" in out
    assert f"{NODES[0]} (process 0) to {NODES[1]} (process 1): " in out
    (row,) = [line for line in out.splitlines() if line.startswith(f"{NODES[1]} ")]
    assert row.endswith(" none")
    odd = [
        start_on_node(["doctor"], 0, 60, with_host_name(NODES[0])),
        start_on_node(["doctor"], 1, 60, with_host_name(NODES[1]), f"{tmp_path}:{ROOT}"),
    ]
    codes, said = wait_for_end(odd, 120)
    assert all(codes)
    assert f"{NODES[1]}: trl: is 0.0.1, not trl<" in said[0]
