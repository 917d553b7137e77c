"""The page over all rounds: what becomes of reward, length, accuracy and log-probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nemo_lmpo.report.blocks import Block, Figure, Heading, Table, Text, to_html
from nemo_lmpo.rounds.plan import PAGE, PICTURE
from nemo_lmpo.runtime.files import replace_file

_COLUMNS = {
    "reward": "mean reward",
    "tokens": "tokens per answer",
    "cut_off": "cut off (%)",
    "pairs": "pairs made of them",
    "longer_wins": "chosen is longer (%)",
    "accuracy": "accuracy",
    "logps_chosen": "log-probability, chosen",
    "logps_rejected": "log-probability, rejected",
}


def write_page(folder: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """Write `rounds.html` and its picture; the page."""
    png = _picture(rows)
    replace_file(folder / PICTURE, png)
    table = [[str(row["round"]), *(_shown(row.get(name)) for name in _COLUMNS)] for row in rows]
    title = f"{folder.resolve().name}: rounds"
    blocks: list[Block] = [
        Heading(1, title),
        Text(
            "Round 0 is the start model. Reward and length are of the answers that a policy gave to the prompts; pairs "
            "are what was made of them. Accuracy and log-probabilities are those of the training that made the policy, "
            "at its last validation."
        ),
        Table(("policy of round", *_COLUMNS.values()), table),
        Figure("Reward and length", "Mean reward and tokens of the policies' answers.", png, PICTURE),
    ]
    page = folder / PAGE
    replace_file(page, to_html(title, blocks))
    return page


def _shown(value: float | int | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _picture(rows: Sequence[dict[str, Any]]) -> bytes:
    from nemo_lmpo.report.plots import ROLES, one_panel

    def draw(axes: Any) -> None:
        other = axes.twinx()
        for each, name, label, role in (
            (axes, "reward", "mean reward", "margin"),
            (other, "tokens", "tokens per answer (right)", "neutral"),
        ):
            found = [(row["round"], row[name]) for row in rows if row[name] is not None]
            each.plot(*zip(*found, strict=True) if found else ([], []), color=ROLES[role], marker="o", label=label)
        other.set_ylim(bottom=0)
        axes.plot([], [], color=ROLES["neutral"], marker="o", label="tokens per answer (right)")

    return one_panel("mean reward", draw, xlabel="round", from_zero=False)
