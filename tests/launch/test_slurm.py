"""The Slurm job: one source for every number, a script that bash accepts, and only what is at hand offline."""

import os
import re
import shlex
import subprocess
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nesso_tune.launch.command import Machines, train_arguments
from nesso_tune.launch.slurm import sbatch_text
from nesso_tune.recipes.sections import ClusterSection
from tests.support.examples import examples
from tests.support.runs import main_here, recipe, write_recipe


@pytest.fixture
def launch(capsys, tmp_path, monkeypatch):
    """Runs `launch`; returns exit code, stdout and stderr."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))

    return partial(main_here, capsys, "launch")


def options(text):
    """{name: value} of the #SBATCH lines."""
    return dict(re.findall(r"^#SBATCH --([\w-]+)=(.*)$", text, re.MULTILINE))


def inner(text):
    """The words that run on each node."""
    (line,) = [line for line in text.splitlines() if line.startswith("srun ")]
    command = shlex.split(line)
    return shlex.split(command[command.index("-c") + 1])


def after(words, option):
    return words[words.index(option) + 1]


def check_consistent(text, nodes, gpus, cpus):
    said, words = options(text), inner(text)
    assert (said["nodes"], said["gpus-per-node"], said["ntasks-per-node"]) == (str(nodes), str(gpus), "1")
    assert said["cpus-per-task"] == str(gpus * cpus)
    assert (after(words, "--num_machines"), after(words, "--num_processes")) == (str(nodes), str(nodes * gpus))
    assert f"NODES={nodes} GPUS_PER_NODE={gpus} CPUS_PER_GPU={cpus}\n" in text
    assert '--ntasks="$NODES" --ntasks-per-node=1 --cpus-per-task="$((GPUS_PER_NODE * CPUS_PER_GPU))"' in text
    assert after(words, "--machine_rank") == "$SLURM_NODEID"
    assert after(words, "--rdzv_conf") == "timeout=1800"
    assert "export OMP_NUM_THREADS=$CPUS_PER_GPU\n" in text
    assert ("--multi_gpu" in words) is (nodes * gpus > 1)


def test_the_reference_run_on_four_nodes(launch, tmp_path):
    file = tmp_path / "out.sbatch"
    code, text, _ = launch("recipes/sft.yaml", "--slurm", file, "--nodes", 4, "--gpus-per-node", 8, "--print")
    assert code == 0
    assert not file.exists(), "--print writes nothing"
    check_consistent(text, 4, 8, 8)
    assert inner(text)[-4:] == ["-m", "nesso_tune", "train", "recipes/sft.yaml"]
    assert subprocess.run(["bash", "-n"], input=text, text=True, check=False).returncode == 0


WORD = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=12).filter(lambda w: w.strip())


def test_a_job_that_got_other_machines_ends_at_once(tmp_path):
    """As `sbatch --nodes 2 file` would give them."""
    text = sbatch_text("x", Machines(4, 8), ClusterSection(), train_arguments(["r.yaml"]), str(tmp_path))
    for job, says in (({"SLURM_NNODES": "2"}, "written for 4 nodes but got 2"),
                        ({"SLURM_NNODES": "4", "SLURM_GPUS_ON_NODE": "4"}, "8 GPUs per node but got 4")):  # fmt: skip
        done = subprocess.run(["bash"], input=text, capture_output=True, text=True, env={**os.environ, **job})
        assert (done.returncode, done.stdout) == (2, "")
        assert says in done.stderr


@examples(40)
@given(st.integers(1, 64), st.integers(1, 16), st.integers(1, 32), WORD, st.lists(WORD, max_size=2), WORD)
def test_no_numbers_can_disagree_and_no_word_breaks_the_script(nodes, gpus, cpus, name, modules, value):
    cluster = ClusterSection(
        cpus_per_gpu=cpus, modules=tuple(modules), env={"A_B": value}, container=value, python=value
    )
    words = train_arguments([name], [f"a.b={value}"])  # a name that begins with - comes last, after --
    assert sorted({*words} - {"--"}) == sorted({"train", name, "--set", f"a.b={value}"} - {"--"})
    text = sbatch_text(name, Machines(nodes, gpus), cluster, words, value)
    check_consistent(text, nodes, gpus, cpus)
    assert inner(text)[-len(words) :] == words
    assert subprocess.run(["bash", "-n"], input=text, text=True, check=False).returncode == 0


