"""Templates that come with a base: compared with ours, never replaced unsaid, rendered under limits."""

import json
import shutil
from pathlib import Path

import pytest
import trl
from transformers.utils.chat_template_utils import render_jinja_template

from nesso_tune import ModelError, RecipeError
from nesso_tune.chat import sandbox
from nesso_tune.chat.base_template import SAMPLES, TOOL_SAMPLES, _template_variables, match_base_template, render_jinja
from nesso_tune.chat.jinja import to_jinja
from nesso_tune.chat.template import load_template
from nesso_tune.chat.tokenizer import chat_tokenizer
from nesso_tune.data.prepare import prepare_data
from nesso_tune.recipes.builtin import template_names
from nesso_tune.recipes.sections import ChatSection, ModelSection
from tests.support.runs import main_here, recipe, write_recipe

CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>'"
    " + '\\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)  # as many bases ship it: it knows no tools
LLAMA3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' +"
    " message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
    "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
WITH_SYSTEM = "{% if messages[0].role != 'system' %}<|im_start|>system\nSei Q.<|im_end|>\n{% endif %}" + CHATML
OTHER_TOOLS = "{% if tools %}<|im_start|>system\n# Tools{{ tools | tojson }}<|im_end|>\n{% endif %}" + CHATML
BROKEN = {
    "no system": (CHATML.replace("{%", "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}"
                                 "{% endif %}{%", 1), "with a system message it failed (no system role)"),
    "BOS": ("{{ bos_token }}" + CHATML, "it writes 'begin_of_text|><|im_start|>"),
    "a default system message": (WITH_SYSTEM, "with a question it writes 'system\\nSei Q."),
    "another format": ("{% for m in messages %}[INST] {{ m.content }} [/INST]{% endfor %}", "it writes '[INST] Che"),
    "tools of its own": (OTHER_TOOLS, "with tools it writes '# Tools["),
    "not Jinja": ("{% for %}", "with a question it failed ("),
    "no line break": (CHATML.replace(" + '\\n'}}", "}}{% if not loop.last %}\n{% endif %}"),
                      "with a question it writes '<|im_start|>assistant\\n' where chatml writes '\\n<|im_start|>"),
    "thinking": (CHATML.replace("assistant\\n'", "assistant\\n<think>\\n'"), "with a question it writes '<think>\\n'"),
}  # fmt: skip


