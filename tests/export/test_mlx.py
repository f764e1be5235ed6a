"""MLX folders against transformers, in mlx-lm."""

import json

import pytest

pytest.importorskip("mlx_lm", reason="needs the extra mlx")

from nesso_tune.errors import ModelError
from nesso_tune.export import parity
from nesso_tune.export.exporter import export
from nesso_tune.export.folder_formats import MLX, MlxRuntime
from nesso_tune.export.weights import FinishedRun
from nesso_tune.run import train
from tests.support.runs import recipe, sums


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_mlx_computes_the_same(tmp_path, monkeypatch, dtype):
    monkeypatch.setattr(parity, "PROMPTS", 8)
    monkeypatch.setattr(parity, "ANSWER_TOKENS", 8)
    train(recipe("sft", tmp_path / "run", [sums(tmp_path)], evaluation=None, train={"learning_rate": 1e-2}))
    run = FinishedRun.open(tmp_path / "run")
    done = export(run, MLX, dtype, folder=tmp_path / "out")
    assert (done.parity.prompts, done.dtype) == (8, dtype)
    assert done.parity.near_ties <= (dtype != "float32")
    assert (done.folder / "chat_template.jinja").read_bytes() == (run.final / "chat_template.jinja").read_bytes()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(("out-", ".out"))]
    config = run.final / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "model_type": "xglm"}))
    with pytest.raises(ModelError, match="has no architecture xglm; export --to hf"):
        export(run, MLX, folder=tmp_path / "other")


def test_a_common_prefix_is_computed_once(chat_model):
    """The same tokens as with a new cache for each prompt, in any order of the prompts."""
    prompts = [[3, 4, 5, 6, 7], [3, 4, 5, 9], [3, 4, 5, 9], [8], [3, 4, 5, 6, 7, 8]]
    kept, answer = MlxRuntime(chat_model), [11, 12, 13]
    alone = [MlxRuntime(chat_model).likeliest(prompt, answer) for prompt in prompts]
    assert [kept.likeliest(prompt, answer) for prompt in prompts] == alone
    assert kept._keep_common_prefix([*prompts[-1], 20], len(prompts[-1]) - 1) == 5
