"""The Slurm jobs: one source for every number, scripts that bash accepts, chains, and what is at hand offline."""

import os
import re
import shlex
import subprocess
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nesso_tune.launch.command import Machines, train_arguments
from nesso_tune.launch.slurm import Job, chain_commands, sbatch_text
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
    command = shlex.split(line.removesuffix(" || code=$?"))
    return shlex.split(command[-1])


def after(words, option):
    return words[words.index(option) + 1]


def job(nodes=1, gpus=1, folder="/work", array=0, **cluster):
    """A training job of `r.yaml`."""
    section, arguments = ClusterSection(**cluster), train_arguments(["r.yaml"])
    return Job("x", Machines(nodes, gpus), section, [arguments], str(folder), [Path(folder) / "run"], array=array)


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
    text = sbatch_text(job(4, 8, tmp_path))
    for allocation, says in (({"SLURM_NNODES": "2"}, "written for 4 nodes but got 2"),
                        ({"SLURM_NNODES": "4", "SLURM_GPUS_ON_NODE": "4"}, "8 GPUs per node but got 4")):  # fmt: skip
        done = subprocess.run(["bash"], input=text, capture_output=True, text=True, env={**os.environ, **allocation})
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
    text = sbatch_text(Job(name, Machines(nodes, gpus), cluster, [words], value, [Path("/runs") / "a"]))
    check_consistent(text, nodes, gpus, cpus)
    assert inner(text)[-len(words) :] == words
    assert subprocess.run(["bash", "-n"], input=text, text=True, check=False).returncode == 0


def test_the_cluster_section_and_flags_over_it(launch, tmp_path, talks):
    section = {"nodes": 2, "gpus_per_node": 4, "partition": "boost", "account": "nesso", "time": "24:00:00",
               "modules": ["cuda/12"], "env": {"NCCL_DEBUG": "INFO"}, "extra": ["--exclusive"]}  # fmt: skip
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
    assert (
        "set +u\ntype module > /dev/null 2>&1 || { set +e; . /etc/profile; set -e; }\nmodule load cuda/12\nset -u\n"
        in text
    )
    assert "\nexport NCCL_DEBUG=INFO\n" in text
    assert "\nexport HF_HUB_OFFLINE=1\n" in text
    assert "#SBATCH --exclusive\n" in text
    assert "scontrol requeue" in text


def test_what_is_not_fetched_is_refused_before_the_job_waits(launch, tmp_path):
    file = tmp_path / "out.sbatch"
    code, _, err = launch("recipes/sft.yaml", "--slurm", file, "--nodes", 4, "--gpus-per-node", 8)
    assert code == 5
    assert not file.exists()
    assert "mii-llm/zagreus-0.4B-ita is not in the cache" in err
    assert "run `nesso-tune prepare --fetch-only recipes/sft.yaml` on the login node" in err
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
    "prepare without slurm": (["recipes/sft.yaml", "--prepare"], 2, "--prepare: has no effect without --slurm"),
    "prepare a doctor": (["doctor", "--slurm", "x", "--prepare"], 2, "--prepare: has no effect with `doctor`"),
    "a flag that is no time": (
        ["recipes/sft.yaml", "--slurm", "x", "--time", "24h"],
        2,
        "--time: 24h is not a time of",
    ),
    "training options of a doctor": (["doctor", "--verify", "all"], 2, "--verify: has no effect with `doctor`"),
    "lines that are no bash": (
        ["recipes/sft.yaml", "--slurm", "x", "--print", "--set", "cluster.setup=['if true; then']"],
        2,
        "cluster.setup: is not valid bash (",
    ),
    "a command as interpreter": (
        ["recipes/sft.yaml", "--slurm", "x", "--set", "cluster.python=singularity exec a.sif python"],
        2,
        "is the path of an interpreter, not a command; write the path alone, or use cluster.container",
    ),
    "a second number of tasks": (
        ["recipes/sft.yaml", "--slurm", "x", "--set", "cluster.srun_options=[--ntasks=3]"],
        2,
        "--ntasks is set by other keys",
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
    flags = ["--verify", "all", "--allow-changes", "seed"]
    _, out, _ = launch("recipes/sft.yaml", *flags, "--slurm", "x", "--print")
    assert inner(out)[-6:] == ["train", "recipes/sft.yaml", *flags]


def test_only_the_caches_of_the_first_job_are_looked_into(launch, tmp_path, talks, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "mine"))
    paths, looked_for = [], []
    monkeypatch.setattr("nesso_tune.cli.launch._check_cached", lambda names, _: looked_for.extend(names))
    for name, env in (("first", {"HF_HOME": str(tmp_path / "other")}), ("second", {})):
        some = recipe("sft", tmp_path / name, [talks], cluster={"env": env})
        paths.append(write_recipe(tmp_path / f"{name}.yaml", some))
    code, out, said = launch(*paths, "--slurm", tmp_path / "job.sbatch")
    assert code == 0, said
    assert f"{paths[1]}: not looked for in its caches, which are not those of the first job" in out
    assert looked_for == paths[:1]


