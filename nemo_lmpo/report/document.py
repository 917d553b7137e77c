"""Pages from templates: HTML without scripts that loads nothing from anywhere, and Markdown.

What a template shows is escaped for the page's form unless the template marks it as markup (`| safe`): rows, answers,
names and texts of servers stay text.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from nemo_lmpo.report.escape import markdown_cell, markdown_code, markdown_text, visible


def data_uri(png: bytes) -> str:
    """A picture as the address of itself."""
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def python_text(value: str) -> Markup:
    """A text as Python and JSON write it, quotes included, for code that a page shows."""
    return Markup(json.dumps(value))


def html_templates(package: str) -> Environment:
    """The HTML templates beside a package's modules; what is missing in a page is an error."""
    return _templates(package, visible)


def markdown_templates(package: str) -> Environment:
    """The Markdown templates beside a package's modules; what is missing in a page is an error."""
    return _templates(package, markdown_text)


def _templates(package: str, escape: Callable[[str], str]) -> Environment:
    environment = Environment(
        loader=PackageLoader(package),
        # Escapes what `finalize` leaves as a plain text; Markdown's escape leaves none.
        autoescape=True,
        finalize=lambda value: escape(value) if isinstance(value, str) and not isinstance(value, Markup) else value,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(data_uri=data_uri, cell=markdown_cell, code=markdown_code, python_text=python_text)
    return environment