@pytest.fixture
def instruct(whole_base, tmp_path):
    """A base with weights and a chat template: in a file of its own, or in tokenizer_config.json."""

    def make(template, key=None):
        folder = shutil.copytree(whole_base, tmp_path / "instruct", dirs_exist_ok=True)
        if key is None:
            (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
        else:
            config = json.loads((folder / "tokenizer_config.json").read_text())
            (folder / "tokenizer_config.json").write_text(json.dumps(config | {key: template}))
        return folder

    return make


def ready(folder, random_init=False, **chat):
    return chat_tokenizer(ModelSection(base=str(folder), random_init=random_init), ChatSection(**chat))


@pytest.mark.parametrize(
    ("template", "key", "bos", "notes"),
    [
        (CHATML, None, False, 0),
        (to_jinja(load_template("chatml")), None, False, 0),
        (to_jinja(load_template("chatml"), masks=True), "chat_template", False, 0),
        (LLAMA3, "chat_template", True, 1),
        ([{"name": "tool_use", "template": to_jinja(load_template("llama3"))}, {"name": "default", "template": LLAMA3}],
         "chat_template", True, 1),
    ],
    ids=["chatml", "ours", "ours, with masks", "llama3", "a list"],
)  # fmt: skip
def test_a_template_that_we_know_is_kept(instruct, template, key, bos, notes):
    chat = ready(instruct(template, key))
    assert (chat.template == load_template("llama3"), chat.template.bos) == (bos, bos)
    assert len(chat.notes) == notes
    assert all("chat.template: llama3" in note for note in chat.notes)


@pytest.mark.parametrize("kind", BROKEN)
def test_a_template_of_its_own_is_not_replaced_unsaid(instruct, kind):
    template, difference = BROKEN[kind]
    folder = instruct(template)
    with pytest.raises(RecipeError) as error:
        ready(folder)
    assert "instruct has its own chat template, and chatml would replace it" in str(error.value)
    assert difference in str(error.value)
    assert ready(folder, template="chatml").template == load_template("chatml"), "it is, where the recipe says so"
    assert ready(folder, random_init=True).template == load_template("chatml"), "nothing of it was learned"


@pytest.mark.parametrize(
    ("files", "spec", "said"),
    [
        ({"chat_template.jinja": CHATML, "additional_chat_templates/tool_use.jinja": OTHER_TOOLS}, None, "with tools"),
        ({"tokenizer_config.json": json.dumps({"chat_template": {"default": LLAMA3}})}, "llama3", ""),
        ({"tokenizer_config.json": json.dumps({"chat_template": [{"name": "rag", "template": BROKEN["BOS"][0]}]})},
         None, "it writes 'begin_of_text|>"),
        ({"chat_template.jinja": b"\xff\xfe"}, None, "its file cannot be read ("),
    ],
    ids=["a file for tools", "a mapping", "no default", "not UTF-8"],
)  # fmt: skip
def test_wherever_a_base_keeps_its_template(tmp_path, files, spec, said):
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    own = match_base_template(tmp_path, "<|begin_of_text|>")
    assert own.spec == spec
    assert said in own.difference


def test_a_default_system_message_that_the_recipe_has_too(instruct):
    folder = instruct(to_jinja(load_template("chatml"), "Sei Q."))
    with pytest.raises(RecipeError, match="it writes 'system"):
        ready(folder)
    assert ready(folder, default_system="Sei Q.").default_system == "Sei Q."


def test_every_verb_says_it_before_anything_is_done(instruct, tmp_path, talks, capsys):
    model = {"base": str(instruct(WITH_SYSTEM)), "random_init": False}
    some = recipe("sft", tmp_path / "run", [talks], model=model, train={"max_steps": 1}, evaluation=None)
    path = write_recipe(tmp_path / "r.yaml", some)
    for verb in ("check", "prepare", "train", "preview"):
        code, _, said = main_here(capsys, verb, path)
        assert (code, "chat.template" in said) == (2, True), verb
    assert not (tmp_path / "run").exists()
    assert main_here(capsys, "check", path, "--set", "chat.template=chatml")[0] == 0
    instruct(LLAMA3)
    assert "chat.template: llama3" in prepare_data(some).summary.warnings[0]


FAMILIES = {
    "qwen3": ("qwen3", "qwen3"), "qwen3_instruct": ("qwen3_instruct_2507", "qwen3_instruct"),
    "gemma3": ("gemma3", "gemma3"), "llama3": ("llama3", "llama3"), "llama3_1": ("llama3_1", None),
    "qwen2_5": ("qwen2_5", None),
    "phi3": ("phi3", None), "qwen3 with reasoning everywhere": ("qwen3_training", None),
}  # fmt: skip


@pytest.mark.parametrize(("file", "spec"), FAMILIES.values(), ids=FAMILIES)
def test_official_templates_are_recognised(tmp_path, file, spec):
    shutil.copy(Path(trl.__file__).parent / "chat_templates" / f"{file}.jinja", tmp_path / "chat_template.jinja")
    own = match_base_template(tmp_path, "<s>", eos="</s>")
    assert own.spec == spec
    assert bool(own.difference) == (spec is None)


@pytest.mark.parametrize("name", template_names("chat"))
def test_every_template_is_recognised_by_its_own_jinja(tmp_path, name):
    (tmp_path / "chat_template.jinja").write_text(to_jinja(load_template(name)), encoding="utf-8")
    assert match_base_template(tmp_path, "<s>", eos="</s>").spec == name


def test_a_date_is_named(instruct):
    dated = to_jinja(load_template("smollm3")).replace("08 July 2025", "' + strftime_now('%d %B %Y') + '")
    chat = ready(instruct(dated))
    assert chat.template == load_template("smollm3")
    assert "where that writes the current date, it writes a fixed one" in chat.notes[0]


def test_the_choices_are_named(instruct):
    with pytest.raises(
        RecipeError, match=r"set chat\.template to chatml, gemma3, llama3, mistral, qwen3, .*or to a file"
    ):
        ready(instruct(WITH_SYSTEM))


def test_init_names_what_becomes_of_it(instruct, tmp_path, talks, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for template, wanted, replaced in ((LLAMA3, "llama3", False), (WITH_SYSTEM, "chatml", True)):
        folder = instruct(template)
        code, _, said = main_here(capsys, "init", wanted, "--base", folder, "--data", talks)
        assert code == 0, said
        assert f"  template: {wanted}" in Path(f"{wanted}.yaml").read_text()
        assert ("replaces the base's own: with a question it writes" in said) == replaced
        assert ("# replaces that of the base" in Path(f"{wanted}.yaml").read_text()) == replaced


LOOPS = "{% for a in range(99999) %}" * 4 + "{% endfor %}" * 4
GROWS = "{% set n = namespace(x='0123456789') %}{% for i in range(30) %}{% set n.x = n.x + n.x %}{% endfor %}{{ n.x }}"
LIMITS = {
    LOOPS: r"did not finish within 1 s",
    GROWS: r"needed more than 512 MB of memory",  # ten gigabytes
    "{{ 'x' * 10000000000 }}": r"needed more than 512 MB of memory",
    "{% for i in range(3000) %}{{ '0123456789' * 1000 }}{% endfor %}": r"wrote more than 10,000,000 characters",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}": r"failed \(",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}": r"failed \(",
}


@pytest.mark.parametrize("template", LIMITS)
def test_limits_of_time_and_memory(template):
    with pytest.raises(ModelError, match=f"m: its chat template {LIMITS[template]}"):
        render_jinja(template, {}, "m", seconds=1.0 if template is LOOPS else 20.0)


def test_the_sandbox_renders_as_transformers_does():
    source = (
        "{%- if tools %}{{ tools | tojson(indent=2) }}{% endif %}\n  {% for m in messages %}\n{% if m.role == 'tool' %}"
        "{% continue %}{% endif %}{%- generation -%}{{ m['content'] }}{% endgeneration %}\n{% endfor %} {# none #}\n"
        "{{ strftime_now('%Y') }}{{ bos_token }}\n"
    )
    for conversation in {**SAMPLES, **TOOL_SAMPLES}.values():
        variables = _template_variables(conversation, "<s>")
        wanted, _ = render_jinja_template(
            [variables["messages"]], tools=variables["tools"], chat_template=source, bos_token="<s>",
            add_generation_prompt=True,
        )  # fmt: skip
        assert render_jinja(source, variables, "m") == wanted[0]
        plain = sandbox.without_generation_tags(source)
        assert sandbox.environment().from_string(plain).render(**variables) == wanted[0]


def test_no_template_no_question(whole_base):
    assert match_base_template(Path(whole_base), None) is None
