"""The tables, verdicts and figure of `benchmarks/rounds.py` in docs/comparison.md, from its results alone.

python benchmarks/rounds_page.py           prints them
python benchmarks/rounds_page.py --write   puts them into the page
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.plan_tables import place
from nemo_lmpo.paper.comparison.results import Values, estimate, interval_of, judge
from nemo_lmpo.paper.comparison.suites import START, Claim, Variant
from nemo_lmpo.report.plots import RUN_COLORS, one_panel
from nemo_lmpo.runtime.files import read_json, replace_file

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "rounds.json"
PAGE = ROOT / "docs" / "comparison.md"
FIGURES = {"right": "rounds_tiny_right.png", "tokens": "rounds_tiny_tokens.png"}
METHODS = ("LMPO", "LMPO, released code", "SimPO", "DPO")
VALIDATION = 256
"""Prompts that choose a learning rate."""
CONTROLLED = ", length control"
RIGHT, SAMPLED, TOKENS = "greedy_right", "sampled_right", "greedy_tokens"
UNITS = {RIGHT: "points", SAMPLED: "points", TOKENS: "tokens"}


def selected_rate(found: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    """The highest rate whose right sampled answers are within one standard error of the best rate's.

    Lower rates than that train less, for a difference that so many prompts do not show.
    """
    right = {rate: policies[-1]["sampled_right"] for rate, policies in found.items()}
    best = max(right.values())
    error = math.sqrt(best * (100 - best) / VALIDATION)
    return max((rate for rate, value in right.items() if value >= best - error), key=float)


def variant(method: str, *, control: bool = False) -> Variant:
    """A method with or without `--length-control`."""
    return Variant(method + CONTROLLED * control, method)


def policies_of(results: Mapping[str, Any], who: Variant) -> dict[int, Sequence[Mapping[str, float]]]:
    """What a variant's policies are like, by seed."""
    return {
        run["seed"]: run["policies"]
        for run in results["runs"].values()
        if variant(run["method"], control=run["length_control"]) == who
    }


def last_values(results: Mapping[str, Any]) -> Values:
    """Measures of every last policy, and of the start model, by seed."""
    values: dict[tuple[Variant, int], Mapping[str, float]] = {}
    for run in results["runs"].values():
        values[variant(run["method"], control=run["length_control"]), run["seed"]] = run["policies"][-1]
        values[START, run["seed"]] = run["policies"][0]
    return values


def claims() -> Iterator[Claim]:
    """What is looked at; a claim says that `measure` of `high` is above that of `low`."""
    for method in METHODS:
        own, controlled = variant(method), variant(method, control=True)
        yield Claim(f"{method}: rounds raise the share of right greedy answers", "", RIGHT, own, START)
        yield Claim(f"{method}: rounds raise the share of right sampled answers", "", SAMPLED, own, START)
        yield Claim(f"{method}: rounds make answers longer", "", TOKENS, own, START)
        yield Claim(f"{method}: answers are shorter with `--length-control`", "", TOKENS, own, controlled)
        yield Claim(f"{method}: fewer greedy answers are right with `--length-control`", "", RIGHT, own, controlled)
    lmpo = variant("LMPO")
    for other in METHODS[1:]:
        yield Claim(f"LMPO answers right more often than {other}", "", RIGHT, lmpo, variant(other))
        yield Claim(f"LMPO answers shorter than {other}", "", TOKENS, variant(other), lmpo)


def verdict_rows(results: Mapping[str, Any]) -> list[list[str]]:
    """Each claim with its verdict, and the difference with its interval."""
    values, rows = last_values(results), []
    for claim in claims():
        found = judge(claim, values)
        difference, said = found.difference, ""
        if difference is not None:
            interval = interval_of(difference)
            said = f"{difference.mean:+.2f} {UNITS[claim.measure]}"
            said += f" ({interval.low:+.2f} to {interval.high:+.2f})" if interval is not None else ""
        rows.append([claim.text, found.verdict, said])
    return rows


