"""The page about pairs: what was preferred, how long it is, what was left out, and examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nemo_lmpo.errors import counted
from nemo_lmpo.pairs import folder as files
from nemo_lmpo.pairs.choose import Chosen, Pair
from nemo_lmpo.pairs.plots import figures
from nemo_lmpo.pairs.scorers.conversation import prompt_text
from nemo_lmpo.report.blocks import Block, Figure, Heading, Points, Table, Text, to_html
from nemo_lmpo.runtime.files import replace_file

_EXAMPLES = 6
_LONGEST_TEXT = 1500
_NAMES = {
    "score_chosen": "score, chosen",
    "score_rejected": "score, rejected",
    "score_candidates": "score, all candidates",
    "tokens_chosen": "tokens, chosen",
    "tokens_rejected": "tokens, rejected",
    "tokens_candidates": "tokens, all candidates",
    "correlation_length_score": "correlation of length and score within prompts",
    "correlation_length_controlled_score": "the same after length control",
    "longer_wins_candidates": "the longer of two candidates wins (%)",
    "longer_wins_candidates_controlled": "the same after length control (%)",
    "longer_wins_pairs": "the chosen answer is the longer one (%)",
    "length_control_theta": "theta of the length control",
    "length_control_sigma": "its unit of length (tokens)",
}


def statistic_rows(statistics: Mapping[str, Any]) -> list[list[str]]:
    """A line for each number, in the order of the page."""
    return [
        [label, "-" if statistics[name] is None else f"{statistics[name]:.4g}"]
        for name, label in _NAMES.items()
        if name in statistics
    ]


def count_rows(counts: Mapping[str, Any]) -> list[list[str]]:
    """What was left out, and why; nothing is left out silently."""
    rows = [["prompts", "asked", str(counts["prompts"])], ["pairs", "made", str(counts["pairs"])]]
    for name, what in (
        ("rows_left_out", "rows of the source"),
        ("prompts_not_asked", "prompts"),
        ("prompts_left_out", "prompts"),
        ("answers_left_out", "answers"),
    ):
        rows += [[what, f"left out: {why}", str(count)] for why, count in counts[name].items()]
    return rows


def write_page(folder: Path, name: str, summary: Mapping[str, Any], chosen: Chosen) -> list[Figure]:
    """Write `report.html` and its pictures; the pictures."""
    drawn = figures(chosen)
    blocks: list[Block] = [
        Heading(1, f"{name}: pairs of own answers"),
        Text(summary_line(summary)),
        Table(("what", "", "number"), count_rows(summary["counts"]), title="Counts"),
        Table(("over pairs and candidates", "value"), statistic_rows(summary["statistics"]), title="Numbers"),
        *_reading(summary),
        *drawn,
        Heading(2, "Examples"),
        Text("The largest, the middle and the smallest score differences, and the largest difference of lengths."),
        Table(("prompt", "chosen", "rejected"), [_example(pair) for pair in examples(chosen.pairs)], style="texts"),
    ]
    (folder / files.FIGURES).mkdir(exist_ok=True)
    for figure in drawn:
        replace_file(folder / figure.path, figure.png)
    replace_file(folder / files.PAGE, to_html(f"{name}: pairs", blocks))
    return drawn


def summary_line(summary: Mapping[str, Any]) -> str:
    """How the pairs came about, in a sentence or two."""
    models = ", ".join(model["name"] for model in summary["models"])
    rule = summary["rule"]
    more = " with scores that length explains nothing of" if rule["length_control"] else ""
    ratio = f", lengths at most {rule['max_length_ratio']:g} times each other" if rule["max_length_ratio"] else ""
    return (
        f"{counted(summary['counts']['pairs'], 'pair')} of answers that {models} gave to "
        f"{counted(summary['counts']['prompts'], 'prompt')} of {summary['prompts']['source']}; "
        f"{counted(len(summary['seeds']), 'answer')} for each prompt and model, rule {rule['text']}{more}{ratio}."
    )


def _reading(summary: Mapping[str, Any]) -> list[Block]:
    found = summary["statistics"]
    lines = [
        "Correlations are over all candidates, each less the mean of its prompt, so that prompts which ask for long "
        "answers do not count.",
        "Where the longer answer wins much more than half of the time, a model that learns from these pairs learns to "
        "be longer, whatever else it learns.",
    ]
    if "length_control_theta" in found:
        lines.append(
            "Length control: score = the prompt's own level + theta * tanh(length less the prompt's mean, in units of "
            "the spread within prompts) + the rest; the rule goes by the rest."
        )
    return [Points(lines)]


def examples(pairs: Sequence[Pair]) -> list[Pair]:
    """A few that show the range, each once."""
    by_margin = sorted(pairs, key=lambda pair: pair.chosen.value - pair.rejected.value, reverse=True)
    by_length = max(pairs, key=lambda pair: abs(pair.chosen.tokens - pair.rejected.tokens))
    middle = len(by_margin) // 2
    picked = [*by_margin[:2], *by_margin[middle : middle + 2], by_margin[-1], by_length]
    unique: dict[tuple[str, int], Pair] = {(pair.prompt.id, pair.place): pair for pair in picked}
    return list(unique.values())[:_EXAMPLES]


def _example(pair: Pair) -> list[str]:
    return [
        _cut(prompt_text(pair.prompt)),
        *(
            f"{_cut(one.text)}\n(score {one.score:.4g}, {counted(one.tokens, 'token')})"
            for one in (pair.chosen, pair.rejected)
        ),
    ]


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST_TEXT else f"{text[:_LONGEST_TEXT]}..."
