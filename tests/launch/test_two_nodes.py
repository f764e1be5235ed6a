"""Two machines, simulated: network namespaces with a cable between them. Needs root and iproute2; skipped elsewhere."""

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from nesso_tune.launch.command import Machines, Meeting, accelerate_words, train_words
from nesso_tune.run import train
from tests.support.runs import ROOT, recipe, steps, thorough, write_recipe
from tests.test_kill import environment_of, when_at, workers

NODES = (f"nessoa{os.getpid()}", f"nessob{os.getpid()}")  # other runs of these tests have nodes of their own
ADDRESSES = ("10.97.0.1", "10.97.0.2")


def ip(*words, check=True):
    return subprocess.run(["ip", *words], capture_output=True, text=True, check=check)


def remove_nodes():
    for node in NODES:
        ip("netns", "del", node, check=False)


@pytest.fixture
def nodes():
    """Two namespaces, each with an address at its end of a cable."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("needs root and iproute2")
    remove_nodes()
    if ip("netns", "add", NODES[0], check=False).returncode:
        pytest.skip("network namespaces cannot be made here")
    ip("netns", "add", NODES[1])
    ip("link", "add", "cablea", "netns", NODES[0], "type", "veth", "peer", "name", "cableb", "netns", NODES[1])
    for node, cable, address in zip(NODES, ("cablea", "cableb"), ADDRESSES, strict=True):
        ip("-n", node, "addr", "add", f"{address}/24", "dev", cable)
        ip("-n", node, "link", "set", cable, "up")
        ip("-n", node, "link", "set", "lo", "up")
    yield NODES
    remove_nodes()


def start(path, rank, timeout_s=60, own_disk=None, **options):
    """The run's part on one node, as the Slurm job starts it; on `own_disk` it sees a folder of its own."""
    return part(train_words([path]), rank, timeout_s, [*named(NODES[rank]), *_alone_on(own_disk)], **options)


def part(verb, rank, timeout_s=60, before=(), path=str(ROOT), network=None, module="nesso_tune", **streams):
    """One node's part of a command; `network`: the interface that gloo takes, if not the cable."""
    meeting = Meeting(str(rank), ADDRESSES[0], "29611", timeout_s)
    words = [*accelerate_words(Machines(2, 1), meeting, module), *verb]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": "",
                   "GLOO_SOCKET_IFNAME": network or ("cablea", "cableb")[rank]}  # fmt: skip
    return subprocess.Popen(
        ["ip", "netns", "exec", NODES[rank], *before, sys.executable, *words],
        cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True, **streams,
    )  # fmt: skip


def named(node):
    """Words before a command that give the machine it runs on a name."""
    return ["unshare", "-u", "sh", "-c", 'hostname "$0" && exec "$@"', node]


def _alone_on(folder):
    """Words before a command that give it another file system at a folder."""
    if folder is None:
        return []
    return ["unshare", "-m", "sh", "-c", 'mount -t tmpfs none "$0" && exec "$@"', str(folder)]


def some(tmp_path, name, talks, steps=40, timeout_s=60, **sharing):
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


def ended(processes, within):
    """Exit codes and messages of all parts, which must end within some seconds."""
    began = time.monotonic()
    said = [process.communicate(timeout=within)[1] for process in processes]
    assert time.monotonic() - began < within
    return [process.returncode for process in processes], said


@pytest.mark.parametrize(
    ("module", "sharing"),
    [pytest.param("tests.support.fsdp_on_cpu", {"fsdp": "full_shard", "state_dict": "sharded"}, id="sharded"),
     pytest.param("nesso_tune", {"fsdp": "none"}, id="DDP", marks=thorough)],
)  # fmt: skip
def test_two_nodes_give_the_losses_of_one_process(nodes, tmp_path, talks, module, sharing):
    train(one := some(tmp_path, "one", talks, steps=5, **sharing))
    path = write_recipe(tmp_path / "two.yaml", some(tmp_path, "two", talks, steps=5, **sharing))
    codes, said = ended([start(path, rank, module=module) for rank in range(2)], 120)
    assert codes == [0, 0], said
    assert steps(tmp_path / "two") == pytest.approx(steps(one.output_dir), abs=1e-5)


