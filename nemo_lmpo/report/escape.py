"""Text from outside (data, answers, names, servers) that stays text in Markdown and HTML: nothing of it acts."""

from __future__ import annotations

import re

from markupsafe import Markup

# Control characters but tab and newline, marks that turn the direction of what follows, halves of surrogate pairs.
_INVISIBLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]"
)
_ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}
# An underscore within a word is itself. Brackets act only where an address or a definition follows them.
_ACTS_ANYWHERE = re.compile(
    r"[\\`*~$|]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])|\](?=[(\[:])|:(?=//)|(?<=www)\.", re.IGNORECASE
)
_ACTS_AT_THE_START = re.compile(r"[#+=:-]|\d+(?=[.)](?:\s|$))")


def visible(text: str) -> str:
    """The text with control characters, marks of direction and half surrogates spelled out."""
    return _INVISIBLE.sub(lambda found: ascii(found[0])[1:-1], text.replace("\r\n", "\n"))


def _inline(text: str) -> str:
    escaped = _ACTS_ANYWHERE.sub(lambda found: f"\\{found[0]}", visible(text))
    return re.sub("[&<>]", lambda found: _ENTITIES[found[0]], escaped)


def markdown_text(value: object) -> Markup:
    """A value as a line of Markdown that shows it as it is: no link, picture, HTML, emphasis, list or heading."""
    text = _inline(" ".join(str(value).split()))
    start = _ACTS_AT_THE_START.match(text)
    if start is None:
        return Markup(text)
    # The sign behind a number makes it a list.
    place = start.end() if start[0].isdigit() else 0
    return Markup(f"{text[:place]}\\{text[place:]}")


def markdown_cell(value: object) -> Markup:
    """The same for a cell of a Markdown table; lines stay lines."""
    return Markup("<br>".join(_inline(line) for line in visible(str(value)).split("\n")))


def markdown_code(text: object) -> Markup:
    """A block of code whose fence is longer than any that the text holds."""
    shown = visible(str(text))
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", shown)), default=0))
    return Markup(f"{fence}\n{shown}\n{fence}")


def plot_text(text: str) -> str:
    """A text for a picture, where matplotlib would read what stands between dollar signs as a formula."""
    return visible(text).replace("$", r"\$")
