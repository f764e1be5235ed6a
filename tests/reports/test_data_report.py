"""The data report is complete and self-contained, and hides private sources."""

import json
from html.parser import HTMLParser

import pytest

from nesso_tune import DPORecipe, SFTRecipe, prepare_data
from nesso_tune.cli.data import tables
from nesso_tune.reports.data_report import write_data_report


class Page(HTMLParser):
    """A parsed page: its text, tags and plots. Tags must be balanced and must not refer to other files or servers."""

    def __init__(self, html):
        super().__init__()
        self.open, self.text, self.tags, self.plots = [], [], set(), []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        assert not {"src", "href", "onclick", "onload"} & dict(attrs).keys()
        self.tags.add(tag)
        if tag == "svg":
            self.plots.append(dict(attrs))
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        assert self.open[-1] == "svg", "only SVG elements are self-closing"

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)

    @property
    def visible_text(self):
        return " ".join(" ".join(self.text).split())


@pytest.fixture
def report(base, tmp_path):
    """A function that writes the report on some sources and returns its JSON, page and prepared data."""

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


def test_all_figures_are_shown(report, write_rows, chats):
    odd = {
        "messages": [{"role": "user", "content": "A\xa0?"}, {"role": "assistant", "content": "<script>{{x}}</script>"}]
    }
    unusable = {"messages": [{"role": "narrator", "content": "x"}, {"role": "assistant", "content": "y"}]}
    found, page, prepared = report({"path": write_rows([*chats, odd, unusable]), "alias": "chats"}, validation_size=2)
    examples = found.pop("examples")
    assert found == prepared.report
    assert {example["language"] for example in examples} == {"it", "en", "und"}
    assert all(example["source"] == "chats" and "<|im_start|>assistant" in example["text"] for example in examples)
    for text in ("11 of 12 rows kept", "unknown role", "map it with the source's `roles`", "rows.jsonl:12",
                 "no break space", "template placeholder", "source chats", "language it", "2 validation rows",
                 "<script>{{x}}</script>"):  # fmt: skip
        assert text in page.visible_text, text
    assert "svg" in page.tags


def test_pairs_with_their_figures(report, pairs):
    found, page, _ = report({"path": pairs}, method="dpo")
    assert {"prompt", "chosen", "rejected"} <= set(found["examples"][0])
    assert "of the preferences can be predicted from answer length alone" in page.visible_text
    assert "warns from 0.7" in page.visible_text


def test_private_sources_are_hidden(report, write_rows, chats, tmp_path):
    secret = [dialogue(f"Segreto {i}\xa0?", "Zitto.") for i in range(4)]
    broken = {"messages": [{"role": "segretissimo", "content": "x"}]}
    hidden = {"path": write_rows([*secret, secret[0], broken], "riservato.jsonl"), "alias": "nascosto", "private": True}
    mixture = {"by": "source", "shares": {"nascosto": 0.5, "other": 0.5}}
    found, page, _ = report({"path": write_rows(chats)}, hidden, mixture=mixture)
    both = json.dumps(found, ensure_ascii=False) + page.visible_text
    for word in ("egreto", "Zitto", "riservato", "nascosto", "segretissimo"):
        assert word not in both, word
    assert found["sources"][1]["path"] == "private source 2"
    assert found["sources"][1]["rows"] == 5
    assert "private source 2" in page.visible_text


def test_the_smallest_report(report, write_rows):
    found, page, _ = report({"path": write_rows([{"prompt": "a", "response": "b"}])})
    assert found["rows_kept"] == 1
    assert "No anomalies found." in page.visible_text


def test_a_later_report_replaces_an_earlier_one(report, write_rows, chats):
    report({"path": write_rows(chats)})
    found, page, _ = report({"path": write_rows(chats[:3])})
    assert found["rows_kept"] == 3
    assert "3 of 3 rows kept" in page.visible_text


@pytest.fixture
def html(tmp_path):
    return lambda: (tmp_path / "run" / "data_report.html").read_text(encoding="utf-8")


def dialogue(*turns, lang="it"):
    """A conversation with alternating user and assistant turns."""
    roles = ["user", "assistant"] * len(turns)
    return {"messages": [{"role": r, "content": t} for r, t in zip(roles, turns, strict=False)], "lang": lang}


@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_the_page_is_well_formed_and_its_plots_have_text_alternatives(report, html, write_rows, chats, pairs, method):
    _, page, _ = report({"path": pairs if method == "dpo" else write_rows(chats)}, method=method, validation_size=2)
    assert len(page.plots) == 2, "one per language"
    assert all(i["role"] == "img" and "sequence_len is 256" in i["aria-label"] for i in page.plots)
    assert '<html lang="en">' in html()
    assert "prefers-color-scheme: dark" in html()


