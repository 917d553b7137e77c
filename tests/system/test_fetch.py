"""`nemo-lmpo fetch` against a stand-in for the hub: a break is resumed, and what was brought is found offline."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any, cast

import pytest

from nemo_lmpo import cli
from nemo_lmpo.evaluate.local_server import serve

SHA = "1" * 40
WEIGHTS = bytes(range(256)) * 400
ROWS = [{"prompt": "sort b a", "chosen": "a b", "rejected": "b a"}] * 3
FILES = {
    "models/own/model": {
        "config.json": b"{}",
        "model.safetensors": WEIGHTS,
        "pytorch_model.bin": b"x" * 999,
        "tokenizer.json": b"{}",
    },
    "datasets/own/data": {"train.jsonl": "".join(json.dumps(row) + "\n" for row in ROWS).encode(), "README.md": b"# x"},
}


class Hub(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    cut = True
    asked: list[tuple[str, str | None]] = []  # noqa: RUF012

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, *, with_body: bool) -> None:
        if found := re.fullmatch(r"/api/(models|datasets)/(own/\w+)/revision/main", self.path.partition("?")[0]):
            files = FILES.get(f"{found[1]}/{found[2]}")
            if files is None:
                return self._send(404, b'{"error": "Repository not found"}', {"X-Error-Code": "RepoNotFound"})
            siblings = [{"rfilename": name, "size": len(content)} for name, content in files.items()]
            return self._send(200, json.dumps({"id": found[2], "sha": SHA, "siblings": siblings}).encode())
        if found := re.fullmatch(rf"/api/(models|datasets)/(own/\w+)/tree/{SHA}", self.path.partition("?")[0]):
            files = FILES[f"{found[1]}/{found[2]}"]
            listed = [
                {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for name, content in files.items()
            ]
            return self._send(200, json.dumps(listed).encode())
        found = re.fullmatch(rf"/(datasets/)?(own/\w+)/resolve/(?:main|{SHA})/(.+)", self.path)
        if found is None:
            return self._send(404, b"{}")
        content = FILES[f"{'datasets' if found[1] else 'models'}/{found[2]}"][found[3]]
        headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": SHA, "Accept-Ranges": "bytes"}
        if not with_body:
            return self._send(200, content, headers, body=False)
        wanted = self.headers.get("Range")
        self.asked.append((found[3], wanted))
        if type(self).cut and content is WEIGHTS:
            if wanted is not None:
                return self._send(403, b"{}")
            self._send(200, content, headers, body=False)
            self.wfile.write(content[: len(content) // 2])
            self.close_connection = True
            return None
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted else 0
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        return self._send(206 if start else 200, content[start:], headers)

    def _send(self, status: int, content: bytes, headers: dict[str, str] | None = None, *, body: bool = True) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def url() -> Iterator[str]:
    with serve(cast(Any, Hub)) as url:
        yield url


def command(url: str, home: Path, module: str, *words: str, **more: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {"HF_ENDPOINT": url, "HF_HOME": str(home), "XDG_CACHE_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    return subprocess.run(
        [sys.executable, "-m", f"nemo_lmpo.{module}", *words],
        env={**environment, **more},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_what_a_recipe_names_is_brought_and_found_offline(url: str, tmp_path: Path) -> None:
    folder = tmp_path / "to"
    recipe = ["lmpo_tiny", "model.restore_from_path=own/model", "data.train.path=own/data", "data.train.split=train"]
    broken = command(url, tmp_path, "fetch", *recipe, "--to", str(folder))
    assert broken.returncode == 1
    assert "error: model own/model cannot be fetched from the hub" in broken.stderr
    assert "the same command resumes" in broken.stderr
    Hub.cut, before = False, len(Hub.asked)
    whole = command(url, tmp_path, "fetch", *recipe, "--to", str(folder))
    assert whole.returncode == 0, whole.stderr
    came_whole = {name for name, _ in Hub.asked[:before]} - {"model.safetensors"}
    assert not came_whole & {name for name, _ in Hub.asked[before:]}
    assert not any(name == "pytorch_model.bin" for name, _ in Hub.asked)
    assert "fetched: model own/model, 3 files" in whole.stdout
    assert "fetched: dataset own/data, 2 files" in whole.stdout
    assert f"HF_HUB_CACHE={folder}" in whole.stdout
    model = next(folder.glob("models--own--model/snapshots/*/model.safetensors"))
    assert model.read_bytes() == WEIGHTS
    offline = {"HF_HUB_CACHE": str(folder), "HF_HUB_OFFLINE": "1"}
    shown = command("http://127.0.0.1:9", tmp_path, "data", "own/data", **offline)
    assert "own/data: 3 pairs" in shown.stdout, shown.stderr


def test_what_cannot_be_fetched_is_said(url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = command(url, tmp_path, "fetch", "lmpo_tiny", "data.train.path=own/nothing")
    assert wrong.returncode == 1
    assert "error: dataset own/nothing cannot be fetched from the hub" in wrong.stderr
    assert cli.main(["fetch", "lmpo_tiny", "data.train.path=nowhere.jsonl"]) == 1
    said = capsys.readouterr().err
    assert "error: data nowhere.jsonl is neither on this machine nor a name on the hub" in said
    assert cli.main(["fetch", "lmpo_tiny"]) == 0
    assert "nothing to fetch" in capsys.readouterr().out
