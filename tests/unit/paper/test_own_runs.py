"""Runs of one's own on one page, and suites from files."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from nemo_lmpo.compare import main
from nemo_lmpo.errors import ConfigError, UserError
from nemo_lmpo.paper.comparison.command import find_suites
from nemo_lmpo.paper.comparison.own_runs import measured, read_groups, write_own_page
from nemo_lmpo.paper.comparison.suites import MEASURES, QUALITY, START

ROOT = Path(__file__).resolve().parents[3]


def run(folder: Path, name: str, seed: int, accuracy: float, loss: str = "dpo", **more: Any) -> Path:
    """A run as training leaves it, of ten steps and two validations."""
    place = folder / f"{name}{seed}"
    place.mkdir(parents=True)
    config = {
        "name": name,
        "run_dir": str(place),
        "loss": {"name": loss, "beta": 0.1},
        "model": {"seed": seed, "restore_from_path": "start"},
        "data": {"validation": {"path": "held_out.jsonl"}},
        "trainer": {"max_steps": 10},
        **more,
    }
    (place / "config.yaml").write_text(yaml.safe_dump(config))
    (place / "run.json").write_text(json.dumps({"total_steps": 10}))
    steps = [{"step": step, "loss": 1 / step, "logps/chosen": -1.0, "pairs_per_second": step} for step in range(1, 11)]
    validated = [{"step": 5, "val/rewards/accuracies": 0.1}, {"step": 10, "val/rewards/accuracies": accuracy}]
    lines = "".join(json.dumps(line) + "\n" for line in [*steps, *validated])
    (place / "metrics.jsonl").write_text(lines)
    return place


def rows(page: Path, title: str) -> list[list[str]]:
    """A table of the Markdown page, by the heading above it."""
    part = page.with_suffix(".md").read_text().split(f"## {title}")[1].split("\n## ")[0]
    lines = [line for line in part.splitlines() if line.startswith("|")]
    return [[cell.strip().replace("\\", "") for cell in line.strip("|").split(" | ")] for line in lines[2:]]


def test_seeds_of_the_same_settings_are_one_column(tmp_path: Path) -> None:
    theirs = [run(tmp_path, "dpo", seed, 0.7 + seed / 100) for seed in (2, 1)]
    mine = [run(tmp_path, "mine", seed, 0.8 + seed / 100, loss="simpo") for seed in (1, 2)]
    groups = read_groups([theirs[0], *mine, theirs[1]])
    assert [(group.variant.label, list(group.runs)) for group in groups] == [("dpo", [1, 2]), ("mine", [1, 2])]
    values = measured(groups)
    assert values[groups[0].variant, 2] == {"val/rewards/accuracies": 0.72, "pairs_per_second": 5.5}
    page = write_own_page([theirs[0], *mine, theirs[1]], tmp_path / "page", "the command")
    # Each seed differs by 0.1, so the interval of the mean difference is 0.1 to 0.1.
    assert ["mine", "val/rewards/accuracies", "0.1 ± 0", "higher"] in [
        [one[0], one[1], re.sub(r"± .*", "± 0", one[2]), one[3]] for one in rows(page, "Differences from dpo")
    ]
    assert rows(page, "What differs") == [["loss.name", "dpo", "simpo"]]
    assert [one[:3] for one in rows(page, "Runs")] == [
        [name, str(seed), "10"] for name in ("dpo", "mine") for seed in (1, 2)
    ]
    assert "the command" in page.read_text()
    assert (tmp_path / "page" / "figures" / "loss.png").is_file()


@pytest.mark.parametrize("kind", ["conversations", "answers"])
def test_speed_is_the_median_of_what_a_run_trains_on(kind: str, tmp_path: Path) -> None:
    place = run(tmp_path, "kto", 1, 0.7, loss="kto")
    log = place / "metrics.jsonl"
    log.write_text(log.read_text().replace("pairs_per_second", f"{kind}_per_second"))
    (numbers,) = measured(read_groups([place, run(tmp_path, "dpo", 1, 0.7)])[:1]).values()
    assert numbers == {"val/rewards/accuracies": 0.7, f"{kind}_per_second": 5.5}


def test_one_seed_decides_nothing_and_other_data_is_said(tmp_path: Path) -> None:
    one = run(tmp_path, "dpo", 1, 0.7)
    two = run(tmp_path, "dpo", 2, 0.9, data={"validation": {"path": "others.jsonl"}}, trainer={"max_steps": 20})
    (two / "run.json").write_text('{"total_steps": 20}')
    page = write_own_page([one, two], tmp_path / "page", "")
    assert {row[3] for row in rows(page, f"Differences from dpo ({one})")} == {"no common seed"}
    text = page.with_suffix(".md").read_text()
    assert "do not have the same held-out data" in text
    assert "is at step 10 of 20" in text
    assert "same start model" not in text


def test_what_cannot_be_compared_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = run(tmp_path, "dpo", 1, 0.7), run(tmp_path / "copy", "dpo", 1, 0.7)
    with pytest.raises(ConfigError, match="give two or more"):
        read_groups([one])
    with pytest.raises(ConfigError, match=f"{two} has the settings and the seed of {one}"):
        read_groups([one, two])
    with pytest.raises(UserError, match="is not a directory"):
        read_groups([one, tmp_path / "none"])
    assert main([]) == 1
    assert main([str(one), "loss.beta=1"]) == 1
    assert capsys.readouterr().err.count("give --suite with a comparison to train, or the directories") == 2


def test_the_command_writes_the_page(tmp_path: Path) -> None:
    one, two = run(tmp_path, "dpo", 1, 0.7), run(tmp_path, "simpo", 1, 0.7, loss="simpo")
    assert main([str(one), str(two), "--output", str(tmp_path / "page")]) == 0
    assert "Comparison of 2 runs" in (tmp_path / "page" / "comparison.html").read_text()


def suite(tmp_path: Path, **values: Any) -> Path:
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump({"variants": {"SimPO": {"loss": "simpo"}, "mine": {"loss": "lmpo"}}, **values}))
    return file


def test_a_suite_from_a_file(tmp_path: Path) -> None:
    [text] = re.findall(r"```yaml\n(title: .*?)```", (ROOT / "docs" / "comparison.md").read_text(), re.DOTALL)
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    [found] = find_suites([str(file)])
    assert [one.label for one in found.variants] == [START.label, "SimPO", "mine"]
    assert found.variants[2].overrides == ("loss.beta=5", "loss.sft_weight=0.2")
    assert set(found.measures) <= set(MEASURES)
    [claim] = found.claims
    assert (claim.high.label, claim.low.label, claim.measure) == ("SimPO", "mine", "length")
    assert find_suites([str(suite(tmp_path))])[0].measures == QUALITY


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"variants": {}}, "variants is empty"),
        ({"variants": {"a": {"loss": "simpoo"}}}, "loss 'simpoo' is unknown; did you mean simpo?"),
        ({"variants": {"a": {"los": "simpo"}}}, "key 'los' is unknown; did you mean loss?"),
        ({"variants": {"a": {"loss": "simpo", "overrides": "loss.beta=1"}}}, "is not a list"),
        ({"variants": {START.label: {"loss": "sft"}}}, "it is a variant of every suite"),
        ({"measures": ["lenght"]}, "measure 'lenght' is unknown; did you mean length?"),
        ({"claims": [{"text": "x", "measure": "length", "high": "SimPO", "low": "min"}]}, "low 'min' is unknown"),
        ({"claims": [{"text": "x", "measure": "length", "high": "SimPO"}]}, "claim 1: low=None is not a text"),
        ({"variant": {}}, "key 'variant' is unknown; did you mean variants?"),
    ],
)
def test_a_wrong_suite_is_one_sentence(tmp_path: Path, values: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError) as caught:
        find_suites([str(suite(tmp_path, **values))])
    assert reason in str(caught.value)
    assert str(caught.value).count("\n") == 0


def test_a_file_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        find_suites([str(tmp_path / "none.yaml")])
    (tmp_path / "broken.yaml").write_text("a: [")
    with pytest.raises(ConfigError, match="cannot be read"):
        find_suites([str(tmp_path / "broken.yaml")])
