"""The data report: everything counted is shown, nothing private is, and it opens offline."""

import json
from html.parser import HTMLParser

import pytest

from nesso_tune import DPORecipe, SFTRecipe, prepare_data
from nesso_tune.reports.data_report import write_data_report

VOID = {"meta", "rect", "br"}


class Page(HTMLParser):
    """A page's text, and whether its tags are balanced."""

    def __init__(self, html):
        super().__init__()
        self.open, self.text, self.kinds = [], [], set()
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.kinds.add(tag)
        if tag not in VOID and tag != "text":
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID and tag != "text":
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)

    @property
    def said(self):
        return " ".join(" ".join(self.text).split())


@pytest.fixture
def report(base, tmp_path):
    """Writes the report of sources; returns its JSON and its page."""

    def write(*sources, method="sft", **data):
        recipe = (SFTRecipe if method == "sft" else DPORecipe).model_validate(
            {"output_dir": str(tmp_path / "run"), "model": {"base": base},
             "data": {"sequence_len": 256, "validation_size": 0, "sources": list(sources), **data}}
        )  # fmt: skip
        prepared = prepare_data(recipe)
        before = json.dumps(prepared.report)
        html = write_data_report(tmp_path / "run", recipe, prepared).read_text()
        assert json.dumps(prepared.report) == before
        assert "http" not in html
        assert "<script" not in html
        assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["data_report.html", "data_report.json"]
        return json.loads((tmp_path / "run" / "data_report.json").read_text()), Page(html), prepared

    return write


def test_what_is_counted_is_shown(report, write_rows, chats):
    odd = {
        "messages": [{"role": "user", "content": "A\xa0?"}, {"role": "assistant", "content": "<script>{{x}}</script>"}]
    }
    unusable = {"messages": [{"role": "narrator", "content": "x"}, {"role": "assistant", "content": "y"}]}
    found, page, prepared = report({"path": write_rows([*chats, odd, unusable]), "alias": "chats"}, validation_size=2)
    examples = found.pop("examples")
    assert found == prepared.report
    assert {example["language"] for example in examples} == {"it", "en", "und"}
    assert all(example["source"] == "chats" and "<|im_start|>assistant" in example["text"] for example in examples)
    for said in ("11 of 12 rows kept", "unknown role", "a role that is not known", "rows.jsonl:12", "no break space",
                 "template placeholder", "source chats", "language it", "2 rows are held out",
                 "<script>{{x}}</script>"):  # fmt: skip
        assert said in page.said, said
    assert "svg" in page.kinds


def test_pairs_with_their_figures(report, pairs):
    found, page, _ = report({"path": pairs}, method="dpo")
    assert {"prompt", "chosen", "rejected"} <= set(found["examples"][0])
    assert "of the preferences can be predicted from answer length alone" in page.said
    assert "warns from 0.7" in page.said


def test_nothing_of_a_private_source_is_in_it(report, write_rows, chats, tmp_path):
    secret = [said_by(f"Segreto {i}\xa0?", "Zitto.") for i in range(4)]
    broken = {"messages": [{"role": "segretissimo", "content": "x"}]}
    hidden = {"path": write_rows([*secret, secret[0], broken], "riservato.jsonl"), "alias": "nascosto", "private": True}
    mixture = {"by": "source", "shares": {"nascosto": 0.5, "other": 0.5}}
    found, page, _ = report({"path": write_rows(chats)}, hidden, mixture=mixture)
    both = json.dumps(found, ensure_ascii=False) + page.said
    for word in ("egreto", "Zitto", "riservato", "nascosto", "segretissimo"):
        assert word not in both, word
    assert found["sources"][1]["path"] == "private source 2"
    assert found["sources"][1]["rows"] == 5
    assert "private source 2" in page.said


def test_the_smallest_report(report, write_rows):
    found, page, _ = report({"path": write_rows([{"prompt": "a", "response": "b"}])})
    assert found["rows_kept"] == 1
    assert "None were found." in page.said


def test_a_later_report_takes_the_place_of_an_earlier(report, write_rows, chats):
    report({"path": write_rows(chats)})
    found, page, _ = report({"path": write_rows(chats[:3])})
    assert found["rows_kept"] == 3
    assert "3 of 3 rows kept" in page.said


class Strict(HTMLParser):
    """Every tag that is opened is closed, in order; nothing refers to anything outside."""

    def __init__(self, html):
        super().__init__()
        self.open, self.images = [], []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        assert not {"src", "href", "onclick", "onload"} & dict(attrs).keys()
        if tag == "svg":
            self.images.append(dict(attrs))
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        assert self.open[-1] == "svg", "only drawings have tags that close themselves"

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture
def html(tmp_path):
    return lambda: (tmp_path / "run" / "data_report.html").read_text(encoding="utf-8")


