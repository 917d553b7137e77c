"""Words that tell the command what to do are taken off the overrides: no run holds them."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from nemo_lmpo.config.mode import MODE_WORDS, Mode, split_mode, without_mode
from nemo_lmpo.config.recipe import config_as_dict, config_from_mapping, load_recipe
from nemo_lmpo.config.schema import Config
from nemo_lmpo.errors import ConfigError
from nemo_lmpo.train import main

SAVED_BEFORE = Path(__file__).parents[2] / "assets" / "written_by_a3f51bc" / "run" / "config.yaml"


@pytest.mark.parametrize("sign", ["", "+", "++"])
@pytest.mark.parametrize(
    ("override", "mode"),
    [
        ("dry_run=true", Mode(dry_run=True)),
        ("dry_run=True", Mode(dry_run=True)),
        ("dry_run=yes", Mode(dry_run=True)),
        ("dry_run = true", Mode(dry_run=True)),
        ("dry_run=plan", Mode(dry_run="plan")),
        ("dry_run='trace'", Mode(dry_run="trace")),
        ('dry_run="plan"', Mode(dry_run="plan")),
        ("dry_run=false", Mode()),
        ("dry_run=null", Mode()),
        ("GPUS=null", Mode()),
        ("traceback=true", Mode(traceback=True)),
        ("traceback=on", Mode(traceback=True)),
        ("traceback='TRUE'", Mode(traceback=True)),
        ("traceback=off", Mode()),
    ],
)
def test_every_spelling(sign: str, override: str, mode: Mode) -> None:
    assert split_mode(["loss.lam=1", sign + override, "name=x"]) == (mode, ["loss.lam=1", "name=x"])


def test_gpus_are_for_a_plan() -> None:
    assert split_mode(["GPUS=4", "dry_run=plan"])[0] == Mode("plan", "4")
    assert split_mode(["GPUS=64xH100"], Mode(dry_run="plan"))[0] == Mode("plan", "64xH100")
    with pytest.raises(ConfigError, match=r"GPUS=8xH100 is for dry_run=plan.*trainer\.devices"):
        split_mode(["GPUS=8xH100", "dry_run=true"])


def test_the_last_one_counts() -> None:
    assert split_mode(["dry_run=plan", "dry_run=true"])[0] == Mode(dry_run=True)


@pytest.mark.parametrize("override", ["dry_run=maybe", "dry_run=", "dry_run=1", "traceback=2", "traceback=true,false"])
def test_wrong_values_are_named(override: str) -> None:
    with pytest.raises(ConfigError, match=f"^{override.partition('=')[0]}="):
        split_mode([override])


def test_settings_that_end_alike_stay() -> None:
    settings = ["data.GPUS=1", "loss.traceback=true", "dry_runs=1", "~dry_run"]
    assert split_mode(settings) == (Mode(), settings)


def test_no_configuration_holds_them() -> None:
    assert not set(MODE_WORDS) & set(config_as_dict(Config()))


def test_a_configuration_of_an_earlier_version_is_a_recipe(tmp_path: Path) -> None:
    saved = yaml.safe_load(SAVED_BEFORE.read_text())
    assert "dry_run" in saved
    assert "traceback" in saved
    (tmp_path / "again.yaml").write_text(SAVED_BEFORE.read_text())
    config = load_recipe("again", config_dir=tmp_path)
    assert config.loss.name == saved["loss"]["name"]
    assert config.optim.lr == saved["optim"]["lr"]


@pytest.mark.parametrize(
    ("word", "value"), [("dry_run", True), ("dry_run", "plan"), ("GPUS", 4), ("traceback", "true")]
)
def test_a_recipe_that_turns_one_on_is_refused(word: str, value: object) -> None:
    with pytest.raises(ConfigError, match=rf"{word}=.* is not a setting of a run.*command line"):
        config_from_mapping({word: value})
    assert without_mode({word: None, "name": "x"}, []) == {"name": "x"}


@pytest.mark.parametrize("word", ["dry_run=true", "+dry_run=true"])
def test_a_dry_run_starts_nothing(
    word: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["--config-name", "lmpo_tiny", word]) == 0
    assert "The configuration is valid. Nothing was started." in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_the_shown_configuration_is_the_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--config-name", "lmpo_tiny", "--show-config", "dry_run=plan", "GPUS=4", "traceback=true"]) == 0
    assert not set(MODE_WORDS) & set(yaml.safe_load(capsys.readouterr().out))
