"""Real small things that tests share: the quickstart base, data files, an own cache, no network."""

import json
import os
import random
import signal
import socket
import sys
import threading
from contextlib import suppress
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["KINETO_LOG_LEVEL"] = "99"  # read at the first profile of a process, whichever test makes it
os.environ.setdefault("OMP_NUM_THREADS", "1")
if threading.current_thread() is threading.main_thread():  # a suite started in the background ignores Ctrl-C, and so
    signal.signal(signal.SIGINT, signal.default_int_handler)  # would the processes that it sends one to

import numpy as np
import torch  # it reads the above; a command line that finds it loaded leaves nothing out for others
from hypothesis import settings

import tests.support.examples  # noqa: F401 - its profile is what all property tests run under
from nesso_tune import DPORecipe, SFTRecipe, metric_registry
from nesso_tune.logs import set_output
from nesso_tune.recipes import load_recipe
from tests.support.processes import end_all
from tests.support.recipe_texts import SFT

ROOT = Path(__file__).parent.parent


def pytest_collection_modifyitems(items):
    """No property test draws other examples than its profile says."""
    fixed = settings().derandomize
    for item in items:
        given = getattr(getattr(item, "obj", None), "_hypothesis_internal_use_settings", None)
        if given is not None and (given.derandomize, given.database, given.deadline) != (fixed, None, None):
            raise pytest.UsageError(f"{item.nodeid} sets its own examples; use tests.support.examples")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup():
    """What a test draws does not depend on the tests before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Every test has a cache of its own."""
    monkeypatch.setenv("NESSO_TUNE_CACHE", str(tmp_path / "cache"))


@pytest.fixture(autouse=True)
def seldom_verified(monkeypatch):
    """In the process of the tests, `final/` is verified only if all its rows are asked for; elsewhere as for users."""
    module = sys.modules.get("nesso_tune.export.verify")
    if module is not None:  # tests that train nothing must not load it
        own = module.Verifier.__init__
        monkeypatch.setattr(
            module.Verifier, "__init__", lambda self, amount: own(self, "none" if amount == "sample" else amount)
        )


@pytest.fixture(autouse=True)
def own_metrics():
    """A metric that one test registers is unknown to the next."""
    registries = (metric_registry.METRICS, metric_registry._own)
    before = [dict(registry) for registry in registries]
    yield
    for registry, content in zip(registries, before, strict=True):
        registry.clear()
        registry.update(content)


@pytest.fixture(autouse=True)
def plain_output():
    """`--quiet` and `--json-logs` of a command in this process are not those of the next test."""
    yield
    set_output(as_json=False, quiet=False)


@pytest.fixture(autouse=True)
def nothing_left_running():
    """Runs that a failed test leaves behind are killed."""
    yield
    end_all()


@pytest.fixture(scope="session")
def base() -> str:
    """The quickstart's base: config.json and a tokenizer with reserved slots and a BOS that it adds by itself."""
    return str(ROOT / "recipes" / "quickstart" / "base")


@pytest.fixture(scope="session")
def whole_base(base, tmp_path_factory) -> str:
    """The same with (random) weights: what a pre-trained base looks like."""
    from nesso_tune.smoke import build_tiny_model

    folder = tmp_path_factory.mktemp("whole_base")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((Path(base) / name).read_bytes())
    build_tiny_model(folder, json.loads((Path(base) / "config.json").read_text()))
    return str(folder)


@pytest.fixture
def port():
    """A port that is free now, and that no outgoing connection of another test is given meanwhile."""
    for number in range(10_000 + os.getpid() % 20_000, 32_768):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", number))
            return number
    raise AssertionError("no free port")


@pytest.fixture
def write_rows(tmp_path):
    """Writes rows as JSON lines; returns the path."""

    def write(rows, name="rows.jsonl"):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        return str(path)

    return write


