"""`evaluate tables`: the paper's tables with what was measured beside what was published, and verdicts on claims."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from nemo_lmpo.errors import DataError
from nemo_lmpo.evaluate.result import RESULT_FILE, Result, read_result
from nemo_lmpo.evaluate.suites import LEADERBOARD, TITLES
from nemo_lmpo.paper.tables.cells import Judges, measured_cell
from nemo_lmpo.paper.tables.claims import Results
from nemo_lmpo.paper.tables.published import PUBLISHED_JUDGE, TABLE3_COLUMNS
from nemo_lmpo.paper.tables.sections import anchors, table1, table2, table3, table4
from nemo_lmpo.report.blocks import Block, Details, Heading, Table, Text, to_html, to_markdown
from nemo_lmpo.runtime.files import content_hash, replace_file

TITLE = "The paper's tables, published and measured"
PAGE, MARKDOWN = "tables.html", "tables.md"


def write_tables(folders: Sequence[Path], output: Path) -> Path:
    """Write `tables.html` and `tables.md`; returns the former.

    Raises:
        DataError: a result cannot be read, lacks something, or there is none.
    """
    results = Results(read_results(folders))
    blocks = page_blocks(results)
    output.mkdir(parents=True, exist_ok=True)
    replace_file(output / MARKDOWN, to_markdown(blocks))
    replace_file(output / PAGE, to_html(TITLE, blocks))
    return output / PAGE


def read_results(folders: Sequence[Path]) -> list[Result]:
    """Results in the folders given and those right below; without any given, in `evals/*`.

    Raises:
        DataError: none is there, or one is not usable.
    """
    given = list(folders) or [path for path in sorted(Path("evals").glob("*")) if path.is_dir()]
    found = []
    for folder in given:
        if folder.is_file():
            continue  # `evals/*` has the page itself
        if not folder.is_dir():
            raise DataError(f"{folder} is not a directory; give folders of evaluations")
        places = [folder, *sorted(path for path in folder.iterdir() if path.is_dir())]
        found += [place for place in places if (place / RESULT_FILE).exists()]
    if not found:
        looked = ", ".join(map(str, given)) or "evals/*"
        raise DataError(f"no {RESULT_FILE} in {looked}; evaluate a model first, see docs/evaluation.md")
    return [read_result(folder) for folder in dict.fromkeys(found)]


def page_blocks(results: Results) -> list[Block]:
    """The whole page."""
    judges = Judges(results.all)
    blocks: list[Block] = [Heading(1, TITLE), *map(Text, _about(results, judges))]
    blocks += anchors(results, judges)
    for build in (table1, table2, table3, table4):
        blocks += build(results, judges)
    return [*blocks, *_others(results, judges), *_provenance(results)]


def _about(results: Results, judges: Judges) -> list[str]:
    lines = [
        f"Published numbers were judged by {PUBLISHED_JUDGE}, which is no longer served, so a measured cell cannot be "
        "compared with the published one beside it. What can be compared are differences between models under one "
        "judge: a claim is shown (contradicted) if the 95 % interval of the paired difference, by resampling "
        "instructions, lies on its side of zero (on the other), and undecided otherwise. Sampling answers again, other "
        "training seeds and other judges are not in that interval. Many claims are judged, so one in twenty comes out "
        "by chance.",
        *judges.lines(),
    ]
    if results.several():
        lines.append(f"More than one result: {'; '.join(results.several())}. The newest whole one is shown.")
    return lines


def _others(results: Results, judges: Judges) -> list[Block]:
    """Results that stand for no row: neither anchors nor of a known setting and method."""
    others = [
        result for result in results.all if result.model.kind != "anchor" and not results.stands_for_a_row(result)
    ]
    rows = [
        [
            f"{result.model.name}, {TITLES[result.suite]}",
            *(measured_cell(result, one, judges) for one in TABLE3_COLUMNS),
        ]
        for result in others
        if result.suite != LEADERBOARD
    ]
    if not rows:
        return []
    return [Heading(2, "Other models"), Table(["", "LC %", "WR %", "length"], rows)]


def _provenance(results: Results) -> list[Block]:
    """Everything that a reader must know of each result."""
    rows, commands = [], []
    for result in results.all:
        generation = result.generation
        sampled = ", ".join(f"{key} {generation[key]}" for key in ("temperature", "top_p", "seed") if key in generation)
        rows.append(
            [
                f"{result.model.name}, {TITLES[result.suite]}",
                f"{result.n} of {result.of}" if result.of >= 0 else f"{result.n} (a trial)",
                f"{result.unparsed} / {result.truncated} / {result.empty}",
                f"{generation.get('backend')}, {generation.get('dtype', '')}, {sampled}".strip(", "),
                _short(result.model.weights_sha256),
                _short(content_hash([result.model.template_sha256, result.model.tokenizer_sha256])),
                _short(result.evaluation_set["sha256"])
                + (" (own)" if result.evaluation_set.get("published") == "no" else ""),
                result.date,
            ]
        )
        commands.append(result.command)
    header = (
        *("", "instructions", "no verdict / cut off / empty", "answers by", "weights", "template and tokenizer"),
        *("set", "date"),
    )
    packages = sorted({f"{name} {version}" for result in results.all for name, version in result.packages.items()})
    return [
        Heading(2, "Where the numbers come from"),
        Table(header, rows, style="settings"),
        Details("Commands", commands),
        Details("Packages", packages),
    ]


def _short(digest: str | None) -> str:
    return digest[:10] if digest else ""