def test_a_file_that_is_no_job_is_not_replaced(launch, tmp_path, talks):
    path = write_recipe(tmp_path / "r.yaml", recipe("sft", tmp_path / "run", [talks]))
    before = Path(path).read_text()
    code, _, said = launch(path, "--slurm", path)
    assert (code, Path(path).read_text()) == (2, before)
    assert f"--slurm: {path} exists and is no job of nesso-tune; name another file, or remove it" in said
    for _ in range(2):
        assert launch(path, "--slurm", tmp_path / "job.sbatch")[0] == 0, "a job is written again"


def test_submit_needs_slurm(launch, tmp_path, talks, monkeypatch):
    path = write_recipe(tmp_path / "r.yaml", recipe("sft", tmp_path / "run", [talks]))
    monkeypatch.setenv("PATH", str(tmp_path))
    code, _, err = launch(path, "--slurm", tmp_path / "x.sbatch", "--submit")
    assert code == 5
    assert "sbatch: is not installed on this machine" in err


GPU_OPTIONS = [
    ({}, "--gpus-per-node=4"), ({"gpu_type": "a100"}, "--gpus-per-node=a100:4"),
    ({"gpu_option": "gres"}, "--gres=gpu:4"), ({"gpu_option": "gres", "gpu_type": "h100"}, "--gres=gpu:h100:4"),
    ({"gpu_option": "gpus-per-task"}, "--gpus-per-task=4"), ({"gpu_option": "none"}, None),
]  # fmt: skip


@pytest.mark.parametrize(("section", "option"), GPU_OPTIONS)
def test_gpus_in_the_words_of_the_site(section, option):
    lines = [line for line in sbatch_text(job(2, 4, **section)).splitlines() if line.startswith("#SBATCH")]
    assert [line for line in lines if "gpu" in line or "gres" in line] == ([f"#SBATCH {option}"] if option else [])


