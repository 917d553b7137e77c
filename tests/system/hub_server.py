"""A stand-in for the Hugging Face hub: what its client needs to make a repository and to push into it.

Repositories are made, files are announced, large ones go by git-LFS's batch protocol, and a commit names them all;
what a commit names but nobody uploaded is refused. Content is kept byte for byte.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest

from nemo_lmpo.evaluate.local_server import JsonHandler, serve

TOKEN, READER, OWNER = "hf_writer", "hf_reader", "me"
_COMMIT, _REFUSED = "0" * 39 + "1", 403


@dataclass
class Hub:
    """A running stand-in."""

    url: str = ""
    repositories: dict[str, dict[str, Any]] = field(default_factory=dict)
    """What each was made with."""
    files: dict[str, bytes] = field(default_factory=dict)
    """Of the last commit, by `OWNER/NAME/PATH`."""
    objects: dict[str, bytes] = field(default_factory=dict)
    """Large files by their SHA-256."""
    uploads: list[str] = field(default_factory=list)
    """SHA-256 of each object that came whole, in order."""
    echoes: bool = False
    """Answer a refused request with the token that it carried."""
    cut_uploads: int = 0
    """Read half of so many more uploads, then close the connection."""
    cut_commits: int = 0
    """Close the connection at so many more commits."""


def _answer(hub: Hub, path: str, request: bytes) -> tuple[int, Any]:
    if path == "/api/repos/create":
        return _create(hub, json.loads(request))
    if path == "/api/validate-yaml":
        head = json.loads(request)["content"].split("---\n")
        return (200, {"errors": [], "warnings": []}) if len(head) >= 3 and not head[0] else (400, {"errors": []})
    if found := re.fullmatch(r"/api/(?:models|datasets)/(.+?)/preupload/main", path):
        return 200, {"files": [_mode(hub, found[1], one) for one in json.loads(request)["files"]]}
    if path.endswith(".git/info/lfs/objects/batch"):
        return 200, {"transfer": "basic", "objects": [_lfs(hub, one) for one in json.loads(request)["objects"]]}
    if found := re.fullmatch(r"/api/(?:models|datasets)/(.+?)/commit/main", path):
        return _commit(hub, found[1], [json.loads(line) for line in request.splitlines()])
    return 404, {"error": f"the stand-in does not know {path}"}


def _create(hub: Hub, asked: dict[str, Any]) -> tuple[int, Any]:
    if asked["organization"] != OWNER:
        return _REFUSED, {"error": f"You don't have the rights to create a model under the namespace {OWNER}"}
    name = f"{asked['organization']}/{asked['name']}"
    status = 409 if name in hub.repositories else 200
    hub.repositories.setdefault(name, asked)
    return status, {"url": f"{hub.url}/{'datasets/' if asked.get('type') == 'dataset' else ''}{name}"}


def _mode(hub: Hub, repository: str, asked: dict[str, Any]) -> dict[str, Any]:
    """Tensors and pictures are large files, as in the hub's `.gitattributes`; with the hash of what is there."""
    large = asked["path"].endswith((".safetensors", ".png"))
    content = hub.files.get(f"{repository}/{asked['path']}")
    oid = None
    if content is not None:
        blob = hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()
        oid = hashlib.sha256(content).hexdigest() if large else blob
    return {**asked, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False, "oid": oid}


def _lfs(hub: Hub, asked: dict[str, Any]) -> dict[str, Any]:
    found = {"oid": asked["oid"], "size": asked["size"]}
    if asked["oid"] not in hub.objects:
        found["actions"] = {"upload": {"href": f"{hub.url}/upload/{asked['oid']}"}}
    return found


def _commit(hub: Hub, repository: str, lines: list[dict[str, Any]]) -> tuple[int, Any]:
    files = {}
    for line in lines[1:]:
        value = line["value"]
        content = base64.b64decode(value["content"]) if line["key"] == "file" else hub.objects.get(value["oid"])
        if content is None:
            return 400, {"error": f"nobody uploaded {value['path']}"}
        files[f"{repository}/{value['path']}"] = content
    hub.files.update(files)
    return 200, {"commitUrl": f"{hub.url}/{repository}/commit/{_COMMIT}", "commitOid": _COMMIT}


def _handler(hub: Hub) -> type[JsonHandler]:
    class Handler(JsonHandler):
        _said = ""
        """What the hub says in a header, from where its client takes it."""

        def do_GET(self) -> None:
            name = "/".join(self.path.split("/")[3:5])  # /api/models/OWNER/NAME, or datasets
            known = name in hub.repositories
            if self._may():
                self.send_json(200 if known else 404, {"id": name, "sha": _COMMIT} if known else {"error": "not found"})

        def do_POST(self) -> None:
            request = self.body()
            if not self._may():
                return None
            if "/commit/" in self.path and hub.cut_commits:
                hub.cut_commits -= 1
                return self._hang_up()
            return self.send_json(*_answer(hub, self.path.partition("?")[0], request))

        def do_PUT(self) -> None:
            if hub.cut_uploads:
                hub.cut_uploads -= 1
                self.rfile.read(int(self.headers["Content-Length"]) // 2)
                return self._hang_up()
            content, oid = self.body(), self.path.rpartition("/")[2]
            if hashlib.sha256(content).hexdigest() != oid:
                return self.send_json(400, {"error": "this is not what was announced"})
            hub.objects[oid] = content
            hub.uploads.append(oid)
            return self.send_json(200, {})

        def end_headers(self) -> None:
            if self._said:
                self.send_header("X-Error-Message", self._said)
            super().end_headers()

        def send_json(self, status: int, content: Any) -> None:
            self._said = content.get("error", "")
            super().send_json(status, content)

        def _may(self) -> bool:
            token = self.headers.get("Authorization", "").removeprefix("Bearer ")
            if token not in (TOKEN, READER):
                more = f" {self.headers.get('Authorization')}" if hub.echoes else ""
                self.send_json(401, {"error": f"Invalid username or password.{more}"})
            elif token == READER and self.command == "POST" and "validate" not in self.path:
                self.send_json(_REFUSED, {"error": "This token has no write permission."})
            else:
                return True
            return False

        def _hang_up(self) -> None:
            self.close_connection = True

    return Handler


@contextmanager
def serving() -> Iterator[Hub]:
    """A stand-in in threads of this process."""
    hub = Hub()
    with serve(_handler(hub)) as hub.url:
        yield hub


@contextmanager
def in_place_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """Let the hub's own client of this process, with a token, find the stand-in for a block."""
    with serving() as running:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", running.url)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)  # before it tries again
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield running
