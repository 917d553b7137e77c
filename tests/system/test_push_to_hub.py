"""`python -m nemo_lmpo.export RUN --push-to-hub OWNER/NAME` by the hub's own client, against a stand-in for the hub."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from nemo_lmpo.export.__main__ import main as export
from nemo_lmpo.train import main as train
from tests.system.hub_server import OWNER, READER, TOKEN, Hub, in_place_of_the_hub, serving
from tests.system.processes import SMALL

NAME = f"{OWNER}/lmpo_small"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("push") / "lmpo_small"
    assert train(["--config-name", "lmpo_tiny", *SMALL, "trainer.max_steps=1", f"run_dir={folder}"]) == 0
    assert export([str(folder)]) == 0
    return folder


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with in_place_of_the_hub(monkeypatch) as running:
        yield running


def exported(run: Path) -> dict[str, bytes]:
    folder = run / "huggingface"
    return {f"{NAME}/{path.relative_to(folder)}": path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def pushes(run: Path, name: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """The command's status and the last line that it says, if any; what was exported is as before."""
    capsys.readouterr()
    before = exported(run)
    status = export([str(run), "--push-to-hub", name])
    after = exported(run)
    card = f"{NAME}/README.md"  # says the name
    assert {**after, card: b""} == {**before, card: b""}
    return status, next(reversed(capsys.readouterr().err.splitlines()), "")


def test_the_command_pushes_every_byte(run: Path, hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    hub.cut_commits = 1
    arguments = [str(run), "--push-to-hub", NAME, "--private"]
    capsys.readouterr()
    assert export(arguments) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"error: --push-to-hub {NAME}: {hub.url} cannot be reached or broke off (")
    assert last.endswith(
        f"run the same command again, which sends what is missing. All of it is kept in {run}/huggingface"
    )
    assert not hub.files

    uploads = len(hub.uploads)
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-m", "nemo_lmpo.export", *arguments]
    again = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    assert again.stderr.splitlines()[-1] == f"pushed: {hub.url}/{NAME}"
    assert hub.files == exported(run)
    assert hub.repositories[NAME]["visibility"] == "private"
    # The weights had arrived the first time, and do not travel again; drawn again, pictures have the same bytes.
    assert len(hub.uploads) == uploads > 1
    weights = (run / "huggingface" / "model.safetensors").read_bytes()
    assert hub.uploads.count(hashlib.sha256(weights).hexdigest()) == 1


SEEN_IN_PROCESSES = """
import runpy, sys
def note(event, arguments):
    if event in ("subprocess.Popen", "os.posix_spawn", "os.exec", "os.system"):
        with open({path!r}, "a") as file:
            file.write(repr((event, arguments[:2])) + "\\n")
sys.addaudithook(note)
sys.argv = ["nemo-lmpo {module}", *{arguments!r}]
runpy.run_module("nemo_lmpo.{module}", run_name="__main__")
"""


@pytest.mark.parametrize("accepted", [True, False])
def test_the_token_is_in_no_file_no_line_and_no_argument(run: Path, hub: Hub, tmp_path: Path, accepted: bool) -> None:
    token = TOKEN if accepted else "hf_canaryThatTheHubEchoes"
    hub.echoes = True
    home = tmp_path / "home"
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_TOKEN": token, "HF_HUB_DISABLE_XET": "1"}
    environment |= {"HF_HOME": str(home), "XDG_CACHE_HOME": str(home), "HF_HUB_VERBOSITY": "debug"}
    words = [str(run), "--push-to-hub", NAME]
    program = SEEN_IN_PROCESSES.format(path=str(tmp_path / "processes"), module="export", arguments=words)
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode == 0) is accepted, done.stderr
    assert bool(hub.files) is accepted
    assert token not in done.stdout + done.stderr
    left = [path for folder in (run, tmp_path) for path in folder.rglob("*") if path.is_file()]
    assert run / "huggingface" / "README.md" in left
    assert [path for path in left if token.encode() in path.read_bytes()] == []
    assert not any(token.encode() in content for content in hub.files.values())


def test_an_upload_that_is_cut_is_sent_again(run: Path, hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    hub.cut_uploads = 1
    assert pushes(run, NAME, capsys)[0] == 0  # the client tries again by itself
    assert hub.files == exported(run)


def test_a_hub_that_goes_away(run: Path, hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    hub.cut_uploads = 10**6
    status, said = pushes(run, NAME, capsys)
    assert status == 1
    assert "broke off (Error while uploading '" in said
    assert "run the same command again, which sends what is missing" in said
    assert not hub.files
    hub.cut_uploads = 0
    assert pushes(run, NAME, capsys)[0] == 0
    assert hub.files == exported(run)
    made = hub.uploads.copy()
    assert pushes(run, NAME, capsys)[0] == 0  # nothing is new
    assert hub.uploads == made


@pytest.mark.parametrize("token", ["hf_nobody", ""])
def test_a_token_that_is_none(
    run: Path, hub: Hub, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, token: str
) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(run / "no_token"))
    status, said = pushes(run, NAME, capsys)
    assert status == 1
    assert f"{hub.url} does not accept the token (" in said
    assert "log in with `hf auth login` or set HF_TOKEN. All of it is kept in" in said
    assert not hub.repositories


@pytest.mark.parametrize("there", [False, True])
def test_a_token_that_may_not_write(
    run: Path, hub: Hub, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, there: bool
) -> None:
    if there:
        hub.repositories[NAME] = {}
    monkeypatch.setenv("HF_TOKEN", READER)
    status, said = pushes(run, NAME, capsys)
    assert status == 1
    assert (
        "the token may not write there (403 Forbidden: This token has no write permission); take one that may" in said
    )
    assert not hub.files


def test_another_ones_name(run: Path, hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    status, said = pushes(run, "others/model", capsys)
    assert status == 1
    assert "the token may not write there (403 Forbidden: You don't have the rights" in said
    status, said = pushes(run, "me/a/b", capsys)
    assert status == 1
    assert "refuses (Repo id must" in said
    assert not hub.repositories


def test_a_hub_that_is_down(run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with serving() as gone:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", gone.url)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    status, said = pushes(run, NAME, capsys)
    assert status == 1
    assert said.startswith(f"error: --push-to-hub {NAME}: {gone.url} cannot be reached or broke off (")
    assert "refused" in said