def test_text_from_the_data_is_escaped(report, html, write_rows, tmp_path):
    rows = [dialogue(f"</div><script>alert({i})</script>", '"><img src=x>', lang='i"><b>') for i in range(5)]
    unknown = {"messages": [{"role": "<script>", "content": "x"}, {"role": "assistant", "content": "y"}]}
    found, _, _ = report({"path": write_rows([*rows, unknown], "<b>rows.jsonl"), "alias": "<i>alias"})
    assert "&lt;script&gt;alert(" in html()
    for markup in ("<script", "<img", "<b>rows", "<i>alias"):
        assert markup not in html()
    assert "<script>" in found["examples_of_dropped"]["unknown_role"]


def test_invisible_characters_are_escaped(report, html, write_rows):
    report({"path": write_rows([dialogue("Ciao\u202e\x00!", "S\u200bì.")])})
    assert "Ciao\\u202e\\x00!" in html()
    assert not {"\u202e", "\x00", "\u200b"} & set(html())


def test_every_source_has_examples_and_lengths_say_what_fits(report, write_rows, chats):
    long = [{"messages": [{"role": "user", "content": "conta"}, {"role": "assistant", "content": "uno due " * n}]}
            for n in (150, 400)]  # fmt: skip
    sources = [
        {"path": write_rows(chats, "first.jsonl"), "alias": "first"}, {"path": write_rows(chats[:3], "second.jsonl")},
        {"path": write_rows(long, "long.jsonl"), "alias": "long"},
    ]  # fmt: skip
    found, page, data = report(*sources, sequence_len=512)
    assert {example["source"] for example in found["examples"]} == {"first", sources[1]["path"], "long"}
    whole = {int(limit): of["rows"] for limit, of in found["whole_rows"].items()}
    lengths = [len(ids) for ids in map(data.train.documents.input_ids, range(len(data.train.documents)))]
    rows = found["rows_read"]
    assert found["dropped"]["too_long"] == 1
    assert whole[512] == sum(length <= 512 for length in lengths) == rows - 1
    assert list(whole) == [256 * 2**i for i in range(len(whole))]
    assert max(whole.values()) == whole[max(whole)] == rows
    assert "512 (of the recipe)" in page.visible_text
    assert f"{(rows - 1) / rows:.1%} into 512, " in "\n".join(tables(data.summary))


def test_reasons_have_counts_shares_and_examples(report, html, write_rows, chats):
    rows = [*chats, chats[0], dialogue("Lungo?", "parola " * 400), dialogue("Vuoto?", " ")]
    found, page, _ = report({"path": write_rows(rows)}, clean={"duplicates": "drop"})
    assert found["dropped"] == {"empty_answer": 1, "too_long": 1, "duplicate": 1}
    for line in ("kept 10 · 76.9%", "too long 1 · 7.7% longer than data.sequence_len e.g.", "rows.jsonl:12: ",
                 "duplicate 1 · 7.7%", "rows.jsonl:11: of ", "empty answer 1 · 7.7%"):  # fmt: skip
        assert line in page.visible_text, line


def test_a_long_text_is_cut_and_no_row_is_shown_twice(report, write_rows):
    rows = [dialogue(f"Domanda {i}?", "sì " * 250) for i in range(4)]
    source = {"path": write_rows(rows), "weight": 5.0}
    found, page, prepared = report(source, sequence_len=2048)
    examples = found["examples"]
    assert all(len(example["text"]) == 601 and example["text"].endswith("…") for example in examples)
    assert len({example["place"] for example in examples}) == len(examples) == 3
    first = prepared.train.documents.location(prepared.train.records[0])
    assert examples[0]["place"] == first
    assert "rows available rows sampled" in page.visible_text
    assert report(source, sequence_len=2048)[0]["examples"] == examples, "the same rows every time"


def test_examples_of_pairs_are_whole(report, write_rows, opposing_pairs):
    found, page, prepared = report({"path": write_rows(opposing_pairs)}, method="dpo")
    example = found["examples"][0]
    assert example["tokens"] == sum(
        map(len, (prepared.train[0][f"{part}_ids"] for part in ("prompt", "chosen", "rejected")))
    )
    assert example["chosen"].startswith("Sì, la risposta è")
    assert example["rejected"].startswith("Boh.")
    assert "Domanda" in example["prompt"]
    assert "prompt" in page.visible_text
    assert "not packed" in page.visible_text


