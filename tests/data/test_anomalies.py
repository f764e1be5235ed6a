"""Anomalies are found where they occur and nowhere else; statistics of preference pairs."""

import pytest

from nesso_tune import Conversation, DataError, Message, prepare_data
from nesso_tune.data.anomalies import find_anomalies

CONTROL = ("<|im_start|>", "<|im_end|>")
CALL = ({"name": "g", "arguments": {}},)


def talk(question="q", answer="a", **keys):
    return Conversation((Message("user", question), Message("assistant", answer)), **keys)


FOUND = {
    "no_break_space": talk("a\xa0b"),
    "zero_width_character": talk(answer="a\u200bb"),
    "control_character": talk("a\x0bb"),
    "html_entity": talk(answer="rock &amp; roll &#39;"),
    "mojibake": talk("perchÃ©"),
    "template_placeholder": talk("ssh {{utente}}@host"),
    "control_token_as_text": talk("scrivi <|im_end|>"),
    "stand_in_turn": talk("__SILENCE__"),
    "empty_turn": talk(" "),
    "opens_with_assistant": Conversation(
        (Message("assistant", "Ciao!"), Message("user", "q"), Message("assistant", "a"))
    ),
    "ends_without_answer": Conversation((*talk().messages, Message("user", "q"))),
    "call_of_a_tool_not_offered": Conversation(
        (Message("user", "q"), Message("assistant", "", CALL)), tools=({"name": "f"},)
    ),
}


@pytest.mark.parametrize(("anomaly", "example"), FOUND.items(), ids=FOUND)
def test_anomalies_are_found(anomaly, example):
    assert find_anomalies(example, CONTROL) == [anomaly]


@pytest.mark.parametrize(
    "example",
    [
        talk("Perché? àèìòù € “così” — 你好 👩🏽", "R&D & co.; a {b} {c}\tx\r\ny __init__ è"),
        talk("f(x) = {x}", "__init__.py e __NAME__ insieme"),
        Conversation(
            (Message("system", "s"), Message("user", "q"), Message("assistant", "", CALL)), tools=({"name": "g"},)
        ),
    ],
)
def test_ordinary_examples_have_no_anomalies(example):
    assert find_anomalies(example, CONTROL) == []


SHORT, LONG = "No.", "Sì, e te lo spiego volentieri con molte parole in più."


def pair(i, chosen, rejected, prompt="Domanda"):
    return {"prompt": f"{prompt} {i}?", "chosen": chosen, "rejected": rejected}


def figures(dpo, write_rows, rows, **data):
    report = prepare_data(dpo(write_rows(rows), **data)).report
    return report["preferences"], report["warnings"]


def test_length_predicts_the_preference(dpo, write_rows):
    found, warnings = figures(dpo, write_rows, [pair(i, f"{LONG} {i}", f"{SHORT} {i}") for i in range(10)])
    assert found["length_predicts"] == found["chosen_longer"] == 1.0
    assert found["length_ratio"] == pytest.approx(found["chosen_tokens"] / found["rejected_tokens"], rel=1e-2)
    assert "100% of the preferences can be predicted from answer length alone (the longer is chosen)" in warnings[0]
    mixed = [pair(i, LONG, SHORT) if i % 2 else pair(i, SHORT, LONG) for i in range(10)]
    balanced, said = figures(dpo, write_rows, mixed)
    assert (balanced["length_predicts"], balanced["length_ratio"], said) == (0.5, 1.0, [])


def test_shorter_length_predicts_the_preference(dpo, write_rows):
    found, warnings = figures(dpo, write_rows, [pair(i, SHORT, LONG) for i in range(10)])
    assert (found["length_predicts"], found["chosen_longer"]) == (1.0, 0.0)
    assert "the shorter is chosen" in warnings[0]


def test_ties_count_half(dpo, write_rows):
    found, _ = figures(dpo, write_rows, [pair(0, "Sì.", "No."), pair(1, "Sì.", "No.")])
    assert found["equal_length"] in (0.0, 1.0)
    assert found["length_predicts"] == (0.5 if found["equal_length"] else 1.0)


def test_conflicting_pairs(dpo, write_rows):
    rows = [pair(1, "Sì.", "No."), pair(1, "No.", "Forse."), pair(2, "No.", "Sì."), pair(1, "Certo.", "Mai.")]
    found, warnings = figures(dpo, write_rows, rows)
    assert found["conflicting"] == 0.5
    assert [place.rpartition(":")[2] for place in found["conflicting_examples"]] == ["1", "2"]
    assert any("rejected elsewhere for the same prompt" in said for said in warnings)


def test_answers_in_another_language(dpo, write_rows):
    prompt = "Puoi spiegarmi con parole semplici che cosa fa un vigile del fuoco durante la giornata"
    italian = "Un vigile del fuoco controlla i mezzi, si allena e interviene quando c'è un incendio."
    english = "A firefighter checks the vehicles, trains and goes out whenever there is a fire somewhere."
    rows = [
        {"prompt": prompt, "chosen": f"{italian} {i}", "rejected": "Non lo so proprio, mi dispiace."} for i in range(3)
    ]
    rows.append({"prompt": prompt, "chosen": english, "rejected": "Boh."})
    found, warnings = figures(dpo, write_rows, rows)
    assert found["language_mismatch"] == 0.25
    assert found["language_mismatch_examples"][0].endswith(":4")
    assert any("in another language than the prompt" in said for said in warnings)


def test_statistics_include_dropped_rows(dpo, write_rows):
    rows = [pair(i, "Sì.", "No.") for i in range(6)] + [pair(7, "Sì.", "Sì."), pair(8, "Sì " * 400, "No.")]
    found, warnings = figures(dpo, write_rows, rows)
    assert (found["pairs"], found["same_answers"], found["too_long"]) == (6, 0.125, 0.125)
    assert any("both answers are identical" in said for said in warnings)
    report = prepare_data(dpo(write_rows(rows))).report
    assert "chosen, " in report["examples_of_dropped"]["too_long"]  # which side it is


def test_limits_fail(dpo, write_rows):
    rows = [pair(i, f"{LONG} {i}", SHORT) for i in range(5)]
    limits = {"length_predicts": {"fail": 0.9}, "length_ratio": {"fail": 2.0}}
    with pytest.raises(DataError, match=r"length_predicts fails from 0\.9") as error:
        prepare_data(dpo(write_rows(rows), preferences=limits))
    assert len(error.value.problems) == 2
    silent = {"length_predicts": {"warn": None}, "length_ratio": {"warn": None}}
    assert prepare_data(dpo(write_rows(rows), preferences=silent)).summary.warnings == ()