def test_setup_may_read_variables_that_are_not_set(tmp_path):
    (tmp_path / "bin").mkdir()
    (stub := tmp_path / "bin" / "scontrol").write_text("#!/bin/sh\necho node1\n")
    stub.chmod(0o755)
    setup = ['echo "value: $NOT_SET."', "export FROM_SITE=yes"]
    text = sbatch_text(job(1, 1, tmp_path, setup=setup, env={"LAST": "a b"}))
    before, _, _ = text.partition("code=0\n")
    environment = {"SLURM_NNODES": "1", "SLURM_JOB_ID": "12345", "SLURM_JOB_NODELIST": "node1",
                   "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}  # fmt: skip
    shown = "echo $FROM_SITE $LAST $NCCL_DEBUG $MAIN_PORT $TORCH_FR_DUMP_TEMP_FILE"
    done = subprocess.run(
        ["bash"], input=f"{before}{shown}; echo $NOT_SET", capture_output=True, text=True, env=environment
    )
    dumps = f"{tmp_path}/run.flight-recorder-12345-rank-"
    assert done.stdout == f"value: .\nyes a b WARN 20690 {dumps}\n"
    assert "NOT_SET" in done.stderr, "unset variables are errors again afterwards"
    assert all(20000 <= 20000 + 2 * (number % 6000) < 32000 for number in range(100_000))  # as MAIN_PORT, and one more


def chain_recipes(tmp_path, talks, pairs, clusters):
    """The paths of two recipes: a DPO run of an SFT run's model."""
    sft = recipe("sft", tmp_path / "sft", [talks], cluster=clusters[0], train={"micro_batch_size": 1})
    dpo = recipe("dpo", tmp_path / "dpo", [pairs], cluster=clusters[1], model={"base": str(tmp_path / "sft" / "final"),
                 "random_init": False})  # fmt: skip
    return write_recipe(tmp_path / "sft.yaml", sft), write_recipe(tmp_path / "dpo.yaml", dpo)


def test_recipes_with_clusters_of_their_own_are_a_chain_of_jobs(launch, tmp_path, talks, pairs, monkeypatch):
    (stub := tmp_path / "sbatch").write_text(
        f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\necho $(( $(wc -l < {tmp_path}/calls) + 40 ))\n'
    )
    stub.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    both = chain_recipes(tmp_path, talks, pairs, [{"nodes": 4, "gpus_per_node": 2}, {"nodes": 1, "gpus_per_node": 2}])
    code, out, err = launch(*both, "--slurm", tmp_path / "run.sbatch", "--prepare", "--submit",
                            "--set", "sft:seed=1", "--allow-changes", "dpo.beta,seed")  # fmt: skip
    assert code == 0, err
    assert f"{both[1]}: its own job prepares its data" in out
    assert [line for line in out.splitlines() if line.startswith("Submitted")] == [
        f"Submitted batch job {n}" for n in (41, 42, 43)
    ]
    names = ["run-1-prepare.sbatch", "run-2-sft.sbatch", "run-3-dpo.sbatch"]
    calls = [line.split() for line in (tmp_path / "calls").read_text().splitlines()]
    assert [Path(call[-1]).name for call in calls] == names
    assert [call[1:-1] for call in calls] == [
        [],
        *(f"--dependency=afterok:{n} --kill-on-invalid-dep=yes".split() for n in (41, 42)),
    ]
    prepare, sft, dpo = ((tmp_path / name).read_text() for name in names)
    check_consistent(sft, 4, 2, 8)
    check_consistent(dpo, 1, 2, 8)
    assert inner(sft)[-6:] == ["train", both[0], "--set", "sft:seed=1", "--allow-changes", "seed"]
    assert inner(dpo)[-4:] == ["train", both[1], "--allow-changes", "dpo.beta,seed"]
    assert inner(prepare) == ["python", "-m", "nesso_tune", "prepare", both[0], "--set", "sft:seed=1"]
    assert "gpu" not in "".join(options(prepare)), "a CPU job"


def test_recipes_of_one_cluster_are_one_job(launch, tmp_path, talks, pairs):
    both = chain_recipes(tmp_path, talks, pairs, [{"nodes": 2}, {"nodes": 2}])
    code, out, _ = launch(*both, "--slurm", tmp_path / "run.sbatch", "--print")
    assert code == 0
    assert inner(out)[-3:] == ["train", *both]


def test_the_commands_of_a_chain_are_shown(tmp_path):
    commands = chain_commands([tmp_path / "a.sbatch", tmp_path / "b.sbatch"])
    (tmp_path / "sbatch").write_text('#!/bin/sh\necho "$*" >&2\necho 7\n')
    (tmp_path / "sbatch").chmod(0o755)
    done = subprocess.run(["bash", "-euc", "\n".join(commands)], capture_output=True, text=True,
                          env={"PATH": f"{tmp_path}:{os.environ['PATH']}"})  # fmt: skip
    assert done.stderr.splitlines() == [
        f"--parsable {tmp_path}/a.sbatch",
        f"--parsable --dependency=afterok:7 --kill-on-invalid-dep=yes {tmp_path}/b.sbatch",
    ]  # fmt: skip
    assert chain_commands([Path("a b")]) == ["sbatch 'a b'"]


def test_a_doctor_of_the_allocation(launch, tmp_path, talks):
    path = write_recipe(tmp_path / "r.yaml", recipe("sft", tmp_path / "runs" / "a", [talks], cluster={"nodes": 2}))
    code, text, err = launch("doctor", path, "--slurm", "x", "--gpus-per-node", 4, "--print")
    assert code == 0, err
    check_consistent(text.replace("timeout=300", "timeout=1800"), 2, 4, 8)
    assert inner(text)[-5:] == ["doctor", "--output-dir", str(tmp_path / "runs"), "--timeout", "300"]
    assert "--no-requeue" in text
    assert "scontrol requeue" not in text
    code, text, _ = launch("doctor", "--gpus-per-node", 2, "--print")
    assert (code, text.split()[-5:]) == (0, ["doctor", "--output-dir", "outputs", "--timeout", "300"])


def test_data_is_looked_for_in_the_caches_of_the_job(launch, tmp_path, talks, monkeypatch):
    """`cluster.env` may name other caches than the environment of the login node."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "mine"))
    cluster = {"env": {"HF_HOME": str(tmp_path / "scratch")}}
    path = write_recipe(tmp_path / "r.yaml", recipe("sft", tmp_path / "run", [talks], cluster=cluster))
    code, _, err = launch(path, "--slurm", tmp_path / "job.sbatch")
    assert code == 0, err
    assert os.environ["HF_HOME"] == str(tmp_path / "scratch")
    assert f"export HF_HOME={tmp_path}/scratch\n" in (tmp_path / "job.sbatch").read_text()


STUBS = {
    # the pause: whoever closes the pipe after the first name would end the job
    "scontrol": 'echo "$@" >> calls; case $1 in show) echo node1; sleep 0.1; echo node2;; esac',
    # an empty step on a lost node does not start; the run itself ends as the variable says
    "srun": 'case "$*" in *" true") case "$*" in *"nodelist=$LOST "*) exit 1;; esac; exit 0;; esac; exit "$RUN_CODE"',
}


@pytest.mark.parametrize(
    ("code", "lost", "queued_again"),
    [(5, "node2", True), (137, "node1", True), (5, "none", False), (2, "node2", False), (75, "none", True)],
)
@pytest.mark.parametrize("array", [0, 3])
def test_a_job_that_lost_a_node_is_queued_again(code, lost, queued_again, array, tmp_path):
    """Of an array, the task alone: Slurm gives one of the tasks the id of the whole array."""
    for name, text in STUBS.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_NNODES": "2", "SLURM_JOB_ID": "9", "LOST": lost,
                   "SLURM_JOB_NODELIST": "node[1-2]", "RUN_CODE": str(code), "SLURM_ARRAY_JOB_ID": "9",
                   "SLURM_ARRAY_TASK_ID": "2"}  # fmt: skip
    done = subprocess.run(["bash"], input=sbatch_text(job(2, 1, tmp_path, array)), capture_output=True, text=True,
                          env=environment, check=False)  # fmt: skip
    assert done.returncode == code, done.stderr
    requeue = "requeue 9_2" if array else "requeue 9"
    assert (requeue in (tmp_path / "calls").read_text().splitlines()) is queued_again
    assert (f"does not answer: {lost}; this job is queued again" in done.stderr) is (queued_again and code != 75)