def test_the_cluster_section_and_flags_over_it(launch, tmp_path, talks):
    section = {"nodes": 2, "gpus_per_node": 4, "partition": "boost", "account": "nesso", "time": "24:00:00",
               "modules": ["cuda/12"], "env": {"NCCL_DEBUG": "WARN"}, "extra": ["--exclusive"]}  # fmt: skip
    some = recipe(
        "sft", tmp_path / "run", [talks], cluster=section, train={"global_batch_size": 8, "micro_batch_size": 1}
    )
    path = write_recipe(tmp_path / "r.yaml", some)
    file = tmp_path / "jobs" / "r.sbatch"
    code, out, _ = launch(path, "--slurm", file, "--time", "1:00:00")
    assert code == 0
    assert "2 nodes x 4 GPUs = 8 processes" in out
    text = file.read_text()
    check_consistent(text, 2, 4, 8)
    said = options(text)
    assert (said["partition"], said["account"], said["time"]) == ("boost", "nesso", "1:00:00")
    assert "module load cuda/12\nexport NCCL_DEBUG=WARN\nexport HF_HUB_OFFLINE=1\n" in text
    assert "#SBATCH --exclusive\n" in text
    assert "scontrol requeue" in text


def test_what_is_not_fetched_is_refused_before_the_job_waits(launch, tmp_path):
    file = tmp_path / "out.sbatch"
    code, _, err = launch("recipes/sft.yaml", "--slurm", file, "--nodes", 4, "--gpus-per-node", 8)
    assert code == 5
    assert not file.exists()
    assert "mii-llm/zagreus-0.4B-ita is not in the cache" in err
    assert "run `nesso-tune prepare recipes/sft.yaml` on the login node" in err
    code, _, _ = launch("recipes/sft.yaml", "--slurm", file, "--set", "cluster.offline=false")
    assert code == 0
    assert "HF_HUB_OFFLINE" not in file.read_text()


FAULTS = {
    "a batch that does not divide": (["recipes/dpo.yaml", "--slurm", "x", "--nodes", 3], 2, "is not a multiple of"),
    "nodes without slurm": (["recipes/sft.yaml", "--nodes", 3], 2, "--nodes: has no effect without --slurm FILE"),
    "submit without slurm": (["recipes/sft.yaml", "--submit"], 2, "--submit: has no effect without --slurm"),
    "overwrite in a job": (["recipes/sft.yaml", "--slurm", "x", "--overwrite"], 2, "checkpoints of the job"),
    "resume in a job": (["recipes/sft.yaml", "--slurm", "x", "--resume", "never"], 2, "checkpoints of the job"),
    "submit and print": (["recipes/sft.yaml", "--slurm", "x", "--submit", "--print"], 2, "--submit: has no effect"),
    "one folder": (["recipes/sft.yaml", "recipes/sft.yaml", "--slurm", "x"], 2, "has the same output_dir"),
    "two clusters": (
        [
            "recipes/sft.yaml",
            "recipes/dpo.yaml",
            "--slurm",
            "x",
            "--set",
            "sft:cluster.nodes=2",
            "--set",
            "dpo:cluster.nodes=8",
        ],
        2,
        "recipes/dpo.yaml: cluster: differs from that of recipes/sft.yaml",
    ),
    "a script in a flag": (
        ["recipes/sft.yaml", "--slurm", "x", "--account", "x\necho PWNED"],
        2,
        "--account: must be one",
    ),
    "two options in one": (
        ["recipes/sft.yaml", "--slurm", "x", "--set", 'cluster.partition="a --nodes=9"'],
        2,
        "`cluster.partition` must be one word without quotes",
    ),
    "no such data": (["quickstart/sft", "--slurm", "x", "--set", "data.sources.0.path=typo.jsonl"], 3, "typo.jsonl"),
    "a line break": (["recipes/sft.yaml", "--slurm", "x", "--set", 'cluster.account="a\\nb"'], 2, "cluster.account"),
    "an odd variable": (["recipes/sft.yaml", "--slurm", "x", "--set", "cluster.env={A-B: c}"], 2, "cluster.env"),
}


@pytest.mark.parametrize(("arguments", "code", "says"), FAULTS.values(), ids=FAULTS)
def test_faults(launch, arguments, code, says):
    got, out, err = launch(*arguments)
    assert (got, out) == (code, "")
    assert says in err


def test_flags_of_train_are_passed_on(launch):
    code, out, _ = launch("recipes/sft.yaml", "--overwrite", "--allow-changes", "seed,logging", "--print",
                          "--gpus-per-node", 2)  # fmt: skip
    assert code == 0
    assert out.endswith("train recipes/sft.yaml --overwrite --allow-changes seed,logging\n")
    _, out, _ = launch("recipes/sft.yaml", "--allow-changes", "seed", "--slurm", "x", "--print")
    assert inner(out)[-4:] == ["train", "recipes/sft.yaml", "--allow-changes", "seed"]


def test_submit_needs_slurm(launch, tmp_path, talks, monkeypatch):
    path = write_recipe(tmp_path / "r.yaml", recipe("sft", tmp_path / "run", [talks]))
    monkeypatch.setenv("PATH", str(tmp_path))
    code, _, err = launch(path, "--slurm", tmp_path / "x.sbatch", "--submit")
    assert code == 5
    assert "sbatch: is not installed on this machine" in err
