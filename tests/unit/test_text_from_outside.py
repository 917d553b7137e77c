"""Texts that others wrote stay texts on every page: nothing of them becomes markup, a link or a control character.

Each page is made twice: with a planted text in every place that takes a text from outside, and with as many `x`. Both
must have the same elements with the same attributes.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from markdown_it import MarkdownIt

from nemo_lmpo.evaluate.bootstrap import Interval
from nemo_lmpo.evaluate.result import BY_INSTRUCTION, Judge, Model, Result, Value, read_result, write_result
from nemo_lmpo.evaluate.suites import ALPACA_EVAL
from nemo_lmpo.export.card import build_card
from nemo_lmpo.pairs.candidate import Answered, AskedPrompt, Candidate
from nemo_lmpo.pairs.card import write_card
from nemo_lmpo.pairs.choose import choose_pairs
from nemo_lmpo.pairs.page import write_page as write_pairs_page
from nemo_lmpo.pairs.rules import parse_rule
from nemo_lmpo.pairs.statistics import statistics_of
from nemo_lmpo.paper.comparison.figures import measure_picture
from nemo_lmpo.paper.comparison.own_runs import write_own_page
from nemo_lmpo.paper.comparison.page import Comparison, write_page
from nemo_lmpo.paper.comparison.scales import TINY
from nemo_lmpo.paper.comparison.suites import FIGURE2, LMPO, SIMPO, Variant
from nemo_lmpo.paper.tables.page import write_tables
from nemo_lmpo.report import write_report
from nemo_lmpo.report.escape import visible
from nemo_lmpo.report.plots import Picture
from nemo_lmpo.report.read import read_run
from nemo_lmpo.report.samples import CHART
from tests.unit.report.runs import write_run

PLANTED = {
    "html": "<img src=http://evil.example/a onerror=alert(1)><script>fetch('//evil.example')</script>",
    "end of a block": "</pre></td></style></title><iframe src=//evil.example>",
    "attribute": '" onload="alert(1)" style="background:url(http://evil.example)',
    "picture": "![a](http://evil.example/a.png)",
    "link": "[click](javascript:alert(1)) [other][ref]",
    "definition": "[ref]: http://evil.example\n[ref]",
    "bare address": "http://evil.example/?q=secret and www.evil.example",
    "automatic link": "<http://evil.example>",
    "emphasis": "*a* **b** _c_ __d__ ~~e~~ `f` $g$",
    "cells": "a | b | c\\| d",
    "heading": "# a\n## b\n===\n---",
    "list": "- a\n+ b\n* c\n1. d",
    "quote": "> a\n>> b",
    "fences": "```\n~~~\n````\n<b>a</b>",
    "indented": "a\n\n    <b>b</b>\n\n\tc",
    "entities": "&lt;script&gt;&#106;avascript&colon;alert(1)",
    "backslashes": "\\<b>\\[a\\](http://evil.example)\\",
    "template": "{{ 7 * 7 }} {% raw %} {# a #} %}",
    "yaml": "a\n---\nlicense: mit\n...: &a *a",
    "terminal": "\x1b[31mred\x1b]8;;http://evil.example\x07click\x1b]8;;\x07\x9b2J\x00\x08\x7f",
    "forged line": "a\rerror: b\x0b\x0cc\x85d\u2028e\u2029f",
    "direction": "\u202egnp.exe\u2066\u200f",
    "half a pair": "a\ud800b\udfff",
}
Pages = Callable[[Path, str], list[Path]]


def report_pages(folder: Path, text: str) -> list[Path]:
    settings = {
        "name": text,
        "model": {"restore_from_path": text, "tokenizer": text},
        "data": {"train": {"path": [text, text]}, "validation": {"path": text}, "system_prompt": text},
        "loss": {"name": text, "margin": {"kind": text}},
        "checkpoint": {"monitor": f"val/{text}"},
        "optim": {"sched": {"name": text}},
    }
    # YAML has no halves of surrogate pairs, JSON has.
    config = re.sub(r"\\u[dD][89a-fA-F]..", "x", yaml.safe_dump(settings))
    run = write_run(folder, config=config, validate=(10, 20))
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 20, text: 1.0, f"val/{text}": 0.5}) + "\n")
    sample = {"step": 10, "prompt": text, "answer": text, "tokens": 3, "finished": False}
    (run / "samples.jsonl").write_text(json.dumps(sample) + "\n")
    stop = {"step": 40, "monitor": text, "best": 1.0, "without_better": 2}
    (run / "run.json").write_text(json.dumps({"total_steps": 50, "stopped_early": stop}))
    card = folder / "card.md"
    pictures = [("curves", "figures/curves.png")]
    card.write_text(build_card(read_run(run), text, text, pictures, [evaluated(folder / "evaluation", text)]))
    return [write_report(run), card]


def comparison_pages(folder: Path, text: str) -> list[Path]:
    one, two = (Variant(f"{text} {place}", method) for place, method in enumerate(("lmpo", "simpo")))
    claims = [dataclasses.replace(claim, text=text, source=text) for claim in FIGURE2.claims]
    again = [dataclasses.replace(claim, high=one, low=two, text=text) for claim in FIGURE2.claims]
    suite = dataclasses.replace(
        FIGURE2, title=text, about=text, variants=(one, two, LMPO, SIMPO), claims=(*claims, *again)
    )
    numbers = {"chosen": -1.0, "margin": 1.0, "length": 10.0}
    page = write_page(
        Comparison(
            scale=dataclasses.replace(TINY, name=text, about=text),
            suites=[suite],
            seeds=1,
            command=text,
            values={(one, 42): numbers, (two, 42): numbers},
            metrics={},
            settings={one: text},
            examples={one: [{"prompt": text, "answer": text}]},
            machine=text,
            missing=[text],
        ),
        folder,
    )
    return [page, page.with_suffix(".md")]


def evaluated(folder: Path, text: str, **row: str) -> Result:
    named: dict[str, Any] = {"setting": text, "method": text, "variant": text, **row}
    result = Result(
        suite=ALPACA_EVAL,
        model=Model(text, text, "run", **named),
        values={name: Value(1.0, 1.0, {BY_INSTRUCTION: Interval(0.5, 1.5)}) for name in ("lc", "wr", "length")},
        n=3,
        of=3,
        judge=Judge(text, {text: 3}, text, text),
        generation={"backend": text, "dtype": text, "temperature": text, text: text},
        packages={text: text},
        evaluation_set={"name": text, "sha256": text, "baseline": text},
        command=text,
        date=text,
        details={text: text},
    )
    write_result(folder, result, {"ids": [0], "wins": [1.0], "lengths": [1]})
    return read_result(folder)


def tables_pages(folder: Path, text: str) -> list[Path]:
    evaluated(folder / "a", text)
    evaluated(folder / "b", text, setting="mistral_7b_base", method="LMPO")
    page = write_tables([folder / "a", folder / "b"], folder)
    return [page, page.with_suffix(".md")]


def own_runs_pages(folder: Path, text: str) -> list[Path]:
    config = re.sub(
        r"\\u[dD][89a-fA-F]..", "x", yaml.safe_dump({"name": text, "loss": {"name": text}, "model": {"a": text}})
    )
    places = [folder / "one", folder / "two"]
    for place, seed in zip(places, (1, 2), strict=True):
        place.mkdir()
        run = write_run(place, config=f"{config}\nseed: {seed}", validate=(10, 20))
        with (run / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": 20, f"val/{text}": 0.5}) + "\n")
    page = write_own_page([next(iter(place.rglob("metrics.jsonl"))).parent for place in places], folder / "page", text)
    return [page, page.with_suffix(".md")]


def pairs_pages(folder: Path, text: str) -> list[Path]:
    asked = AskedPrompt(text, [{"role": "user", "content": text}])
    answers = [Candidate(str(place), 0, place, text + "y" * place, place + 1, True, float(place)) for place in range(3)]
    chosen = choose_pairs([Answered(asked, answers)] * 3, parse_rule("best-worst", None, 1), length_control=True)
    left_out = {text: 1}
    summary = {
        "models": [{"name": text, "weights_sha256": text, "template_sha256": text, "tokenizer_sha256": text}],
        "prompts": {"source": text, "split": text, "sha256": text},
        "sampling": {text: text},
        "seeds": [1, 2, 3],
        "scores": {text: text},
        "rule": {"text": text, "max_length_ratio": None, "length_control": True, "seed": None},
        "counts": {
            **{"prompts": 3, "answers": 9, "pairs": 3, "rows_left_out": left_out, "prompts_not_asked": left_out},
            **{"prompts_left_out": left_out, "answers_left_out": left_out},
        },
        "statistics": statistics_of(chosen),
        "packages": {text: text},
    }
    pictures = write_pairs_page(folder, text, summary, chosen)
    write_card(folder, text, "jsonl", summary, pictures)
    return [folder / "report.html", folder / "README.md"]


class Elements(HTMLParser):
    """Tags with attributes, in order, pictures by the kind of their address; and the texts."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[Any] = []
        self.texts: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        kept = [(name, "data:" if str(value).startswith("data:image/png;base64,") else value) for name, value in attrs]
        self.found.append((tag, [(name, "" if name in ("alt", "data-label") else value) for name, value in kept]))

    def handle_endtag(self, tag: str) -> None:
        self.found.append(f"/{tag}")

    def handle_comment(self, data: str) -> None:
        self.found.append(("comment", data))

    def handle_decl(self, decl: str) -> None:
        self.found.append(("declaration", decl))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def of_page(path: Path) -> Elements:
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        front, rest = text.split("\n---\n", 1) if text.startswith("---\n") else ("", text)
        assert not front or set(yaml.safe_load(front)) <= CARD_FIELDS
        text = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).render(rest)
    return Elements(text)


