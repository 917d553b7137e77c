"""Whose a run directory is."""

from __future__ import annotations

import errno
import json
import logging
import os
import socket
from pathlib import Path

import pytest

from nemo_lmpo.checkpoint.run_directory import RunDirectory
from nemo_lmpo.checkpoint.same_run import changed_settings, default_settings, flatten
from nemo_lmpo.config.recipe import config_as_dict, load_recipe
from nemo_lmpo.config.schema import may_change
from nemo_lmpo.data.tokenizer import load_tokenizer
from nemo_lmpo.errors import CheckpointError, ConfigError
from nemo_lmpo.runtime.chat_record import ChatRecord, chat_json, read_chat_record
from nemo_lmpo.runtime.files import directory_lock
from nemo_lmpo.training.start_model import find_start_model
from tests.unit.checkpoint.runs import content
from tests.unit.formats.tiny_models import save

CHAT = ChatRecord("{{ messages }}", None, adds_bos=False, end_of_turn="<eos>", end_of_turn_id=2)


def directory(path: Path, *overrides: str) -> RunDirectory:
    config = load_recipe("lmpo_tiny", [f"run_dir={path}", *overrides])
    return RunDirectory(config)


def begun(path: Path, *overrides: str) -> None:
    directory(path, *overrides).create()
    (path / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')


def test_the_same_run_may_go_on(tmp_path: Path) -> None:
    begun(tmp_path)
    directory(tmp_path).check_owner()


@pytest.mark.parametrize(
    "override",
    [
        "trainer.max_steps=7",
        "checkpoint.save_interval=3",
        "logging.tensorboard=false",
        "model.tensor_model_parallel_size=2",
        "data.row_tokens=512",
    ],
)
def test_length_cost_and_display_may_change(override: str, tmp_path: Path) -> None:
    begun(tmp_path)
    directory(tmp_path, override).check_owner()


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("optim.lr=0.5", "optim.lr: 0.001 before, 0.5 now"),
        ("loss.lam=0.7", "loss.lam: 0.2 before, 0.7 now"),
        ("model.seed=1", "model.seed: 42 before, 1 now"),
        ("data.train.path=x.jsonl", "data.train.path: 'builtin:tiny' before, 'x.jsonl' now"),
        ("model.global_batch_size=32", "model.global_batch_size: 64 before, 32 now"),
        ("model.architecture.hidden_size=64", "model.architecture.hidden_size: 128 before, 64 now"),
        ("loss=simpo", "loss.name: 'lmpo' before, 'simpo' now"),
    ],
)
def test_what_is_learned_may_not(override: str, told: str, tmp_path: Path) -> None:
    begun(tmp_path)
    with pytest.raises(ConfigError) as caught:
        directory(tmp_path, override).check_owner()
    assert told in str(caught.value)
    assert f"run_dir={tmp_path} holds another run" in str(caught.value)
    assert "choose another run_dir" in str(caught.value)
    assert f"checkpoint.allow_changes=[{override.split('=')[0]}" in str(caught.value) or override == "loss=simpo"


def test_a_run_that_never_began_can_be_corrected(tmp_path: Path) -> None:
    """A mistyped data path must not make the directory unusable."""
    directory(tmp_path, "data.train.path=mistyped.jsonl").create()
    directory(tmp_path).check_owner()
    (tmp_path / "checkpoints" / "step_0000001").mkdir(parents=True)
    with pytest.raises(ConfigError, match="holds another run"):
        directory(tmp_path).check_owner()


def test_an_unreadable_configuration_is_named(tmp_path: Path) -> None:
    begun(tmp_path)
    (tmp_path / "config.yaml").write_text("a: [1\n")
    with pytest.raises(ConfigError, match=r"config.yaml is not readable; remove it or choose another run_dir"):
        directory(tmp_path).check_owner()


def test_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"run_dir=.*file/run cannot be written \(Not a directory\); choose another"):
        directory(tmp_path / "file" / "run").create()
    with pytest.raises(ConfigError, match=r"run_dir=.*file is a file; give a directory"):
        directory(tmp_path / "file").check_owner()


