"""Tool calls are read leniently, and each category has its grader."""

import json
from pathlib import Path

import pytest

from nesso_tune.data.tools import read_tool_file
from nesso_tune.evaluation import agentic
from nesso_tune.evaluation.agentic import Call, parse_answer, parse_row, passes, passes_strictly
from nesso_tune.evaluation.prompts import read_prompts, tool_path
from nesso_tune.evaluation.runner import evaluate
from nesso_tune.evaluation.suites import SHIPPED_TOOLS, Suite, Task, load_suite, shipped_file

SHARED = next((p / "shared" / "data" for p in Path(__file__).parents if (p / "shared").is_dir()), Path("none"))
TASK = Task(kind="agentic", task="agentic", metrics=("passed",))
CASES = {case.id: case for case in read_prompts(TASK, parse_row)}
TOOLS = read_tool_file(shipped_file(SHIPPED_TOOLS))


def call(name, **arguments):
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments}, ensure_ascii=False)}\n</tool_call>"


TIMER = call("set_timer", minutes=12)
MILES, KILOS = (
    call("convert_units", value=5, from_unit="miglia", to_unit="km"),
    call("convert_units", value=80, from_unit="kg", to_unit="libbre"),
)
TABLE = {"restaurant": "Trattoria del Ponte", "people": 6, "day": "sabato", "time": "20:30"}
NOTE = call("add_note", text="basilico, pinoli, aglio, olio, parmigiano")

# (case, answer, passed, passed with arguments)
ANSWERS = [
    ("single-it", TIMER, True, True),
    ("single-it", f"Certo, lo faccio subito.\n{TIMER}", True, True),
    ("single-it", f"Sure, I will start it right away.\n{TIMER}", True, True),  # the right call, in the wrong language
    ("single-it", '{"name": "set_timer", "arguments": {"minutes": 12}}', True, True),  # bare JSON
    ("single-it", '```json\n{"name": "set_timer", "arguments": {"minutes": 12}}\n```', True, True),
    ("single-it", '<tool_call>{"name": "set_timer", "arguments": {"minutes": 12}}', True, True),  # not closed
    ("single-it", '<tool_call>{"name": "set_timer", "arguments": {"minutes": 12</tool_call>', True, False),  # bad JSON
    ("single-it", '<tool_call>\n{"name": "set_timer", arguments: minutes=12}\n</tool_call>', True, False),
    ("single-it", '{"name": "set_timer", "arguments": {"minutes": 12', True, False),
    ("single-it", call("set_timer", minutes=21), True, False),  # a wrong value
    ("single-it", call("set_timer", minutes="12"), True, False),  # of the wrong type
    ("single-it", call("set_timer", minutes=12, sound="gong"), True, False),  # no such argument
    ("single-it", call("set_timer"), True, False),  # a required argument is missing
    ("single-it", '<tool_call>{"name": "set_timer", "parameters": {"minutes": 12}}</tool_call>', True, True),
    ("single-it", '<tool_call>{"function": {"name": "set_timer", "arguments": "{\\"minutes\\": 12}"}}', True, True),
    ("single-it", TIMER + TIMER, False, False),  # an extra call
    ("single-it", f"{TIMER}\n{call('add_note', text='x')}", False, False),
    ("single-it", call("start_timer", minutes=12), False, False),  # no such tool
    ("single-it", "Ho fatto partire un timer di 12 minuti.", False, False),  # only said
    ("single-it", "", False, False),
    ("single-it", "<tool_call>\nset_timer(12)\n</tool_call>", False, False),
    ("single-it", '{"minutes": 12}', False, False),
    ("single-en", call("library_search", query="Italo Calvino"), True, True),
    ("single-en", call("find_recipe", dish="Italo Calvino"), False, False),
    ("par_same-it", f"{MILES}\n{KILOS}", True, True),
    ("par_same-it", "[" + ",".join(c.split("\n")[1] for c in (MILES, KILOS)) + "]", True, True),  # a bare list
    ("par_same-it", "<tool_call>" + "\n".join(c.split("\n")[1] for c in (MILES, KILOS)), True, True),  # one block
    ("par_same-it", MILES, False, False),
    ("par_same-it", f"{MILES}{KILOS}{KILOS}", False, False),
    ("par_same-en", call("set_timer", minutes=4) + call("set_timer", minutes=9), True, True),
    ("par_same-en", call("set_timer", minutes=4) + call("set_timer", minutes=8), True, False),
    ("par_diff-it", call("find_recipe", dish="ribollita") + call("set_timer", minutes=40), True, True),
    ("par_diff-it", call("set_timer", minutes=40) + call("find_recipe", dish="ribollita"), True, True),
    ("par_diff-it", call("find_recipe", dish="ribollita") * 2, False, False),
    ("par_diff-en", call("add_note", text="stamps"), False, False),
    ("disamb-it", call("convert_units", value=300, from_unit="g", to_unit="oz"), True, True),
    ("disamb-it", call("convert_units", value=30, from_unit="g", to_unit="oz"), True, False),
    ("disamb-it", call("find_recipe", dish="300 grammi"), False, False),
    ("disamb-it", "Circa 10,6 once.", False, False),
    ("multiarg-it", call("reserve_table", **TABLE), True, True),
    ("multiarg-it", call("reserve_table", **TABLE | {"people": "6"}), True, False),
    ("multiarg-it", call("reserve_table", **TABLE | {"people": 5}), True, False),
    ("multiarg-it", call("reserve_table", restaurant="Trattoria del Ponte", people=6, time="20:30"), False, False),
    ("multiarg-it", '<tool_call>{"name": "reserve_table", "arguments": {"restaurant"</tool_call>', False, False),
    ("multiarg-en", call("send_message", phone="555 0142", text="I will be ten minutes late."), True, True),
    ("multiarg-en", call("send_message", phone="555 0124", text="I will be ten minutes late."), True, False),
    ("missing-it", "Qual è il numero di tua sorella?", True, True),
    ("missing-it", call("send_message", phone="", text="Arrivo domani"), True, True),
    ("missing-it", call("send_message", phone="333 1234567", text="Arrivo domani"), False, False),
    ("missing-it", call("send_message", text="Arrivo domani"), True, False),  # not made up, but no valid call
    ("missing-en", call("reserve_table", restaurant="Golden Fork", people=2, time="20:00"), False, False),
    ("missing-en", "For how many people?", True, True),
    ("unavail-it", "Mi dispiace, non posso muovere le tapparelle.", True, True),
    ("unavail-it", call("add_note", text="tapparelle"), False, False),
    ("unavail-en", call("order_shoes", size=43), False, False),
    ("unavail-en", "", True, True),
    ("notool-it", "Il contrario di freddo è caldo.", True, True),
    ("notool-it", "Il contrario di freddo è tiepido.", True, False),
    ("notool-it", "", False, False),
    ("notool-it", "…", False, False),
    ("notool-it", call("library_search", query="freddo"), False, False),
    ("notool-en", "Eight.", True, True),
    ("obs-it", "Il primo treno parte alle 5:47.", True, True),
    ("obs-it", "The first train leaves at 05:47.", True, True),
    ("obs-it", "Il primo treno parte presto.", False, False),
    ("obs-it", call("search_trains", from_station="Pisa", to_station="Lucca"), False, False),
    ("obs-en", "Yes, on shelf l-212.", True, True),
    ("obs-en", f"Shelf L-212 {call('add_note', text='L-212')}", False, False),
    ("multistep-it", NOTE, True, True),
    ("multistep-it", f"Ecco: {NOTE}", True, True),
    ("multistep-it", call("find_recipe", dish="pesto"), False, False),
    ("multistep-it", "Ho salvato gli ingredienti.", False, False),
    ("multistep-en", call("send_message", phone="555 0199", text="14:12"), True, True),
]  # fmt: skip