def said_by(*turns, lang="it"):
    """A conversation of user and assistant in turn."""
    roles = ["user", "assistant"] * len(turns)
    return {"messages": [{"role": r, "content": t} for r, t in zip(roles, turns, strict=False)], "lang": lang}


@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_the_page_is_well_formed_and_its_drawings_speak(report, html, write_rows, chats, pairs, method):
    report({"path": pairs if method == "dpo" else write_rows(chats)}, method=method, validation_size=2)
    page = Strict(html())
    assert len(page.images) == 2, "one for each language"
    assert all(i["role"] == "img" and "sequence_len is 256" in i["aria-label"] for i in page.images)
    assert '<html lang="en">' in html()
    assert "prefers-color-scheme: dark" in html()


def test_text_of_the_data_cannot_become_markup(report, html, write_rows, tmp_path):
    rows = [said_by(f"</div><script>alert({i})</script>", '"><img src=x>', lang='i"><b>') for i in range(5)]
    unknown = {"messages": [{"role": "<script>", "content": "x"}, {"role": "assistant", "content": "y"}]}
    found, _, _ = report({"path": write_rows([*rows, unknown], "<b>rows.jsonl"), "alias": "<i>alias"})
    Strict(html())
    assert "&lt;script&gt;alert(" in html()
    for markup in ("<script", "<img", "<b>rows", "<i>alias"):
        assert markup not in html()
    assert "<script>" in found["examples_of_dropped"]["unknown_role"]


def test_what_cannot_be_seen_is_written_out(report, html, write_rows):
    report({"path": write_rows([said_by("Ciao\u202e\x00!", "S\u200bì.")])})
    assert "Ciao\\u202e\\x00!" in html()
    assert not {"\u202e", "\x00", "\u200b"} & set(html())


def test_reasons_have_counts_shares_and_examples(report, html, write_rows, chats):
    rows = [*chats, chats[0], said_by("Lungo?", "parola " * 400), said_by("Vuoto?", " ")]
    found, page, _ = report({"path": write_rows(rows)}, clean={"duplicates": "drop"})
    assert found["dropped"] == {"empty_answer": 1, "too_long": 1, "duplicate": 1}
    for line in ("kept 10 · 76.9%", "too long 1 · 7.7% longer than data.sequence_len e.g.", "rows.jsonl:12: ",
                 "duplicate 1 · 7.7%", "rows.jsonl:11: of ", "empty answer 1 · 7.7%"):  # fmt: skip
        assert line in page.said, line


def test_a_long_text_is_cut_and_no_row_is_shown_twice(report, write_rows):
    rows = [said_by(f"Domanda {i}?", "sì " * 250) for i in range(4)]
    source = {"path": write_rows(rows), "weight": 5.0}
    found, page, prepared = report(source, sequence_len=2048)
    examples = found["examples"]
    assert all(len(example["text"]) == 601 and example["text"].endswith("…") for example in examples)
    assert len({example["place"] for example in examples}) == len(examples) == 3
    first = prepared.train.documents.place(prepared.train.entries[0])
    assert examples[0]["place"] == first
    assert "rows there rows drawn" in page.said
    assert report(source, sequence_len=2048)[0]["examples"] == examples, "the same rows every time"


def test_examples_of_pairs_are_whole(report, write_rows, duels):
    found, page, prepared = report({"path": write_rows(duels)}, method="dpo")
    example = found["examples"][0]
    assert example["tokens"] == sum(
        map(len, (prepared.train[0][f"{part}_ids"] for part in ("prompt", "chosen", "rejected")))
    )
    assert example["chosen"].startswith("Sì, la risposta è")
    assert example["rejected"].startswith("Boh.")
    assert "Domanda" in example["prompt"]
    assert "prompt" in page.said
    assert "not packed" in page.said


@pytest.fixture
def duels():
    """Pairs whose answers tell by their length which one is chosen; one of them contradicts another."""
    pair = {"prompt": "Domanda?", "chosen": "Sì, la risposta è questa.", "rejected": "Boh.", "lang": "it"}
    numbered = [{**pair, "prompt": f"Domanda {i}?", "chosen": f"Sì, la risposta è {i}."} for i in range(6)]
    return [pair, *numbered, {**pair, "chosen": "Boh.", "rejected": "Sì, la risposta è questa."}]


