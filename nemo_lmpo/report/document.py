"""Self-contained HTML pages from templates or Markdown: no scripts, nothing loaded from anywhere."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup


def data_uri(png: bytes) -> str:
    """A picture as the address of itself."""
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def markdown_cell(value: object) -> str:
    """Text that stays itself in a cell of a Markdown table, and in HTML."""
    return html.escape(str(value), quote=False).replace("|", "\\|").replace("\n", "<br>")


def templates_of(package: str) -> Environment:
    """The templates beside a package's modules; what is missing in a page is an error, HTML is escaped."""
    environment = Environment(
        loader=PackageLoader(package),
        autoescape=lambda name: name is not None and ".html" in name,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(data_uri=data_uri, cell=markdown_cell)
    return environment


def render_markdown(title: str, text: str, pictures: Mapping[str, bytes]) -> str:
    """A page from Markdown.

    Args:
        title: the window's.
        text: with tables; pictures by relative paths.
        pictures: PNG by the path that ``text`` names, put inside the page.
    """
    from markdown import markdown

    body = markdown(text, extensions=["tables", "fenced_code", "sane_lists"])
    for path, png in pictures.items():
        body = body.replace(f'src="{path}"', f'src="{data_uri(png)}"')
    body = body.replace("<table>", '<section class="card scroll"><table class="numbers">').replace(
        "</table>", "</table></section>"
    )
    return templates_of("nemo_lmpo.report").get_template("base.html.j2").render(title=title, body=Markup(body))
