"""Pieces of a self-contained HTML page: no scripts, nothing loaded from anywhere."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence

_CSS = """
:root { color-scheme: light dark; --bg: #f6f8fa; --card: #ffffff; --text: #1f2328; --muted: #59636e;
  --line: #d8dee4; --good: #1a7f37; --open: #9a6700; }
@media (prefers-color-scheme: dark) { :root { --bg: #0d1117; --card: #161b22; --text: #e6edf3; --muted: #9da7b3;
  --line: #2b323b; --good: #3fb950; --open: #d29922; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1160px; padding: 24px 16px 48px; background: var(--bg); color: var(--text);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.05rem; margin: 0 0 4px; }
p { margin: 4px 0 12px; color: var(--muted); font-size: 0.9rem; }
.state { display: inline-block; margin: 8px 8px 4px 0; font-weight: 600; }
.state.finished { color: var(--good); }
.state.unfinished { color: var(--open); }
.note { display: inline-block; color: var(--muted); font-size: 0.9rem; margin-bottom: 16px; }
.top { display: grid; gap: 16px; grid-template-columns: repeat(auto-fit, minmax(min(100%, 460px), 1fr));
  align-items: start; margin-bottom: 28px; }
.curves { columns: 460px 2; column-gap: 16px; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 16px; min-width: 0; }
figure { margin: 0 0 16px; break-inside: avoid; }
figure img { display: block; width: 100%; height: auto; margin-top: 8px; }
figcaption p { margin: 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 0.9rem; }
th, td { text-align: left; padding: 5px 14px 5px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
tr:last-child > * { border-bottom: 0; }
th { font-weight: 600; }
thead th { color: var(--muted); font-weight: 500; font-size: 0.82rem; vertical-align: bottom; }
table.numbers td, table.numbers thead th + th { text-align: right; padding-right: 0; padding-left: 12px; }
table.numbers td { font-variant-numeric: tabular-nums; white-space: nowrap; }
table.numbers th { font-weight: 500; }
table.numbers tbody th { white-space: nowrap; }
table.settings th { font: 0.84rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; white-space: nowrap; }
table.settings th, table.settings td { padding-top: 3px; padding-bottom: 3px; }
table.settings td { overflow-wrap: anywhere; min-width: 7em; }
table.claims th { font-weight: 500; min-width: 15em; }
table.claims td:nth-child(3) { font-weight: 600; white-space: nowrap; }
ul.notes { color: var(--muted); font-size: 0.9rem; margin: 4px 0 20px; padding-left: 20px; }
details { margin-top: 16px; }
summary { cursor: pointer; color: var(--muted); font-size: 0.9rem; }
pre { overflow-x: auto; font: 0.8rem/1.45 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
@media (max-width: 520px) { body { padding: 16px 10px 32px; } .card { padding: 12px; }
  th, td { padding-right: 10px; } table.numbers { font-size: 0.82rem; }
  table.numbers td, table.numbers thead th + th { padding-left: 8px; }
  table.settings th { font-size: 0.75rem; white-space: normal; overflow-wrap: anywhere; } }
"""


def escape(text: object) -> str:
    """Text as HTML shows it."""
    return html.escape(str(text))


def table(rows: Sequence[Sequence[object]], *, header: Sequence[object] = (), kind: str) -> str:
    """A table whose first column names the rows; ``kind`` is `numbers`, `settings` or `claims`."""
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in header)
    body = "".join(
        f'<tr><th scope="row">{escape(row[0])}</th>' + "".join(f"<td>{escape(cell)}</td>" for cell in row[1:]) + "</tr>"
        for row in rows
    )
    thead = f"<thead><tr>{head}</tr></thead>" if header else ""
    return f'<div class="scroll"><table class="{kind}">{thead}<tbody>{body}</tbody></table></div>'


def _data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def figure(title: str, caption: str, light: bytes, dark: bytes) -> str:
    """A picture inside the page, light or dark as the reader's system is."""
    return (
        f'<figure class="card"><figcaption><h2>{escape(title)}</h2><p>{escape(caption)}</p></figcaption><picture>'
        f'<source media="(prefers-color-scheme: dark)" srcset="{_data_uri(dark)}">'
        f'<img src="{_data_uri(light)}" alt="{escape(title)}" loading="lazy"></picture></figure>'
    )


def document(title: str, body: str) -> str:
    """A whole page."""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_CSS}</style></head>\n<body>\n{body}\n</body></html>\n"
    )
