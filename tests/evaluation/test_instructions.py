"""Verifiable instructions: Italian answers that follow them and that do not, and the verdicts of lm-eval in English."""

import json
import re
import unicodedata
from pathlib import Path

import pytest

pytest.importorskip("nltk")
pytest.importorskip("punkt")

from nesso_tune.evaluation.ifeval import parse_row
from nesso_tune.evaluation.instructions import CHECKS, is_followed, is_followed_loosely
from nesso_tune.evaluation.punkt import count_sentences, provide_punkt
from nesso_tune.evaluation.suites import shipped_file

ENGLISH = next(
    (p / "shared/data/ifeval_en.jsonl" for p in Path(__file__).parents if (p / "shared").is_dir()), Path("none")
)
LONG_IT = "La biblioteca del paese apre ogni mattina alle nove e chiude quando fa buio, anche d'inverno."
LONG_EN = "The library of the village opens every morning at nine and closes when it gets dark, even in winter."
NFD = unicodedata.normalize("NFD", "Vivo in città perché mi piace.")

# kind: arguments, answers that follow, answers that do not
CASES = {
    "keywords:existence": (
        {"keywords": ["città", "perché"]},
        ["Vivo in città perché mi piace.", "CITTÀ? PERCHÉ NO!", NFD, "Le città… perché?"],
        ["Vivo in citta perche mi piace.", "Vivo in città.", "Perché?", "La citta' è bella perche' sì."],
    ),
    "keywords:frequency": (
        {"keyword": "è", "frequency": 2, "relation": "at least"},
        ["È vero che è tardi.", "È, È", "Lui è qui, lei è là.", "e\u0300 e\u0300"],
        ["È tardi.", "E tu e io e lui.", "Perché e poiché", "e' e' e'"],
    ),
    "keywords:forbidden_words": (
        {"forbidden_words": ["perché", "l'acqua"]},
        ["Il perchè sbagliato non conta.", "Bevo acqua.", "Una pozza d'acqua", "Nulla di che."],
        ["Perché no?", "Bevo l'acqua.", "Bevo l’acqua.", "PERCHÉ"],
    ),
    "keywords:letter_frequency": (
        {"letter": "a", "let_frequency": 3, "let_relation": "at least"},
        ["banana", "la città è là", "Anna va", "ÀÀÀ"],
        ["città", "Anno", "eee", "è là"],
    ),
    "language:response_language": (
        {"language": "it"},
        [LONG_IT, LONG_IT.upper(), f"{LONG_IT}\n```\nprint('hello world')\n```", "Ok."],
        [LONG_EN, LONG_EN.upper(), "La bibliothèque du village ouvre chaque matin à neuf heures, même en hiver.",
         "Die Bibliothek des Dorfes öffnet jeden Morgen um neun Uhr und schließt am Abend."],
    ),
    "length_constraints:number_sentences": (
        {"num_sentences": 3, "relation": "at least"},
        ["Piove. Tira vento. Fa freddo.", "Il sig. Rossi è qui. Chi è? È il mio vicino!", "Uno! Due! Tre!",
         "Ha detto: «Vengo». Poi è uscito. Non è tornato."],
        ["Piove. Tira vento.", "Il dott. Rossi e il sig. Bianchi sono amici.", "Compro pane, latte ecc. e torno.",
         "L'art. 3 e l'art. 4 della legge valgono ancora."],
    ),
    "length_constraints:number_paragraphs": (
        {"num_paragraphs": 2},
        ["Uno.\n***\nDue.", "Uno. *** Due.", "***\nUno.\n***\nDue.\n***", "Uno.\n***\nDue.\n***"],
        ["Uno.", "Uno.\n\nDue.", "Uno.\n***\nDue.\n***\nTre.", "Uno.\n***\n***\nDue."],
    ),
    "length_constraints:number_words": (
        {"num_words": 5, "relation": "less than"},
        ["Quattro parole bastano qui.", "L'acqua è buona.", "Sì.", "Perché no?"],
        ["Queste sono proprio cinque parole.", "L'acqua dell'isola è", "un po' d'acqua e", "1 2 3 4 5"],
    ),
    "length_constraints:nth_paragraph_first_word": (
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "l'Italia"},
        ["Uno.\n\nL'Italia è lunga.", "Uno.\n\nL’Italia, certo.", "Uno.\n\n«L'Italia» è un nome.",
         "Uno.\n\n**L'Italia** ."],
        ["L'Italia.\n\nUno.", "Uno.\n\nItalia.", "Uno.\n\nL'Italiano.", "Uno.\n\nL'Italia.\n\nTre."],
    ),
    "detectable_content:number_placeholders": (
        {"num_placeholders": 2},
        ["[nome] abita a [città].", "[a][b]", "[nome], [nome] e [via]", "Caro [nome],\n[testo]"],
        ["[nome]", "(nome) e (città)", "nessuno", "{nome} [città]"],
    ),
    "detectable_content:postscript": (
        {"postscript_marker": "P.S."},
        ["Ciao.\nP.S. Ti scrivo presto.", "Ciao.\n\nP. S. A presto", "Ciao.\nPS: chiamami", "Ciao.\n p.s. sì"],
        ["Ciao.", "Ciao. Post scriptum: niente", "Passo e chiudo.\nPsicologia", "Poscritto: sì"],
    ),
    "detectable_format:number_bullet_lists": (
        {"num_bullets": 2},
        ["* Uno\n* Due", "- Uno\n- Due", "Ecco:\n  * Uno\n  - Due", "* Uno\nancora uno\n* Due"],
        ["* Uno", "* Uno\n* Due\n* Tre", "1. Uno\n2. Due", "• Uno\n• Due"],
    ),
    "detectable_format:constrained_response": (
        {},
        ["La mia risposta è sì.", "La mia risposta è no.", "La mia risposta è forse.", "Certo. La mia risposta è sì."],
        ["Sì.", "La mia risposta è si.", "la mia risposta è no.", "My answer is yes."],
    ),
    "detectable_format:number_highlighted_sections": (
        {"num_highlights": 2},
        ["*Uno* e *due*", "**Uno** e **due**", "*è così*\n*perché sì*", "**Uno**, *due*, *tre*"],
        ["*Uno*", "Uno e due", "_Uno_ e _due_", "** ** e *  *"],
    ),
    "detectable_format:multiple_sections": (
        {"section_spliter": "Sezione", "num_sections": 2},
        ["Sezione 1\nUno\nSezione 2\nDue", "Sezione 1 uno Sezione 2 due", "Sezione 1: a\nSezione 2: b\nSezione 3: c",
         "# Sezione 1\n\n# Sezione 2"],
        ["Sezione 1\nUno", "SEZIONE 1\nSEZIONE 2", "Section 1\nSection 2", "Sezione A\nSezione B"],
    ),
    "detectable_format:json_format": (
        {},
        ['{"età": 3}', '```json\n{"nome": "Àgata"}\n```', "[1, 2]", '```\n"è"\n```'],
        ["{età: 3}", "Ecco: {}", "{'nome': 'Agata'}", '{"nome": "Agata",}'],
    ),
    "detectable_format:title": (
        {},
        ["<<Notte>>\nTesto", "Testo <<L'alba è qui>>", "<< a >>", "<<È>>"],
        ["<Notte>", "«Notte»", "<<>>", "<<una\nriga>>"],
    ),
    "combination:two_responses": (
        {},
        ["Sì.******No.", "Uno\n******\nDue", "******Uno******Due", "Uno ****** Due ******"],
        ["Sì.******Sì.", "Uno***Due", "Uno******Due******Tre", "Uno******"],
    ),
    "combination:repeat_prompt": (
        {"prompt_to_repeat": "Perché l'acqua è salata?"},
        ["Perché l'acqua è salata? Per i sali.", "perché l'acqua è salata?", "PERCHÉ L'ACQUA È SALATA?\nSì",
         "Perché l’acqua è salata? Non so."],
        ["Per i sali.", "Perche l'acqua è salata? Sì", "Ecco: perché l'acqua è salata?", "Perché l'acqua salata?"],
    ),
    "startend:end_checker": (
        {"end_phrase": "E così è."},
        ["Fine. E così è.", "e COSÌ è.", '"Fine. E così è."', "Fine.\nE così è.  "],
        ["E così è. Fine.", "E cosi è.", "E così è", "E così è!"],
    ),
    "startend:quotation": (
        {},
        ['"Ciao."', "«Ciao, come va?»", "“Ciao”", ' "Ciao" '],
        ["Ciao", '"Ciao', "«Ciao\"", "'Ciao'"],
    ),
    "change_case:capital_word_frequency": (
        {"capital_frequency": 2, "capital_relation": "at least"},
        ["ATTENZIONE: PERICOLO", "La CITTÀ è BELLA", "L'ACQUA è SALATA", "NON si PUÒ"],
        ["Attenzione", "È l'una. È tardi. A me piace.", "CITTÀ", "A B C"],
    ),
    "change_case:italian_capital": (
        {},
        [LONG_IT.upper(), "PERCHÉ LA CITTÀ È BELLA E SI VIVE BENE.", "SÌ.", "QUESTA RISPOSTA È IN MAIUSCOLO, 123."],
        [LONG_IT, "PERCHé LA CITTà è BELLA.", LONG_EN.upper(), "123"],
    ),
    "change_case:italian_lowercase": (
        {},
        [LONG_IT.lower(), "perché la città è bella e si vive bene.", "sì.", "è così, dappertutto e sempre"],
        [LONG_IT, "È così.", LONG_EN.lower(), "123"],
    ),
    "change_case:english_capital": (
        {},
        [LONG_EN.upper(), "I WOULD LIKE SOME SOUP AND BREAD FOR DINNER, PLEASE.", "YES.",
         "THE SUMMER IS THE SEASON THAT I LIKE BEST."],
        [LONG_EN, LONG_IT.upper(), "I Would Like", "123"],
    ),
    "change_case:english_lowercase": (
        {},
        [LONG_EN.lower(), "i would like some soup and bread for dinner, please.", "yes.",
         "the summer is the season that i like best."],
        [LONG_EN, LONG_IT.lower(), "Yes.", "123"],
    ),
    "punctuation:no_comma": (
        {},
        ["Pane e latte.", "Uno; due: tre!", "È così.", "1.5"],
        ["Pane, latte", "1,5", ",", "Sì, certo."],
    ),
}  # fmt: skip


