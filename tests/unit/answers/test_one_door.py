"""One module speaks HTTP for the package, so that deadlines, bounds and redirects are decided in one place."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import nemo_lmpo

PACKAGE = Path(nemo_lmpo.__file__).resolve().parent
CLIENTS = ("requests", "urllib3", "urllib.request", "http.client", "httpx", "aiohttp", "openai", "websockets")


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_one_module_speaks_http() -> None:
    found = {
        str(path.relative_to(PACKAGE))
        for path in PACKAGE.rglob("*.py")
        if any(name == client or name.startswith(f"{client}.") for name in imports(path) for client in CLIENTS)
    }
    assert found == {"answers/http.py"}
