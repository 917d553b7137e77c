"""`nemo-lmpo pairs --push-to-hub OWNER/NAME` by the hub's own client, against a stand-in for the hub."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import DatasetCard

from nemo_lmpo.data.read import open_source
from nemo_lmpo.pairs.__main__ import main as pairs
from tests.system.hub_server import OWNER, READER, Hub, in_place_of_the_hub
from tests.system.test_push_to_hub import SEEN_IN_PROCESSES
from tests.unit.pairs.models import save_policy

NAME = f"{OWNER}/own_pairs"
REWARD = """
def short(prompt, answers):
    return [-float(len(answer)) for answer in answers]
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    save_policy(folder / "policy")
    (folder / "reward.py").write_text(REWARD)
    assert pairs(arguments(folder)) == 0
    return folder


def arguments(folder: Path, *more: str) -> list[str]:
    return [
        *("--model", str(folder / "policy"), "--output", str(folder / "pairs"), "--prompts", "builtin:tiny"),
        *("--limit", "5", "--samples", "3", "--max-new-tokens", "60", "--quiet"),
        *("--reward", f"{folder}/reward.py:short", *more),
    ]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with in_place_of_the_hub(monkeypatch) as running:
        yield running


def pushed(folder: Path) -> dict[str, bytes]:
    """What should be there: all but the journals and the locks."""
    paths = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    stays = [path for path in paths if path.parts[0] == "work" or path.name.startswith(".")]
    assert stays
    return {f"{NAME}/{path}": (folder / path).read_bytes() for path in paths if path not in stays}


def test_the_command_pushes_the_pairs_and_a_card_that_says_where_they_are(
    made: Path, hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    hub.cut_commits = 1
    before = (made / "pairs" / "pairs.jsonl").read_bytes()
    assert pairs(arguments(made, "--push-to-hub", NAME, "--private")) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"error: --push-to-hub {NAME}: {hub.url} cannot be reached or broke off (")
    assert last.endswith(f"run the same command again, which sends what is missing. All of it is kept in {made}/pairs")
    assert not hub.files
    assert pairs(arguments(made, "--push-to-hub", NAME, "--private")) == 0
    assert caplog.messages[-1] == f"pushed: {hub.url}/datasets/{NAME}"
    assert hub.repositories[NAME] | {"type": "dataset", "visibility": "private"} == hub.repositories[NAME]
    assert hub.files == pushed(made / "pairs")
    assert hub.files[f"{NAME}/pairs.jsonl"] == before
    assert {name.removeprefix(f"{NAME}/") for name in hub.files} == {
        *("README.md", "pairs.json", "pairs.jsonl", "report.html"),
        *(f"figures/{name}.png" for name in ("scores", "lengths", "length_and_score")),
    }
    # The pairs were made before there was a name on the hub, and the card has it nevertheless.
    card = DatasetCard(hub.files[f"{NAME}/README.md"].decode())
    assert re.search(rf"load_dataset\(['\"]{NAME}['\"], split=\"train\"\)", card.text)
    data: Any = card.data
    assert data.configs[0]["data_files"] == "pairs.jsonl"
    assert "preference-optimization" in data.tags
    assert str(made) not in card.content
    # Whoever downloads it reads the same pairs.
    for name, content in hub.files.items():
        path = tmp_path / "downloaded" / name.removeprefix(f"{NAME}/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    rows, expected = (
        [row.value["prompt_id"] for row in open_source(str(folder), "train").read()]
        for folder in (tmp_path / "downloaded", made / "pairs")
    )
    assert rows == expected
    uploads = hub.uploads.copy()
    assert pairs(arguments(made, "--push-to-hub", NAME)) == 0  # nothing is new
    assert hub.uploads == uploads


@pytest.mark.parametrize(
    ("token", "said"), [("hf_nobody", "does not accept the token ("), (READER, "the token may not write there (")]
)
def test_a_token_that_may_not(
    made: Path, hub: Hub, token: str, said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    assert pairs(arguments(made, "--push-to-hub", NAME)) == 1
    assert said in capsys.readouterr().err.splitlines()[-1]
    assert not hub.files


def test_the_token_is_in_no_file_no_line_and_no_argument(made: Path, hub: Hub, tmp_path: Path) -> None:
    """Also of pairs that are made by the command that pushes them, and where the hub sends the token back."""
    token = "hf_canaryThatTheHubEchoes"
    hub.echoes = True
    shutil.copytree(made, tmp_path / "made", ignore=shutil.ignore_patterns("pairs"))
    home = tmp_path / "home"
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_TOKEN": token, "HF_HUB_DISABLE_XET": "1"}
    environment |= {"HF_HOME": str(home), "XDG_CACHE_HOME": str(home), "HF_HUB_VERBOSITY": "debug"}
    words = arguments(tmp_path / "made", "--push-to-hub", NAME)
    program = SEEN_IN_PROCESSES.format(path=str(tmp_path / "processes"), module="pairs", arguments=words)
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "does not accept the token" in done.stderr
    assert token not in done.stdout + done.stderr
    left = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert tmp_path / "made" / "pairs" / "README.md" in left
    assert [path for path in left if token.encode() in path.read_bytes()] == []