def policy_rows(results: Mapping[str, Any]) -> list[list[str]]:
    """Right answers and tokens of each variant by round, mean and standard error over seeds."""
    rows = []
    for control in (False, True):
        for method in METHODS:
            found = policies_of(results, variant(method, control=control))
            if found:
                name = method + CONTROLLED * control
                rounds = range(len(next(iter(found.values()))))
                cells = [
                    _mean([one[number][measure] for one in found.values()])
                    for measure in UNITS
                    for number in rounds[1:]
                ]
                rows.append([name, *cells])
    start = next(iter(results["runs"].values()))["policies"][0]
    count = (len(rows[0]) - 1) // len(UNITS)
    return [["start model", *(f"{start[measure]:.1f}" for measure in UNITS for _ in range(count))], *rows]


def pair_rows(results: Mapping[str, Any]) -> list[list[str]]:
    """Pairs of each round and how many of them have the longer answer as the chosen one, means over seeds."""
    rows = []
    for control in (False, True):
        for method in METHODS:
            found = list(policies_of(results, variant(method, control=control)).values())
            if found:
                cells = [
                    _mean([one[number][name] for one in found])
                    for name in ("pairs", "longer_wins")
                    for number in range(len(found[0]) - 1)
                ]
                rows.append([method + CONTROLLED * control, *cells])
    return rows


def rate_rows(results: Mapping[str, Any]) -> list[list[str]]:
    """Right sampled answers at each candidate rate; the selected one is bold."""
    rows = []
    for method, found in results["tuning"].items():
        cells = []
        for rate in sorted(found, key=float):
            cell = f"{found[rate][-1][SAMPLED]:.1f}"
            cells.append(f"**{cell}**" if rate == results["rates"][method] else cell)
        rows.append([method, *cells])
    return rows


def tables(results: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Each table's name and content."""
    rates = sorted(next(iter(results["tuning"].values())), key=float)
    yield "rounds, rates", _table(["right sampled answers in % at", *rates], rate_rows(results))
    rows = policy_rows(results)
    count = (len(rows[0]) - 1) // len(UNITS)
    names = {RIGHT: "right", SAMPLED: "right, sampled", TOKENS: "tokens"}
    head = ["after round", *(f"{names[measure]}, {number}" for measure in UNITS for number in range(1, count + 1))]
    yield "rounds, policies", _table(head, rows)
    pairs = [f"{name}, {number}" for name in ("pairs", "chosen is longer, %") for number in range(1, count + 1)]
    yield "rounds, pairs", _table(["of round", *pairs], pair_rows(results))
    yield "rounds, verdicts", _table(["claim", "verdict", "difference (95 % interval)"], verdict_rows(results))


def figure(results: Mapping[str, Any], measure: str, label: str) -> bytes:
    """Means over seeds by round; dashed with `--length-control`."""

    def draw(axes: Any) -> None:
        for color, method in zip(RUN_COLORS, METHODS, strict=False):
            for control, style in ((False, "-"), (True, "--")):
                found = list(policies_of(results, variant(method, control=control)).values())
                if found:
                    means = [sum(one[n][measure] for one in found) / len(found) for n in range(len(found[0]))]
                    shown = None if control else method
                    axes.plot(range(len(means)), means, color=color, linestyle=style, marker="o", label=shown)
        axes.plot([], [], color="black", linestyle="--", label="with length control")

    return one_panel(label, draw, xlabel="round", from_zero=False)


def _mean(values: Sequence[float]) -> str:
    found = estimate(values)
    assert found is not None
    return f"{found.mean:.1f}" + (f" ± {found.error:.1f}" if found.error is not None else "")


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows))


def main() -> None:
    """Print the tables, or write them and the figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", action="store_true", help="put them into docs/comparison.md")
    wanted = parser.parse_args()
    results, page = read_json(RESULTS), PAGE.read_text()
    for name, content in tables(results):
        page = place(page, name, content)
        if not wanted.write:
            print(f"{name}\n\n{content}\n")
    if wanted.write:
        replace_file(PAGE, page.encode())
        for measure, label in ((RIGHT, "right greedy answers (%)"), (TOKENS, "tokens per greedy answer")):
            name = FIGURES["right" if measure == RIGHT else "tokens"]
            replace_file(PAGE.parent / "figures" / name, figure(results, measure, label))


if __name__ == "__main__":
    main()