def test_every_kind_has_cases():
    assert set(CASES) == set(CHECKS)
    assert all(len(good) >= 4 <= len(bad) for _, good, bad in CASES.values())


@pytest.mark.parametrize("kind", CASES)
def test_italian_answers(kind):
    arguments, good, bad = CASES[kind]
    assert [a for a in good if not is_followed(kind, arguments, a, "it")] == []
    assert [a for a in bad if is_followed(kind, arguments, a, "it")] == []
    assert not is_followed(kind, arguments, "  \n", "it"), "an empty answer follows nothing"


def test_the_prefix_and_the_italian_relations_are_understood():
    assert is_followed("it:length_constraints:number_words", {"num_words": 2, "relation": "almeno"}, "due parole", "it")
    with pytest.raises(ValueError, match="unknown relation `circa`"):
        is_followed("length_constraints:number_words", {"num_words": 2, "relation": "circa"}, "due", "it")


def test_loose_verdicts_ignore_introductions_and_asterisks():
    text = "Certo! Ecco la risposta:\nLA CITTÀ È BELLA"
    assert not is_followed("change_case:italian_capital", {}, text, "it")
    assert is_followed_loosely("change_case:italian_capital", {}, text, "it")
    assert is_followed_loosely("startend:end_checker", {"end_phrase": "fine."}, "È la **fine.**", "it")