def test_figures_of_pairs_beyond_a_limit_stand_out(report, html, write_rows, duels):
    found, page, _ = report({"path": write_rows(duels)}, method="dpo")
    figures = found["preferences"]
    assert (figures["length_predicts"], figures["conflicting"]) == (0.875, 0.25)
    assert html().count('<tr class="over">') == 3
    assert "⚠ warns from 0.7" in page.said
    assert "88% of the preferences can be predicted from answer length alone (the longer is chosen)" in page.said
    assert f"conflicting: {figures['conflicting_examples'][0]}" in page.said
    limits = {
        "length_predicts": {"warn": None},
        "length_ratio": {"warn": 90, "fail": 99},
        "conflicting": {"warn": None},
    }
    _, page, _ = report({"path": write_rows(duels)}, method="dpo", preferences=limits)
    assert "no limit" in page.said
    assert "warns from 90, fails from 99" in page.said
    assert '<tr class="over">' not in html()


def hides(found, html, *words):
    text = json.dumps(found, ensure_ascii=False) + html
    for word in words:
        assert word not in text, word


@pytest.mark.parametrize("asked", ["folder", "glob", "nested glob", "file"])
def test_a_private_source_that_a_public_folder_holds_stays_hidden(report, html, write_rows, chats, tmp_path, asked):
    (tmp_path / "all" / "riservato").mkdir(parents=True)
    write_rows([said_by("Chiaro?", " "), *chats], "all/chiaro.jsonl")
    secret = write_rows([said_by(f"Segreto {i}\xa0?", "Zitto.") for i in range(3)], "all/riservato/cose.jsonl")
    folder = tmp_path / "all" / "riservato"
    paths = {"folder": folder, "glob": folder / "c*.jsonl", "nested glob": tmp_path / "all" / "ris*" / "**" / "*.jsonl"}
    private = {"path": str(paths.get(asked, secret)), "private": True}
    found, page, _ = report({"path": str(tmp_path / "all")}, private, validation_size=0)
    hides(found, html(), "riservato", "Segreto", "Zitto")
    assert found["oddities"] == {"no_break_space": {"rows": 6}}
    assert len(found["examples"]) == 6
    assert "chiaro.jsonl:1" in found["examples_of_dropped"]["empty_answer"], "what is public is shown"
    assert "private source 2" in page.said


def test_neither_a_warning_nor_a_detail_names_a_private_row(report, html, write_rows, chats):
    rows = [said_by("<|im_start|>?", f"Zitto {i}.") for i in range(8)]
    hidden = {"path": write_rows([*rows, chats[0]], "riservato.jsonl"), "alias": "nascosto", "private": True}
    found, page, prepared = report(hidden, {"path": write_rows(chats)}, clean={"duplicates": "drop"})
    assert any("riservato" in warning for warning in prepared.report["warnings"]), "there is something to hide"
    assert "riservato" in prepared.report["examples_of_dropped"]["duplicate"]
    hides(found, html(), "riservato", "nascosto", "Zitto")
    assert "spell control tokens" in page.said
    assert found["dropped"] == {"duplicate": 1}
    assert found["sources"][0]["path"] == "private source 1"


def test_pairs_and_groups_of_a_private_source_stay_hidden(report, html, write_rows, duels, pairs):
    hidden = {"path": write_rows(duels, "riservato.jsonl"), "alias": "nascosto", "private": True,
              "rules": {"it": {"weight": 2.0}}}  # fmt: skip
    found, _, prepared = report({"path": pairs}, hidden, method="dpo")
    assert prepared.report["preferences"]["conflicting_examples"]
    hides(found, html(), "riservato", "nascosto", "Boh.")
    assert "private source 2 it" in {group["name"] for group in found["mixture"]}
    assert found["preferences"]["conflicting_examples"] == []


def test_only_private_data_shows_no_row(report, html, write_rows, chats):
    found, page, _ = report({"path": write_rows(chats, "riservato.jsonl"), "private": True})
    hides(found, html(), "riservato", "capitale", "Rome")
    assert found["examples"] == []
    assert "Rows of private sources are not shown." in page.said
    assert "10 of 10 rows kept" in page.said


def test_what_cannot_be_replaced_is_an_error_that_leaves_nothing_behind(base, write_rows, chats, tmp_path):
    recipe = SFTRecipe.model_validate(
        {
            "output_dir": str(tmp_path / "run"),
            "model": {"base": base},
            "data": {"sources": [{"path": write_rows(chats)}]},
        }
    )
    blocked = tmp_path / "out" / "data_report.html" / "inside"
    blocked.mkdir(parents=True)
    with pytest.raises(OSError, match="directory"):
        write_data_report(tmp_path / "out", recipe, prepare_data(recipe))
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["data_report.html", "data_report.json"]