CARD_FIELDS = {
    *("library_name", "pipeline_tag", "tags", "model_name", "model-index", "datasets", "base_model"),
    *("task_categories", "source_datasets", "configs", "pretty_name"),  # of the card of pairs
}


MAKERS = [report_pages, comparison_pages, tables_pages, own_runs_pages, pairs_pages]


@pytest.fixture
def no_drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures are not part of these pages' markup, and take most of the time."""
    monkeypatch.setattr("nemo_lmpo.report.plots.draw_all", lambda runs, *charts: [Picture(CHART, b"png")])
    monkeypatch.setattr("nemo_lmpo.report.samples.draw_samples", lambda samples, run: Picture(CHART, b"png"))
    monkeypatch.setattr(
        "nemo_lmpo.paper.comparison.figures.measure_picture", lambda suite, values: Picture(CHART, b"png")
    )


@pytest.mark.usefixtures("no_drawing")
@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("name", PLANTED)
def test_planted_text_makes_nothing(make: Pages, name: str, tmp_path: Path) -> None:
    planted = PLANTED[name]
    # What splits lines in a page stays, so that both have as many.
    harmless = re.sub(r"[^\n]", "x", planted)
    (tmp_path / "planted").mkdir()
    (tmp_path / "harmless").mkdir()
    pages = zip(make(tmp_path / "planted", planted), make(tmp_path / "harmless", harmless), strict=True)
    for page, plain in pages:
        text = page.read_text(encoding="utf-8")
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", text), page.name
        found = of_page(page)
        assert found.found == of_page(plain).found, page.name
        shown, wanted = ("".join(text.split()) for text in ("".join(found.texts), visible(planted)))
        assert wanted in shown, f"{page.name} does not show it as it is"


