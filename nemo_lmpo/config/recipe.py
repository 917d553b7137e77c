"""Finds a recipe by name, applies overrides, and turns it into a checked configuration.

Recipes are Hydra configurations that hold only what differs from the dataclasses of :mod:`nemo_lmpo.config.schema`.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nemo_lmpo.config.coerce import coerce
from nemo_lmpo.config.loss_section import parse_loss
from nemo_lmpo.config.schema import Config, all_keys
from nemo_lmpo.errors import ConfigError
from nemo_lmpo.loss.registry import DEFAULT_LOSS

GROUPS = ("model", "data", "loss", "optim", "trainer", "checkpoint", "logging", "setting")
_VALUE_OVERRIDE = re.compile(r"^[\w.@/-]+=")
_LOSS_CHOICE = re.compile(r"^\+{0,2}loss=([\w/-]+)$")
_LOSS_OPTION = re.compile(r"^\+{0,2}loss\.(\w+)=(.*)$")


def recipes_dir() -> Path:
    """The recipes that come with the package: inside an installed wheel, or beside it in a checkout."""
    package = Path(__file__).resolve().parent.parent
    inside = package / "recipes"
    return inside if inside.is_dir() else package.parent / "recipes"


def recipe_names(directory: Path) -> list[str]:
    """Names that ``--config-name`` takes from a directory."""
    return sorted(path.stem for path in directory.glob("*.yaml"))


def load_recipe(name: str, overrides: Sequence[str] = (), *, config_dir: Path | None = None) -> Config:
    """Compose a recipe with overrides and check every key and type.

    Args:
        name: file name without `.yaml`, looked for in ``config_dir`` and then among the package's recipes.
        overrides: Hydra overrides, as `model.tensor_model_parallel_size=2`; groups are chosen as `loss=simpo`.
        config_dir: the user's own recipes; may extend the package's by their name in `defaults`.

    Raises:
        ConfigError: unknown recipe, unknown key, wrong type, or an override that cannot be read.
    """
    return config_from_mapping(compose(name, overrides, config_dir=config_dir), name=name)


def compose(name: str, overrides: Sequence[str], *, config_dir: Path | None) -> dict[str, Any]:
    """A recipe as plain values, keys not checked yet.

    Choosing another loss, as `loss=simpo` or `loss.name=simpo`, leaves the recipe's loss options behind: they belong
    to the recipe's own loss.
    """
    files = [found[1] for override in overrides if (found := _LOSS_CHOICE.match(override))]
    given = {found[1]: found[2] for override in overrides if (found := _LOSS_OPTION.match(override))}
    rest = [override for override in overrides if not _LOSS_CHOICE.match(override)]
    plain = _compose(name, rest, config_dir)
    if files:
        chosen = _loss_file(files[-1], config_dir)
    elif "name" in given:
        own = _compose(name, [override for override in rest if not _LOSS_OPTION.match(override)], config_dir)
        if plain["loss"]["name"] == (own.get("loss") or {}).get("name", DEFAULT_LOSS):
            return plain
        chosen = {}
    else:
        return plain
    plain["loss"] = {**chosen, **{option: plain["loss"][option] for option in given}}
    return plain


def _loss_file(choice: str, config_dir: Path | None) -> dict[str, Any]:
    """A file of the group `loss`."""
    import yaml

    folders = [recipes_dir() / "loss"] if config_dir is None else [config_dir / "loss", recipes_dir() / "loss"]
    for folder in folders:
        path = folder / f"{choice}.yaml"
        if path.is_file():
            try:
                return dict(yaml.safe_load(path.read_text()))
            except (yaml.YAMLError, TypeError, ValueError):
                raise ConfigError(f"{path} holds no options of a loss; write them as `name: simpo`") from None
    known = sorted({known for folder in folders for known in recipe_names(folder)})
    near = difflib.get_close_matches(choice, known, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise ConfigError(f"loss={choice} is no file of the group loss{hint} Known: {', '.join(known)}")


def _compose(name: str, overrides: Sequence[str], config_dir: Path | None) -> dict[str, Any]:
    """Hydra's composition."""
    import yaml
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    name = name.removesuffix(".yaml")
    _require_recipe(name, config_dir)
    _require_readable(overrides)
    folders = [recipes_dir()] if config_dir is None else [config_dir, recipes_dir()]
    primary = next(folder for folder in folders if name in recipe_names(folder))
    search = [f"hydra.searchpath=[file://{folder.resolve()}]" for folder in folders if folder != primary]
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(config_dir=str(primary.resolve()), version_base="1.3"):
            config = hydra_compose(name, overrides=[*search, *map(_force, overrides)])
            plain = OmegaConf.to_container(config, resolve=True)
    except (HydraException, OmegaConfBaseException, yaml.YAMLError, OSError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"recipe {name}: {reason}") from None
    if not isinstance(plain, dict):
        raise ConfigError(f"recipe {name}: {primary / name}.yaml holds no settings; write them as `key: value`")
    return {str(key): value for key, value in plain.items()}


def _require_recipe(name: str, config_dir: Path | None) -> None:
    if config_dir is not None and not config_dir.is_dir():
        raise ConfigError(f"--config-dir {config_dir} is not a directory; give the folder of your recipes")
    folders = [recipes_dir()] if config_dir is None else [config_dir, recipes_dir()]
    known = sorted({recipe for folder in folders for recipe in recipe_names(folder)})
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(f"--config-name {name} is no recipe{hint} Known: {', '.join(known)}")


def _require_readable(overrides: Sequence[str]) -> None:
    """Name the override that cannot be read; Hydra tells only at which sign it stopped."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    for override in overrides:
        try:
            OverridesParser.create().parse_override(override)
        except HydraException as error:
            reason = str(error).strip().splitlines()[0]
            raise ConfigError(
                f"{override} cannot be read ({reason}); write key=value, and quote a value with special signs "
                f"twice: \"key='value'\""
            ) from None


def _force(override: str) -> str:
    """Let `a.b=c` set keys that a recipe does not mention; unknown ones are caught later, with a suggestion."""
    if not _VALUE_OVERRIDE.match(override):
        return override
    key, value = override.split("=", 1)
    if key in GROUPS and re.fullmatch(r"[\w/-]+", value):
        return override  # choice of a group's file
    return f"++{override}"


def config_from_mapping(raw: Mapping[str, Any], *, name: str = "run") -> Config:
    """A checked configuration from plain values.

    Raises:
        ConfigError: unknown keys (with the nearest known one), wrong types, unknown choices; all of them, one a line.
    """
    values = {"name": name, **raw}
    section = values.pop("loss", None)
    config: Config = coerce(Config, values, unknown=_unknown_key)
    config.loss = parse_loss(section)
    return config


def _unknown_key(key: str, value: Any) -> str:
    parent, _, last = key.rpartition(".")
    known = all_keys()
    siblings = [name.rpartition(".")[2] for name in known if name.rpartition(".")[0] == parent]
    near = [name for name in siblings if name.startswith(last) or last.startswith(name)]
    near = near or difflib.get_close_matches(last, siblings, n=1)
    nearest = [f"{parent}.{near[0]}".lstrip(".")] if near else difflib.get_close_matches(key, known, n=1)
    elsewhere = [name for name in known if name.rpartition(".")[2] == last]
    suggestion = next(iter([*elsewhere, *nearest]), None)
    return f"unknown key {key}" + (f"; did you mean {suggestion}?" if suggestion else f"; known: {', '.join(siblings)}")


def config_as_dict(config: Config) -> dict[str, Any]:
    """Plain values, loss options included, as saved in `config.yaml`."""
    return dataclasses.asdict(config)