def test_default_place(tmp_path: Path) -> None:
    assert directory(tmp_path).path == tmp_path
    config = load_recipe("lmpo_tiny")
    assert RunDirectory(config).path == Path("runs/lmpo_tiny")


def test_what_a_resumed_run_may_change() -> None:
    """Cost, length and display may change; what is learned from which pairs may not."""
    keys = {key for key, _ in flatten(config_as_dict(load_recipe("lmpo_tiny")))}
    fixed = {key for key in keys if not may_change(key)}
    for key in ("logging.wandb.name", "checkpoint.keep_last", "trainer.max_steps", "model.tensor_model_parallel_size"):
        assert key in keys - fixed, key
    for key in ("model.architecture.hidden_size", "optim.lr", "loss.beta", "data.train.path", "data.max_length"):
        assert key in fixed, key


@pytest.mark.parametrize("own_tokenizer", [True, False])
def test_checkpoints_keep_the_start_models_files(own_tokenizer: bool, tmp_path: Path) -> None:
    """Byte for byte: the tokenizer's unless another one is set, and the generation settings in any case."""
    model = save("llama3", tmp_path / "hf")
    (model / "special_tokens_map.json").write_text('{"bos_token":   "w1"}')
    (model / "generation_config.json").write_text('{"eos_token_id": [2, 7],   "temperature": 0.7, "do_sample": true}')
    overrides = [f"model.restore_from_path={model}", "model.architecture=null"]
    overrides.append(f"model.tokenizer={'null' if own_tokenizer else 'builtin:tiny'}")
    run = directory(tmp_path / "run", *overrides)
    start = find_start_model(load_recipe("lmpo_tiny", overrides).model)
    (tmp_path / "step").mkdir()
    run.write_sidecars(tmp_path / "step", start, load_tokenizer(start.tokenizer))
    kept = tmp_path / "step" / "tokenizer"
    names = {"generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"}
    for name in names | {"chat_template.jinja"}:
        same = (kept / name).exists() and (kept / name).read_bytes() == (model / name).read_bytes()
        assert same == (own_tokenizer or name == "generation_config.json"), name
    assert not (kept / "config.json").exists()
    assert not list(kept.glob("*.safetensors"))


def test_settings_that_came_later_or_are_gone(tmp_path: Path) -> None:
    """A run of an earlier version goes on unless a setting that it had not is set to something else."""
    run = directory(tmp_path)
    before = {key: value for key, value in flatten(run.plain) if key != "loss.std_floor"} | {"optim.momentum": 0.5}
    now = dict(flatten(run.plain))
    assert changed_settings(before, now, run.defaults) == {}
    changed = directory(tmp_path, "loss.std_floor=0.5")
    changes = changed_settings(before, dict(flatten(changed.plain)), changed.defaults)
    assert changes == {"loss.std_floor": (run.defaults["loss.std_floor"], 0.5)}
    other = {**before, "model.architecture.hidden_size": 64, "model.architecture.rope_scaling": "linear"}
    assert changed_settings(other, now, run.defaults).keys() == {
        "model.architecture.hidden_size",
        "model.architecture.rope_scaling",
    }


def test_a_default_that_means_something_else_than_before() -> None:
    """CPO summed its NLL before it took the mean; a run of then must say so to go on."""
    config = load_recipe("lmpo_tiny", ["loss=cpo"])
    assert default_settings(config)["loss.nll"] == "sum"
    assert config.loss.nll == "mean"


def test_a_change_on_purpose_is_admitted_and_noted(tmp_path: Path) -> None:
    begun(tmp_path)
    changed = ("optim.lr=0.5", "loss.beta=3", "checkpoint.allow_changes=[optim.lr,loss]")
    run = directory(tmp_path, *changed)
    run.check_owner()
    run.create()
    with pytest.raises(ConfigError, match=r"optim\.lr"):
        directory(tmp_path, *changed[:2]).check_owner()  # it has not gone on yet: the settings are still the old ones
    run.begin(7, CHAT)
    (note,) = (json.loads(line) for line in (tmp_path / "changes.jsonl").read_text().splitlines())
    assert note["after_step"] == 7
    assert note["changes"] == {"optim.lr": [0.001, 0.5], "loss.beta": [2.0, 3.0]}
    directory(tmp_path, *changed[:2]).check_owner()  # from now on these are its settings
    with pytest.raises(ConfigError, match=r"optim.lr: 0.5 before, 0.001 now"):
        directory(tmp_path).check_owner()