@thorough
def test_a_process_that_dies_on_the_other_node(nodes, tmp_path, talks):
    path = write_recipe(tmp_path / "r.yaml", some(tmp_path, "run", talks))
    parts = [start(path, 0), start(path, 1)]
    when_at(parts[0], tmp_path / "run", 5, None)
    (victim,) = [pid for pid in workers(parts[1].pid) if b"RANK=1" in environment_of(pid)]
    os.kill(victim, signal.SIGKILL)
    codes, said = ended(parts, 60)
    assert all(codes)
    assert f"process 0 on {NODES[0]}: lost contact with process 1 on {NODES[1]} (" in said[0]
    codes, said = ended([start(path, 0), start(path, 1)], 120)
    assert codes == [0, 0], said
    assert "resuming an unfinished run from checkpoint-" in said[0]


def test_a_cut_cable_ends_both_within_the_time_that_was_set(nodes, tmp_path, talks):
    path = write_recipe(tmp_path / "r.yaml", some(tmp_path, "run", talks, steps=150, timeout_s=10))
    parts = [start(path, 0), start(path, 1)]
    when_at(parts[0], tmp_path / "run", 5, None)
    ip("-n", NODES[0], "link", "set", "cablea", "down")
    codes, said = ended(parts, 30)
    assert codes == [5, 5]
    assert f"process 0 on {NODES[0]}: lost contact with process 1 on {NODES[1]} (" in said[0]
    assert f"process 1 on {NODES[1]}: lost contact with the launcher on {ADDRESSES[0]} (" in said[1]
    assert not any("Traceback" in text for text in said)
    ip("-n", NODES[0], "link", "set", "cablea", "up")
    codes, said = ended([start(path, 0), start(path, 1)], 120)
    assert codes == [0, 0], said
    assert "resuming an unfinished run from checkpoint-" in said[0]


def test_processes_that_meet_but_take_the_wrong_network(nodes, tmp_path, talks):
    path = write_recipe(tmp_path / "r.yaml", some(tmp_path, "run", talks, timeout_s=5))
    parts = [start(path, rank, network="lo") for rank in range(2)]
    until = time.monotonic() + 60
    while all(part.poll() is None for part in parts) and time.monotonic() < until:
        time.sleep(0.2)
    (first,) = [part for part in parts if part.poll() is not None]  # gloo lets the other try for five times as long
    said = first.communicate()[1]
    assert first.returncode
    assert "cannot connect to the others, though all are there (" in said
    assert "name the network that connects the machines in NCCL_SOCKET_IFNAME" in said
    for part in parts:
        for pid in workers(part.pid):
            os.kill(pid, signal.SIGKILL)
        part.wait(30)


@pytest.mark.parametrize(
    ("alone", "says"),
    [pytest.param(0, "machine 1: did not come within 5 s; see whether it is up and its part was started\n",
                  id="the second"),
     pytest.param(1, f"{ADDRESSES[0]}:29612: cannot be reached from ", id="the first", marks=thorough)],
)  # fmt: skip
def test_a_node_that_never_comes(nodes, tmp_path, talks, alone, says):
    path = write_recipe(tmp_path / "r.yaml", some(tmp_path, "run", talks, timeout_s=5))
    codes, (said,) = ended([start(path, alone, timeout_s=5)], 60)
    assert codes == [5]
    assert says in said
    assert "Traceback" not in said
    assert not (tmp_path / "run").exists()


@thorough
def test_an_output_folder_on_a_nodes_own_disk_is_refused(nodes, tmp_path, talks):
    (tmp_path / "disk").mkdir()
    path = write_recipe(tmp_path / "r.yaml", some(tmp_path, "disk/run", talks))
    codes, said = ended([start(path, 0), start(path, 1, own_disk=tmp_path / "disk")], 60)
    assert all(codes)
    assert "is not the same folder on all machines" in said[0]
    assert "set output_dir on a file system that they share" in said[0]


@thorough
def test_the_doctor_sees_both_machines_and_the_one_that_differs(nodes, tmp_path):
    (folder := tmp_path / "trl-0.0.1.dist-info").mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: trl\nVersion: 0.0.1\n")
    alike = [part(["doctor"], rank, 60, named(node), stdout=subprocess.PIPE) for rank, node in enumerate(NODES)]
    out, said = alike[0].communicate(timeout=120)
    assert (alike[0].returncode, alike[1].wait(60)) == (0, 0), said
    assert "processes     2 on 2 machine(s)" in out
    assert f"process 0 to {NODES[1]} (process 1): " in out
    odd = [part(["doctor"], 0, 60, named(NODES[0])), part(["doctor"], 1, 60, named(NODES[1]), f"{tmp_path}:{ROOT}")]
    codes, said = ended(odd, 120)
    assert all(codes)
    assert f"{NODES[1]}: trl: is 0.0.1, not trl<" in said[0]