@pytest.fixture
def chats():
    """Ten short bilingual conversations."""
    facts = [
        ("it", "Qual è la capitale d'Italia?", "La capitale d'Italia è Roma."),
        ("it", "Di che colore è il cielo?", "Il cielo è azzurro."),
        ("it", "Quanto fa due più due?", "Due più due fa quattro."),
        ("it", "Come ti chiami?", "Mi chiamo Nesso."),
        ("it", "Chi ha dipinto la Gioconda?", "La Gioconda è di Leonardo da Vinci."),
        ("en", "What is the capital of Italy?", "The capital of Italy is Rome."),
        ("en", "What colour is the sky?", "The sky is blue."),
        ("en", "What is two plus two?", "Two plus two is four."),
        ("en", "What is your name?", "My name is Nesso."),
        ("en", "Who painted the Mona Lisa?", "Leonardo da Vinci painted the Mona Lisa."),
    ]
    return [
        {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}], "language": code}
        for code, q, a in facts
    ]


@pytest.fixture
def talks(write_rows, chats):
    """Thirty bilingual conversations of different lengths, as a file."""
    rows = []
    for i, row in enumerate(chats * 3):
        question, answer = row["messages"]
        answer = {"role": "assistant", "content": answer["content"] * (1 + i % 3)}
        rows.append(
            {"messages": [{**question, "content": f"{question['content']} ({i})"}, answer], "lang": row["language"]}
        )
    return write_rows(rows, "talks.jsonl")


@pytest.fixture
def pairs(write_rows, chats):
    """Twenty bilingual preference pairs, as a file."""
    rows = [
        {
            "prompt": f"{row['messages'][0]['content']} ({i})",
            "chosen": row["messages"][1]["content"] + (" Altro?" if i % 2 else " Posso aiutarti ancora?"),
            "rejected": row["messages"][1]["content"][: 8 + i],
            "lang": row["language"],
        }
        for i, row in enumerate(chats * 2)
    ]
    return write_rows(rows, "pairs.jsonl")


@pytest.fixture
def recipe_file(tmp_path):
    """Writes a recipe (text or bytes); returns the path."""

    def write(content=SFT, name="r.yaml"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


@pytest.fixture
def override(recipe_file):
    """Loads the small SFT recipe with overrides."""
    return lambda overrides, text=SFT: load_recipe(recipe_file(text), overrides)


@pytest.fixture
def sft(base, tmp_path):
    """An SFT recipe over sources (paths or dicts) with keys of `data`."""

    def make(*sources, seed=42, chat=None, **data):
        data = {"sequence_len": 256, "validation_size": 0} | data
        return SFTRecipe.model_validate(
            {"output_dir": str(tmp_path / "run"), "seed": seed, "model": {"base": base}, "chat": chat or {},
             "data": {**data, "sources": [s if isinstance(s, dict) else {"path": s} for s in sources]}}
        )  # fmt: skip

    return make


@pytest.fixture
def dpo(base, tmp_path):
    """A DPO recipe over sources (paths or dicts) with keys of `data`."""

    def make(*sources, **data):
        data = {"sequence_len": 256, "validation_size": 0} | data
        return DPORecipe.model_validate(
            {"output_dir": str(tmp_path / "run"), "model": {"base": base},
             "data": {**data, "sources": [s if isinstance(s, dict) else {"path": s} for s in sources]}}
        )  # fmt: skip

    return make


@pytest.fixture
def duels():
    """Six preference pairs."""
    return [
        {"prompt": f"Domanda {i}?", "chosen": f"Sì, la risposta è {i}.", "rejected": "Boh.", "lang": "it"}
        for i in range(6)
    ]


@pytest.fixture(scope="session")
def chat_model(tmp_path_factory) -> Path:
    """final/ of a run of one step: a chat template and random weights."""
    from nesso_tune.run import train
    from tests.support.runs import recipe, sums

    folder = tmp_path_factory.mktemp("chat_model")
    train(recipe("sft", folder / "run", [sums(folder)], train={"max_steps": 1}, evaluation=None))
    return folder / "run" / "final"