def test_a_resumed_run_keeps_the_chat_template_that_it_began_with(tmp_path: Path) -> None:
    """Unless it is changed on purpose; a run that never began keeps nothing."""
    directory(tmp_path).begin(0, CHAT)
    assert directory(tmp_path).kept_template() is None
    begun(tmp_path)
    assert directory(tmp_path).kept_template() == CHAT.template
    assert directory(tmp_path, "checkpoint.resume=false").kept_template() is None
    assert directory(tmp_path, "checkpoint.allow_changes=[data.chat_template]").kept_template() is None
    (tmp_path / "chat.json").unlink()  # a run of an earlier version
    assert directory(tmp_path).kept_template() is None


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "[" * 100000,
        "{}",
        chat_json(CHAT).replace("messages", "others"),
        chat_json(CHAT).replace("false", "0"),
        chat_json(CHAT).replace("2,", "-2,"),
        chat_json(CHAT).replace("null", "3"),
        chat_json(CHAT).replace('"<eos>"', "null"),
    ],
)
def test_a_damaged_record_of_the_chat_is_named(content: str, tmp_path: Path) -> None:
    path = tmp_path / "chat.json"
    path.write_text(content)
    with pytest.raises(CheckpointError, match=r"chat\.json .*; restore the file"):
        read_chat_record(path)
    path.unlink()
    path.symlink_to("/dev/zero")
    with pytest.raises(CheckpointError, match=r"chat\.json is not readable .*; restore the file"):
        read_chat_record(path)
    path.unlink()
    path.write_text(chat_json(CHAT))
    assert read_chat_record(path) == CHAT


def test_only_what_is_named_is_admitted(tmp_path: Path) -> None:
    begun(tmp_path)
    with pytest.raises(ConfigError) as caught:
        directory(tmp_path, "optim.lr=0.5", "model.seed=1", "checkpoint.allow_changes=[optim.lr]").check_owner()
    assert "model.seed" in str(caught.value)
    assert "optim.lr: " not in str(caught.value)


def test_what_is_no_setting_cannot_be_admitted() -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe("lmpo_tiny", ["checkpoint.allow_changes=[optim.lrr,model.architecture.rope_theta,loss.beta]"])
    assert "checkpoint.allow_changes names 'optim.lrr', which is not a setting; did you mean optim.lr?" in str(
        caught.value
    )
    assert "\n" not in str(caught.value)


def test_starting_anew_moves_the_run_before_aside(tmp_path: Path) -> None:
    run = tmp_path / "run"
    for number in (1, 2):
        begun(run, "checkpoint.resume=true")
        (run / "checkpoints").mkdir(exist_ok=True)
        with directory(run, "checkpoint.resume=false", f"optim.lr=0.{number}").taken():
            assert not (run / "metrics.jsonl").exists()
            assert not (run / "checkpoints").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "run.before", "run.before.2"]
    for moved in ("run.before", "run.before.2"):
        assert (tmp_path / moved / "metrics.jsonl").read_text() == '{"step": 1, "loss": 1.0}\n'
        assert (tmp_path / moved / "checkpoints").is_dir()


def test_a_second_run_is_refused_while_the_first_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nemo_lmpo.runtime.files._PATIENCE_SECONDS", 0.0)
    with directory(tmp_path).taken():
        before = content(tmp_path)
        for override in ("checkpoint.resume=true", "checkpoint.resume=false"):
            with pytest.raises(ConfigError) as caught, directory(tmp_path, override).taken():
                pass
            message = str(caught.value)
            assert f"run_dir={tmp_path} is in use by process {os.getpid()} on host {socket.gethostname()}" in message
        assert content(tmp_path) == before
    with directory(tmp_path).taken():
        pass


def test_storage_without_locks_gives_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def unsupported(*args: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", unsupported)
    with caplog.at_level(logging.WARNING), directory_lock(tmp_path):
        pass
    assert "without file locks" in caplog.text
