"""Credentials reach whom they are for, and no file and no printed line.

Each test plants canaries wherever a user can give a secret, and then looks at every file left behind and at everything
that was printed.
"""

from __future__ import annotations

import base64
import json
import logging
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest

from nemo_lmpo.compare import main as compare
from nemo_lmpo.errors import UserError, without_secrets
from nemo_lmpo.evaluate.__main__ import main as evaluate
from nemo_lmpo.evaluate.environment import VARIABLE
from nemo_lmpo.runtime.credentials import Address, hide_credentials, stripped, whole
from nemo_lmpo.train import main as train
from tests.system.processes import SMALL, training
from tests.system.stub_server import Stub, serving
from tests.system.tracking_server import TrackingServer, tracking_server

PASSWORD, TOKEN, KEY = "canary/pass:word@1", "canary-token-2", "canary-key-3"
BASIC = "Basic " + base64.b64encode(f"me:{PASSWORD}".encode()).decode()
QUOTED = quote(PASSWORD, safe="")
FORMS = ("canary", BASIC.removeprefix("Basic "))
ENVIRONMENT = {
    "OPENAI_API_KEY": KEY,
    "VLLM_API_KEY": KEY,
    "HF_TOKEN": KEY,
    "WANDB_API_KEY": KEY,
    "HTTPS_PROXY": f"http://me:{QUOTED}@127.0.0.1:9",
    "NO_PROXY": "127.0.0.1",
    "WANDB_MODE": "offline",
}


def with_credentials(url: str, *, query: bool = False) -> str:
    scheme, rest = url.split("://")
    return f"{scheme}://me:{QUOTED}@{rest}{f'?api_key={TOKEN}' if query else ''}"


def assert_nothing_left(folder: Path, *printed: str) -> None:
    """No canary in any file below, in its name, in the target of a link, or in what was printed."""
    for text in printed:
        assert not any(form in text for form in FORMS), text
    for path in folder.rglob("*"):
        name = f"{path.relative_to(folder)} {path.readlink() if path.is_symlink() else ''}"
        content = path.read_bytes() if path.is_file() else b""
        found = [form for form in FORMS if form in name or form.encode() in content]
        assert not found, f"{path} holds {found}: {content[max(0, content.find(b'canary') - 100) :][:300]!r}"


@pytest.fixture(autouse=True)
def planted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")


@pytest.fixture
def tracking() -> Iterator[TrackingServer]:
    with tracking_server() as server:
        yield server


def run_of(folder: Path, *more: str) -> list[str]:
    settings = (one for one in SMALL if one != "logging.report=false")
    return ["--config-name", "lmpo_tiny", *settings, "trainer.max_steps=2", f"run_dir={folder / 'run'}", *more]


TRACKERS = ("logging.mlflow.experiment=e", "logging.wandb.project=p", "logging.tensorboard=true", "logging.samples=1")


def test_a_run_leaves_no_credentials_behind(tmp_path: Path, tracking: TrackingServer) -> None:
    uri = f"logging.mlflow.tracking_uri={with_credentials(tracking.url)}"
    first = run_of(tmp_path, *TRACKERS, uri, "checkpoint.export_hf=true")
    with training(first, tmp_path, environment=dict(os.environ)) as process:
        process.join()
    assert process.exitcode == 0, (tmp_path / "output").read_text()
    assert tracking.metrics
    assert set(tracking.authorizations) == {BASIC}
    assert (tmp_path / "run" / "report.html").exists()
    assert tracking.url in (tmp_path / "run" / "config.yaml").read_text()  # what remains is still said
    assert_nothing_left(tmp_path)
    # The same run without a password, and with one in the variable.
    more = (f"logging.mlflow.tracking_uri={tracking.url}", "trainer.max_steps=3")
    with training(run_of(tmp_path, *TRACKERS, *more), tmp_path, environment=dict(os.environ)) as process:
        process.join()
    assert process.exitcode == 0, (tmp_path / "output").read_text()
    variable = {**os.environ, "MLFLOW_TRACKING_URI": with_credentials(tracking.url)}
    with training(run_of(tmp_path, *TRACKERS, "trainer.max_steps=4"), tmp_path, environment=variable) as process:
        process.join()
    assert process.exitcode == 0, (tmp_path / "output").read_text()
    assert tracking.authorizations[-1] == BASIC
    assert_nothing_left(tmp_path)