def test_there_are_enough_answers():
    assert len(ANSWERS) >= 60
    assert {CASES[case].category for case, *_ in ANSWERS} == set(agentic.GRADERS)


@pytest.mark.parametrize(("case", "answer", "passed", "strict"), ANSWERS)
def test_verdicts(case, answer, passed, strict):
    parsed = parse_answer(answer)
    assert passes(CASES[case], parsed) == passed
    assert passes_strictly(CASES[case], parsed, TOOLS) == strict


def test_the_text_around_calls_is_kept():
    parsed = parse_answer(f"Prima. {TIMER} Dopo.")
    assert parsed.calls == (Call("set_timer", {"minutes": 12}),)
    assert parsed.text.split() == ["Prima.", "Dopo."]
    assert parse_answer("Un testo con {graffe} e [parentesi].").calls == ()
    assert parse_answer('Il campo "name" contiene "Mario".').calls == ()


def test_shipped_cases():
    assert len(CASES) == 20
    assert len({(case.category, case.language) for case in CASES.values()}) == 20


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"cat": "singel"}, "unknown category `singel`"),
        ({"spec": {"n": 1}}, "tools"),
        ({"lang": "1"}, "unknown language"),
    ],
)
def test_faulty_cases_are_named(write_rows, change, says):
    row = {"id": "a", "lang": "IT", "cat": "single", "messages": [{"role": "user", "content": "x"}],
           "spec": {"tools": ["set_timer"], "n": 1}} | change  # fmt: skip
    file = write_rows([row, {"other": "format"}], "cases.jsonl")
    with pytest.raises(Exception, match=f"cases.jsonl:1.*{says}"):
        read_prompts(TASK.model_copy(update={"data": file}), parse_row)


def test_a_file_with_cases_and_other_rows(tmp_path, write_rows):
    case = {"id": "a", "lang": "EN", "cat": "unavail", "messages": [{"role": "user", "content": "x"}], "spec": " "}
    one = tmp_path / "cases.json"
    one.write_text(json.dumps({"cases": [case, case]}))
    assert len(read_prompts(TASK.model_copy(update={"data": str(one)}), parse_row)) == 2
    mixed = write_rows([{"conversations": []}, case], "mixed.jsonl")
    assert len(read_prompts(TASK.model_copy(update={"data": mixed}), parse_row)) == 1


def test_the_suite_runs_on_a_model(chat_model):
    (result,) = evaluate([str(chat_model)], load_suite("agentic"))
    metrics = result.metrics
    assert len(metrics["agentic/passed"].scores) == 20
    assert len(metrics["agentic/passed/it"].scores) == len(metrics["agentic/passed/en"].scores) == 10
    assert set(load_suite("agentic").metric_names) <= set(metrics)
    assert [answer.passed for answer in result.tasks["agentic"].answers] == [
        bool(score) for score in metrics["agentic/passed"].scores
    ]


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data are not here")
def test_the_shared_cases_run_on_a_model(chat_model):
    task = {"kind": "agentic", "task": "group", "metrics": ["passed"], "data": str(SHARED / "toolcall.jsonl"),
            "tools": str(SHARED / "toolcall_nesso_tools.json"), "max_new_tokens": 8}  # fmt: skip
    suite = Suite.model_validate({"title": "t", "tasks": [task]})
    cases = read_prompts(suite.tasks[0], parse_row)
    assert len(cases) == 50
    assert len(read_tool_file(tool_path(suite.tasks[0]))) == 9
    (result,) = evaluate([str(chat_model)], suite)
    assert len(result.metrics["group/passed"].scores) == 50
