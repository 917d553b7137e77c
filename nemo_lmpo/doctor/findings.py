"""What was found, and the page made of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

_MARKS = {"fact": "  ", "good": "ok", "note": "--", "problem": "!!"}


@dataclass(frozen=True)
class Finding:
    """A line of the page."""

    section: str
    subject: str
    text: str
    kind: Literal["fact", "good", "note", "problem"] = "fact"
    """A fact; something that was tried and is right; something to know; something that training would fail at."""


def page(findings: Sequence[Finding]) -> str:
    """All findings by section, and a verdict."""
    lines: list[str] = []
    width = max(len(finding.subject) for finding in findings)
    for section in dict.fromkeys(finding.section for finding in findings):
        lines += ["", section]
        chosen = [finding for finding in findings if finding.section == section]
        lines += [f" {_MARKS[each.kind]} {each.subject:<{width}}  {each.text}" for each in chosen]
    return "\n".join([*lines[1:], "", verdict(findings)])


def verdict(findings: Sequence[Finding]) -> str:
    """The last line: what is in the way, or that nothing is."""
    problems = [finding for finding in findings if finding.kind == "problem"]
    tried = sum(finding.kind == "good" for finding in findings)
    if not problems:
        return f"verdict: fit for training; {tried} checks passed"
    names = ", ".join(dict.fromkeys(finding.subject for finding in problems))
    return f"verdict: not fit for training; look at {names}"
