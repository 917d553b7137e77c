"""The day that a chat template writes (Llama 3.2, gpt-oss, Granite): one for all of a run, carried by the template.

Such templates ask for the date while they render, so the same pair has other ids the next day. Here the day is written
into the template itself, in front: whatever is made of it (the cache's key, the run's record, prompts of generation)
has the same day.
"""

from __future__ import annotations

import json
import re
import string
from datetime import date

_CALL = re.compile(r"\bstrftime_now\s*\(")
_LITERAL = re.compile(r"""\bstrftime_now\s*\(\s*(["'])((?:(?!\1)[^\\])*)\1\s*\)""")
_OPENING = "{% macro strftime_now(format) %}"


def today() -> str:
    """The day as `YYYY-MM-DD`."""
    return date.today().isoformat()


def writes_day(template: str) -> bool:
    """Whether the template asks for the date."""
    return _CALL.search(template) is not None and not template.startswith(_OPENING)


def with_day(template: str, day: str | None = None) -> str:
    """The template with the day that it writes fixed; any other template, and one that has its day, as it is.

    Args:
        template: Jinja text.
        day: `YYYY-MM-DD`; None: today.
    """
    if not writes_day(template):
        return template
    fixed = date.fromisoformat(day or today())
    formats = {found.group(2) for found in _LITERAL.finditer(template)}
    if len(_LITERAL.findall(template)) == len(_CALL.findall(template)):
        body = f"{{{{ {_table({form: fixed.strftime(form) for form in formats})}[format] }}}}"
    else:  # some format is put together while rendering
        body = _any_format(fixed)
    # The line break goes with the block in front of it (trim_blocks), so nothing is added to what is rendered.
    return f"{_OPENING}{body}{{% endmacro %}}\n{template}"


def without_day(template: str) -> str:
    """The template as it was before :func:`with_day`."""
    return template.partition("\n")[2] if template.startswith(_OPENING) else template


def _any_format(fixed: date) -> str:
    """Jinja text that writes the day in any format."""
    directives = [*string.ascii_letters, *(f"-{letter}" for letter in "dmHIMSj")]
    table = _table({directive: fixed.strftime(f"%{directive}") for directive in directives})
    return (
        f"{{% set day = {table} %}}{{% for part in (format | replace('%%', '\\0')).split('%') %}}"
        "{% set size = 2 if part[:1] == '-' else 1 %}"
        "{% if loop.first %}{{ part | replace('\\0', '%') }}"
        "{% else %}{{ day[part[:size]] }}{{ part[size:] | replace('\\0', '%') }}{% endif %}{% endfor %}"
    )


def _table(values: dict[str, str]) -> str:
    return json.dumps(values, ensure_ascii=False, sort_keys=True)
