"""What a page is made of, as HTML in the look of the other reports and as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from markupsafe import Markup

from nemo_lmpo.report.document import html_templates, markdown_templates


@dataclass(frozen=True)
class Heading:
    """A title; level 1 is the page's."""

    level: int
    text: str
    kind: ClassVar[str] = "heading"


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str
    kind: ClassVar[str] = "text"


@dataclass(frozen=True)
class Code:
    """Text whose lines and blanks are kept, such as a command."""

    text: str
    kind: ClassVar[str] = "code"


@dataclass(frozen=True)
class Points:
    """A list."""

    lines: Sequence[str]
    kind: ClassVar[str] = "points"


@dataclass(frozen=True)
class Table:
    """A table whose first column names the rows; footnotes belong to it, and a new line in a cell is one."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    style: str = "numbers"
    """`numbers`, `settings`, `claims` or `texts`."""
    notes: Sequence[str] = ()
    title: str = ""
    kind: ClassVar[str] = "table"


@dataclass(frozen=True)
class Figure:
    """A picture: inside the HTML page, and a file beside the Markdown page."""

    title: str
    caption: str
    png: bytes
    path: str
    """Of the file, from the page's folder."""
    kind: ClassVar[str] = "figure"


@dataclass(frozen=True)
class Details:
    """Lines to be shown on demand."""

    summary: str
    lines: Sequence[str] = field(default_factory=tuple)
    kind: ClassVar[str] = "details"


Block = Heading | Text | Code | Points | Table | Figure | Details


def to_html(title: str, blocks: Sequence[Block]) -> str:
    """A self-contained page."""
    templates = html_templates("nemo_lmpo.report")
    body = templates.get_template("blocks.html.j2").render(blocks=blocks)
    return templates.get_template("base.html.j2").render(title=title, body=Markup(body))


def to_markdown(blocks: Sequence[Block]) -> str:
    """For repositories and terminals."""
    template = markdown_templates("nemo_lmpo.report").get_template("blocks.md.j2")
    return template.render(blocks=blocks).rstrip() + "\n"