def test_sentences_of_both_languages():
    assert count_sentences("Il dott. Rossi arriva alle 9.30. Poi parte.", "italian") == 2
    assert count_sentences("Mr. Smith arrives at 9.30. Then he leaves.", "english") == 2


def test_shipped_prompts_are_valid_and_use_every_kind():
    rows = [json.loads(line) for line in shipped_file("ifeval_it.jsonl").read_text(encoding="utf-8").splitlines()]
    prompts = [parse_row(row) for row in rows]
    assert len(prompts) >= 40
    assert len({prompt.prompt for prompt in prompts}) == len(prompts)
    assert {name for prompt in prompts for name, _ in prompt.instructions} == set(CHECKS)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"instruction_id_list": ["keywords:existance"]}, "unknown instruction `keywords:existance`"),
        ({"kwargs": []}, "1 instructions, but 0 kwargs"),
        ({"kwargs": [{}]}, "keywords"),
    ],
)
def test_faulty_rows(change, says):
    row = {"prompt": "p", "instruction_id_list": ["keywords:existence"], "kwargs": [{"keywords": ["a"]}]} | change
    with pytest.raises((KeyError, ValueError), match=re.escape(says)):
        parse_row(row)


# English: the verdicts of lm-eval

BY_DETECTOR = ("language:response_language", "change_case:english_capital", "change_case:english_lowercase")
FIXED = [
    "",
    "# Title\n\n<<A title>>\n\n* A point, *highlight* and **bold**.\n* Another point\n- third [name]\n\n"
    "SECTION 1\nHello [address], I'd say Mr. Smith went to the U.S. on Monday. Did he? Yes!\n\nP.S. Me.\nP.P.S. So",
    '```json\n{"a": [1, 2, "three"]}\n```',
    '"THIS IS ALL CAPITALS AND MY ANSWER IS IN QUOTES."',
    "First paragraph here.\n***\nSecond paragraph.\n***\nThird paragraph.\n******\nOther response. "
    + "word " * 400 + "\nIs there anything else I can help with?",
]  # fmt: skip