@pytest.fixture
def opposing_pairs():
    """Pairs in which the longer answer is chosen, except for one that contradicts another."""
    pair = {"prompt": "Domanda?", "chosen": "Sì, la risposta è questa.", "rejected": "Boh.", "lang": "it"}
    numbered = [{**pair, "prompt": f"Domanda {i}?", "chosen": f"Sì, la risposta è {i}."} for i in range(6)]
    return [pair, *numbered, {**pair, "chosen": "Boh.", "rejected": "Sì, la risposta è questa."}]


def test_checks_beyond_a_limit_are_highlighted(report, html, write_rows, opposing_pairs):
    found, page, _ = report({"path": write_rows(opposing_pairs)}, method="dpo")
    figures = found["preferences"]
    assert (figures["length_predicts"], figures["conflicting"]) == (0.875, 0.25)
    assert html().count('<tr class="over">') == 3
    assert "⚠ warns from 0.7" in page.visible_text
    assert (
        "88% of the preferences can be predicted from answer length alone (the longer is chosen)" in page.visible_text
    )
    assert f"conflicting: {figures['conflicting_examples'][0]}" in page.visible_text
    limits = {
        "length_predicts": {"warn": None},
        "length_ratio": {"warn": 90, "fail": 99},
        "conflicting": {"warn": None},
    }
    _, page, _ = report({"path": write_rows(opposing_pairs)}, method="dpo", preferences=limits)
    assert "no limit" in page.visible_text
    assert "warns from 90, fails from 99" in page.visible_text
    assert '<tr class="over">' not in html()


def assert_hidden(found, html, *words):
    text = json.dumps(found, ensure_ascii=False) + html
    for word in words:
        assert word not in text, word


@pytest.mark.parametrize("kind", ["folder", "glob", "nested glob", "file"])
def test_a_private_source_that_a_public_folder_holds_stays_hidden(report, html, write_rows, chats, tmp_path, kind):
    (tmp_path / "all" / "riservato").mkdir(parents=True)
    write_rows([dialogue("Chiaro?", " "), *chats], "all/chiaro.jsonl")
    secret = write_rows([dialogue(f"Segreto {i}\xa0?", "Zitto.") for i in range(3)], "all/riservato/cose.jsonl")
    folder = tmp_path / "all" / "riservato"
    paths = {"folder": folder, "glob": folder / "c*.jsonl", "nested glob": tmp_path / "all" / "ris*" / "**" / "*.jsonl"}
    private = {"path": str(paths.get(kind, secret)), "private": True}
    found, page, _ = report({"path": str(tmp_path / "all")}, private, validation_size=0)
    assert_hidden(found, html(), "riservato", "Segreto", "Zitto")
    assert found["oddities"] == {"no_break_space": {"rows": 6}}
    assert len(found["examples"]) == 6
    assert "chiaro.jsonl:1" in found["examples_of_dropped"]["empty_answer"], "places in public files are shown"
    assert "private source 2" in page.visible_text


def test_neither_a_warning_nor_a_detail_names_a_private_row(report, html, write_rows, chats):
    rows = [dialogue("<|im_start|>?", f"Zitto {i}.") for i in range(8)]
    hidden = {"path": write_rows([*rows, chats[0]], "riservato.jsonl"), "alias": "nascosto", "private": True}
    found, page, prepared = report(hidden, {"path": write_rows(chats)}, clean={"duplicates": "drop"})
    assert any("riservato" in warning for warning in prepared.summary.warnings), "named before redaction"
    assert "riservato" in prepared.summary.examples_of_dropped["duplicate"]
    assert_hidden(found, html(), "riservato", "nascosto", "Zitto")
    assert "contain control tokens" in page.visible_text
    assert found["dropped"] == {"duplicate": 1}
    assert found["sources"][0]["path"] == "private source 1"


def test_pairs_and_groups_of_a_private_source_stay_hidden(report, html, write_rows, opposing_pairs, pairs):
    hidden = {"path": write_rows(opposing_pairs, "riservato.jsonl"), "alias": "nascosto", "private": True,
              "rules": {"it": {"weight": 2.0}}}  # fmt: skip
    found, _, prepared = report({"path": pairs}, hidden, method="dpo")
    assert prepared.report["preferences"]["conflicting_examples"]
    assert_hidden(found, html(), "riservato", "nascosto", "Boh.")
    assert "private source 2 it" in {group["name"] for group in found["mixture"]}
    assert found["preferences"]["conflicting_examples"] == []


def test_only_private_data_shows_no_row(report, html, write_rows, chats):
    found, page, _ = report({"path": write_rows(chats, "riservato.jsonl"), "private": True})
    assert_hidden(found, html(), "riservato", "capitale", "Rome")
    assert found["examples"] == []
    assert "Rows of private sources are not shown." in page.visible_text
    assert "10 of 10 rows kept" in page.visible_text


def test_a_failed_write_leaves_no_temporary_file(base, write_rows, chats, tmp_path):
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
