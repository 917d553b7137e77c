"""The page of tables: every published number, marks of errata, commands for what is missing."""

from __future__ import annotations

import csv
from html.parser import HTMLParser
from pathlib import Path

import pytest

from nemo_lmpo.errors import DataError
from nemo_lmpo.evaluate.result import Value
from nemo_lmpo.evaluate.suites import ALPACA_EVAL, COLUMNS, LEADERBOARD
from nemo_lmpo.paper.tables.cells import kept_columns
from nemo_lmpo.paper.tables.claims import Results
from nemo_lmpo.paper.tables.page import page_blocks, read_results, write_tables
from nemo_lmpo.paper.tables.published import ERRATA, TABLE1, TABLE2, TABLE3, TABLE4
from tests.unit.paper.test_differences import leaderboard, made


def paper(shared_dir: Path, name: str) -> list[dict[str, str]]:
    path = shared_dir / "evaluation" / "paper_tables" / f"{name}.csv"
    if not path.exists():
        pytest.skip("the folder `shared` has no tables of the paper")
    with path.open() as file:
        return list(csv.DictReader(file))


def test_published_numbers_are_the_papers(shared_dir: Path) -> None:
    columns = {"lc": "ae2_lc", "wr": "ae2_wr", "length": "ae2_length", "arena_wr": "ah_wr", "arena_length": "ah_length"}
    rows = paper(shared_dir, "table1")
    assert len(rows) == len(TABLE1)
    for row in rows:
        ours = TABLE1[row["setting"], row["method"]]
        assert ours == {name: float(row[column]) for name, column in columns.items()}
    for row, ours_ in zip(paper(shared_dir, "table2"), TABLE2, strict=True):
        assert [ours_.wr, ours_.low, ours_.high, ours_.length] == [
            float(row[name]) for name in ("ah_wr", "ci_low", "ci_high", "ah_length")
        ]
    for row, ours_3 in zip(paper(shared_dir, "table3"), TABLE3, strict=True):
        assert [ours_3.value, ours_3.lc, ours_3.wr, ours_3.error, ours_3.length] == [
            float(row[name]) for name in ("lambda", "ae2_lc", "ae2_wr", "ae2_std", "ae2_length")
        ]
    for row in paper(shared_dir, "table4"):
        ours = TABLE4[row["setting"], row["method"]]
        assert [ours[name] for name in COLUMNS] == [float(row[name]) for name in COLUMNS]
        assert ours["rank"] == float(row["avg_rank_published"])


def test_recomputed_ranks_follow_from_the_rows() -> None:
    for setting in {setting for setting, _ in TABLE4}:
        rows = {method: row for (one, method), row in TABLE4.items() if one == setting}
        for row in rows.values():
            ranks = [1 + sum(other[name] > row[name] for other in rows.values()) for name in COLUMNS]
            assert sum(ranks) / len(COLUMNS) == pytest.approx(row["rank recomputed"])


def test_errata_about_sums_are_right() -> None:
    for setting, total in (("llama3_8b_base", 32.1), ("llama3_8b_instruct", 31.2)):
        assert sum(row["rank"] for (one, _), row in TABLE4.items() if one == setting) == pytest.approx(total)
        assert any(str(total) in erratum.text for erratum in ERRATA if erratum.setting == setting)


class Cells(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.inside = False

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag == "tr":
            self.rows.append([])
        self.inside = tag in ("td", "th")
        if self.inside:
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        self.inside = False

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.rows[-1][-1] += data


def test_a_page_with_two_models(tmp_path: Path) -> None:
    ids = list(range(30))
    for method, size in (("LMPO", 1300), ("SimPO", 1700)):
        units = {"ids": ids, "wins": [40.0] * 30, "lengths": [size + index for index in ids], "lc_replicates": []}
        made(
            tmp_path / method / "alpaca_eval",
            ALPACA_EVAL,
            units,
            row=("mistral_7b_base", method, None),
            wr=40.0,
            length=size + 14.5,
        )
    page = write_tables([tmp_path / "LMPO", tmp_path / "SimPO"], tmp_path / "out")
    cells = Cells()
    cells.feed(page.read_text())
    row = next(row for row in cells.rows if row[0] == "LMPO")
    assert row[1:7] == ["20.9", "", "14.9", "40.0", "1351", "1314"]
    assert next(row for row in cells.rows if row[0] == "SFT")[1] == "6.2ᵃ"
    claim = next(row for row in cells.rows if row[0] == "LMPO answers shorter than SimPO")
    assert claim[2:4] == ["shown", "452.0"]
    assert claim[4].startswith("+400 [+400, +400]")
    markdown = (tmp_path / "out" / "tables.md").read_text()
    assert "--row mistral_7b_base/DPO --judge-endpoint URL" in markdown
    assert "| LMPO | 20.9 |  | 14.9 | 40.0 | 1351 | 1314 |" in markdown
    assert "runs/lmpo_mistral_7b_base --row mistral_7b_base/LMPO --judge-endpoint URL" in markdown  # Arena-Hard


def test_ten_tasks_stand_below_the_papers(tmp_path: Path) -> None:
    for method, shift in (("LMPO", 0.2), ("SimPO", 0.0)):
        leaderboard(tmp_path / method / LEADERBOARD, method, shift)
    page = write_tables([tmp_path / "LMPO", tmp_path / "SimPO"], tmp_path / "out")
    cells = Cells()
    cells.feed(page.read_text())
    ours = next(row for row in cells.rows if row[0] == "LMPO here")
    assert ours[-1] == "1.0"
    assert len(ours) == 12
    claim = next(row for row in cells.rows if row[0] == "LMPO ranks before SimPO over the ten tasks")
    assert claim[1:3] == ["tiny", "shown"]


def test_trials_are_marked(tmp_path: Path) -> None:
    units = {"ids": [0], "wins": [40.0], "lengths": [5], "lc_replicates": []}
    result = made(tmp_path / "a", ALPACA_EVAL, units, row=("mistral_7b_base", "LMPO", None), wr=40.0)
    from dataclasses import replace

    trial = replace(result, n=40, of=805, values={"wr": Value(40.0)})
    text = str(page_blocks(Results([trial])))
    assert "n = 40" in text
    assert "40 of 805" in text


def test_nothing_to_show_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"no result.json in .*evaluate a model first"):
        read_results([tmp_path / "empty"])
    with pytest.raises(DataError, match="is not a directory"):
        read_results([tmp_path / "gone"])


def test_own_instructions_do_not_stand_beside_the_papers_numbers(tmp_path: Path) -> None:
    from dataclasses import replace

    units = {"ids": [0], "wins": [40.0], "lengths": [5], "lc_replicates": []}
    result = made(tmp_path / "a", ALPACA_EVAL, units, row=("mistral_7b_base", "LMPO", None), wr=77.0)
    own = replace(result, evaluation_set={**result.evaluation_set, "published": "no"})
    blocks = page_blocks(Results([own]))
    others = next(index for index, block in enumerate(blocks) if getattr(block, "text", "") == "Other models")
    assert "77.0" not in str(blocks[:others])
    assert "77.0" in str(blocks[others:])


def test_columns_that_nobody_published_are_left_out() -> None:
    header = ["", "LC % published", "LC % here", "WR % published", "WR % here", "tokens published", "tokens here"]
    rows = [["LMPO", "", "", "", "50.0", "7", ""], ["SimPO", "", "", "", "", "", ""]]
    assert [header[place] for place in kept_columns(header, rows)] == [
        "",
        "WR % here",
        "tokens published",
        "tokens here",
    ]