@pytest.mark.parametrize("name", ["half a pair", "terminal"])
def test_labels_of_pictures_are_no_formulas(name: str) -> None:
    one = Variant(rf"$\frac$ {PLANTED[name]}", "lmpo")
    suite = dataclasses.replace(FIGURE2, variants=(one, SIMPO))
    numbers = {"chosen": -1.0, "margin": 1.0}
    assert measure_picture(suite, {(one, 42): numbers, (SIMPO, 42): numbers}) is not None


@pytest.mark.usefixtures("no_drawing")
def test_every_page_forbids_what_it_does_not_need(tmp_path: Path) -> None:
    for place, make in enumerate((report_pages, comparison_pages, tables_pages)):
        folder = tmp_path / str(place)
        folder.mkdir()
        for page in make(folder, "a"):
            if page.suffix == ".html":
                metas = [
                    dict(attrs)
                    for tag, attrs in (one for one in of_page(page).found if isinstance(one, tuple))
                    if tag == "meta"
                ]
                [policy] = [meta["content"] for meta in metas if meta.get("http-equiv") == "Content-Security-Policy"]
                rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
                assert rules.pop("default-src") == "'none'"
                assert rules == {
                    "img-src": "data:",
                    "style-src": "'unsafe-inline'",
                    "base-uri": "'none'",
                    "form-action": "'none'",
                }