@pytest.mark.parametrize("fault", ["500", "refused", "reset", "not json"])
def test_a_tracking_server_that_fails_is_named_without_them(
    fault: str, tmp_path: Path, tracking: TrackingServer
) -> None:
    tracking.fail(fault)
    uri = f"logging.mlflow.tracking_uri={with_credentials(tracking.url)}"
    arguments = run_of(tmp_path, "logging.mlflow.experiment=e", uri)
    with training(arguments, tmp_path, environment=dict(os.environ)) as process:
        process.join()
    assert process.exitcode == 1
    assert "MLflow cannot start" in (tmp_path / "output").read_text()
    assert_nothing_left(tmp_path)


URL = f"http://me:{QUOTED}@host.example/a?api_key={TOKEN}"
HALF = f"me:{QUOTED}@host.example:8000"
REFUSED = {
    "unreadable": [f"logging.mlflow.tracking_uri={URL}&x=["],
    "unknown key": [f"loging.mlflow.tracking_uri={URL}"],
    "wrong type": [f"optim.lr='{URL}'"],
    "wrong choice": [f"trainer.precision='{URL}'"],
    "data": [f"data.train.path='{URL}'"],
    "no scheme": [f"data.train.path='{HALF}'"],
    "list of data": [f"data.train.path=['{URL}','{URL}']"],
    "model": [f"model.restore_from_path='{URL}'"],
    "tokenizer": [f"model.tokenizer='{URL}'"],
    "template": [f"data.chat_template='{URL}'"],
    "loss": [f"loss.name='{URL}'"],
    "recipe": ["--config-name", URL],
    "folder": ["--config-dir", URL],
    "traceback": [f"model.restore_from_path='{URL}'", "traceback=true"],
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_do_not_show_them(name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert train([*run_of(tmp_path), *REFUSED[name]]) == 1
    printed = "".join(capfd.readouterr())
    assert "error: " in printed
    assert_nothing_left(tmp_path, printed)


@pytest.mark.parametrize(
    "more", [["--show-config"], ["dry_run=true", f"+model.architecture.a='{URL}'", f"model.restore_from_path='{URL}'"]]
)
def test_what_is_shown_of_a_configuration(more: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    tracking = ("logging.mlflow.experiment=e", f"logging.mlflow.tracking_uri='{URL}'")
    assert train([*run_of(tmp_path), *tracking, *more]) == 0
    printed = "".join(capfd.readouterr())
    assert_nothing_left(tmp_path, printed)
    assert "http://host.example/a" in printed or "--show-config" not in more


def test_a_comparison_shows_none(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    uri = f"logging.mlflow.tracking_uri='{URL}'"
    arguments = ["--suite", "figure2", "--output", str(tmp_path / "out")]
    assert compare([*arguments, "--list", "logging.mlflow.experiment=e", uri]) == 0
    assert compare([*arguments, uri, f"optim.lrr='{URL}'"]) == 1
    with pytest.raises(SystemExit):
        compare([*arguments, f"--unknown={URL}"])  # argparse's own error
    printed = "".join(capfd.readouterr())
    assert printed.count("http://***@host.example/a?api_key=***") > 2
    assert_nothing_left(tmp_path, printed)


@pytest.fixture
def judge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stub]:
    monkeypatch.chdir(tmp_path)
    with serving() as stub:
        yield stub


def evaluation(folder: Path, url: str, *more: str) -> list[str]:
    rows = [{"id": str(number), "question": "q", "baseline_answer": "a b c"} for number in range(3)]
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    answers = [{"question_id": row["id"], "choices": [{"turns": [{"content": "d e f"}]}]} for row in rows]
    (folder / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in answers))
    sides = "".join(f"<|The Start of Assistant {x}'s Answer|>\n{{ANSWER_{x}}}\n<|The End|>\n" for x in "AB")
    (folder / "prompt.json").write_text(json.dumps({"system": "Judge.", "template": "{QUESTION}\n" + sides}))
    given = ["--answers", "answers.jsonl", "--questions", "questions.jsonl", "--judge-prompt", "prompt.json"]
    return ["arena_hard", *given, "--judge-endpoint", url, "--retries", "0", "--quiet", "--output", "out", *more]


needs_scoring = pytest.mark.skipif(not os.environ.get(VARIABLE), reason=f"set {VARIABLE} (make eval-env)")


@needs_scoring
def test_an_evaluation_leaves_no_credentials_behind(
    tmp_path: Path, judge: Stub, capfd: pytest.CaptureFixture[str]
) -> None:
    judge.refusal = f"wrong key {KEY} or {TOKEN} or {PASSWORD} or {BASIC}"
    assert evaluate(evaluation(tmp_path, with_credentials(judge.url, query=True))) == 1
    judge.refusal = ""
    assert evaluate(evaluation(tmp_path, with_credentials(judge.url, query=True))) == 0
    assert set(judge.credentials) == {(BASIC, f"api_key={TOKEN}")}
    # Another password, or none, is the same evaluation.
    judge.credentials.clear()
    assert evaluate(evaluation(tmp_path, judge.url)) == 0
    assert {header for header, _ in judge.credentials} == {f"Bearer {KEY}"}
    assert evaluate(["tables", "out", "--output", "page"]) == 0
    result = json.loads(Path("out/arena_hard/result.json").read_text())
    assert result["judge"]["endpoint"] == judge.url
    assert "http://***@127.0.0.1" in result["command"]
    assert_nothing_left(tmp_path, *capfd.readouterr())


@needs_scoring
@pytest.mark.parametrize("url", [HALF, f"http://me:{TOKEN}#1@host:80", f"http://me:{QUOTED}@host:a/", f"ftp://{HALF}"])
@pytest.mark.usefixtures("judge")
def test_an_address_that_is_none_is_not_shown(url: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert evaluate(evaluation(tmp_path, url)) == 1
    printed = "".join(capfd.readouterr())
    assert "is not a URL; give one such as http://localhost:8000/v1" in printed
    assert_nothing_left(tmp_path, printed)


@needs_scoring
def test_a_key_in_the_place_of_its_variable(tmp_path: Path, judge: Stub, capfd: pytest.CaptureFixture[str]) -> None:
    assert evaluate(evaluation(tmp_path, judge.url, "--judge-key", KEY)) == 1
    printed = "".join(capfd.readouterr())
    assert "--judge-key is not the name of an environment variable" in printed
    assert_nothing_left(tmp_path, printed)


def test_libraries_cannot_log_or_raise_them(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """What nobody foresaw: lines of any logger, and errors without a handler in any thread."""
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
    monkeypatch.setattr(threading, "excepthook", threading.__excepthook__)
    before = logging.getLogRecordFactory()
    logging.setLogRecordFactory(logging.LogRecord)
    library = logging.getLogger("a.library")
    library.propagate = False
    library.addHandler(handler := logging.StreamHandler(sys.stderr))
    try:
        hide_credentials()
        library.warning("Retrying %s after %r", URL, ValueError(f"Bearer {TOKEN}"))
        library.warning("%s (%d%%)", KEY, 5)
        library.warning({"url": URL})
        try:
            raise OSError(f"cannot reach {URL}")
        except OSError:
            library.exception("failed at %s", URL)
            sys.excepthook(*sys.exc_info())

        def fail() -> None:
            raise OSError(URL)

        thread = threading.Thread(target=fail)
        thread.start()
        thread.join()
    finally:
        library.removeHandler(handler)
        logging.setLogRecordFactory(before)
    printed = "".join(capfd.readouterr())
    assert printed.count("host.example/a?api_key=***") == 6
    assert "canary" not in printed


def test_no_text_takes_long() -> None:
    """Messages repeat what files hold: the time grows with the length only, not with its square."""
    for piece in ("a:", "a:b", "://", "?a=", "Bearer ", "%5B", "a.b-c:", "a@b", "x", "http://a:b@c/?x=y&"):
        text = piece * (300_000 // len(piece)) + "="
        assert len(without_secrets(text)) <= 2 * len(text)  # ten minutes with unbounded lengths


def test_an_address_is_taken_apart() -> None:
    address = Address.of(f"https://me:{QUOTED}@Host.example:8443/v1/?api_key={TOKEN}&b=#canary")
    assert address.shown == "https://host.example:8443/v1/"
    assert (address.user, address.password, address.query) == ("me", PASSWORD, {"api_key": TOKEN, "b": ""})
    assert address.headers() == {"Authorization": BASIC}
    assert "canary" not in repr(address)
    assert Address.of("http://[::1]:80/").shown == "http://[::1]:80/"
    for same in ("http://host/v1", "pairs.jsonl", "org/model", "/a/b?c=d", "see http://a:b@c", "12:30"):
        assert stripped(same) == same
    assert whole(stripped(URL)) == URL
    assert "canary" not in str(UserError(f"{HALF} and {URL}"))
    plain = "data.train.path=a/b:c is at 12:30; write to x@example.org about http://host/a, key=value"
    assert without_secrets(plain) == plain