@pytest.mark.skipif(not ENGLISH.is_file(), reason="the shared data are not here")
def test_english_verdicts_are_those_of_lm_eval():
    provide_punkt("english")
    utils = pytest.importorskip("lm_eval.tasks.ifeval.utils")
    rows = [json.loads(line) for line in ENGLISH.read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 541
    compared, different = 0, []
    for row in rows:
        given = [(n, k) for n, k in zip(row["instruction_id_list"], row["kwargs"], strict=True) if n not in BY_DETECTOR]
        # for a letter that is none, `#` or `!`, lm-eval draws a random one
        given = [(n, k) for n, k in given if k.get("letter", "a").isalpha()]
        texts = [str(value) for _, k in given for values in k.values() for value in as_list(values)]
        for answer in [*FIXED, f"{row['prompt']}\nHere it is. {' '.join(texts)}"]:
            example = utils.InputExample(row["key"], [n for n, _ in given], row["prompt"], [dict(k) for _, k in given])
            strict = utils.test_instruction_following_strict(example, answer).follow_instruction_list
            loose = utils.test_instruction_following_loose(example, answer).follow_instruction_list
            for (name, k), *theirs in zip(given, strict, loose, strict=True):
                repeated = {"prompt_to_repeat": row["prompt"]} if name.endswith("repeat_prompt") else {}
                ours = [f(name, {**repeated, **k}, answer, "en") for f in (is_followed, is_followed_loosely)]
                compared += 1
                if ours != [bool(verdict) for verdict in theirs]:
                    different.append((row["key"], name, answer[:40]))
    assert compared > 4000
    assert different == []


def as_list(value):
    return value if isinstance(value, list) else [value]
