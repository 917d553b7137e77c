"""Finds a recipe by name, applies overrides, and turns it into a checked configuration.

Recipes are Hydra configurations that hold only what differs from the dataclasses of :mod:`nemo_lmpo.config.schema`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence, Set
from functools import partial
from pathlib import Path
from typing import Any

from nemo_lmpo.config.coerce import collect, raise_all
from nemo_lmpo.config.composition import GROUP_CHOICE, LOSS, SETTING, NoGroupError, compose_plain
from nemo_lmpo.config.loss_section import collect_loss, loss_name
from nemo_lmpo.config.mode import without_mode
from nemo_lmpo.config.rules import problems_together
from nemo_lmpo.config.schema import Config
from nemo_lmpo.config.unknown_keys import about_unknown_key
from nemo_lmpo.errors import ConfigError, did_you_mean, first_line, nearest, printable
from nemo_lmpo.loss.packages import package_losses

_VALUE_OVERRIDE = re.compile(r"^[\w.@/-]+=")


def recipes_dir() -> Path:
    """The recipes that come with the package: inside an installed wheel, or beside it in a checkout."""
    package = Path(__file__).resolve().parent.parent
    inside = package / "recipes"
    return inside if inside.is_dir() else package.parent / "recipes"


_ONE_LOSS = {"_ultrachat": "sft", "_unpaired": "kto"}
"""How settings end whose data one loss alone trains on: conversations, and answers with a label."""


def recipe_names(config_dir: Path | None = None) -> list[str]:
    """Names that ``--config-name`` takes: files, and every loss on every setting as `LOSS_SETTING`."""
    return _names(_folders(config_dir))


def recipe_file(name: str) -> Path | None:
    """The file that a recipe's name is the path of: one with a slash, or `NAME.yaml` in the working directory.

    Raises:
        ConfigError: there is no such file, or it does not end in `.yaml`.
    """
    path = Path(name).expanduser()
    if "/" not in name and not (path.suffix in (".yaml", ".yml") and path.is_file()):
        return None
    if path.is_dir():
        raise ConfigError(f"--config {name} is a directory; give a recipe's file in it, or --config-dir")
    if not path.is_file():
        raise ConfigError(f"--config {name} does not exist; give the file of a recipe, or a name (--list shows them)")
    if path.suffix != ".yaml":
        raise ConfigError(f"--config {name} must end in .yaml; rename it")
    return path


def _names(folders: Sequence[Path]) -> list[str]:
    return sorted({path.stem for folder in folders for path in folder.glob("*.yaml")} | _products(folders).keys())


def load_recipe(name: str, overrides: Sequence[str] = (), *, config_dir: Path | None = None) -> Config:
    """Compose a recipe with overrides and check every key and type.

    Args:
        name: a file's name without `.yaml`, looked for in ``config_dir`` and then among the package's recipes, or
            `LOSS_SETTING`, or the path of a file, whose folder is then looked into first.
        overrides: Hydra overrides, as `model.tensor_model_parallel_size=2`; groups are chosen as `loss=simpo`.
        config_dir: the user's own recipes; may extend the package's by their name in `defaults`.

    Raises:
        ConfigError: unknown recipe, unknown key, wrong type, or an override that cannot be read.
    """
    return config_from_mapping(compose(name, overrides, config_dir=config_dir), name=_stem(name))


def _stem(name: str) -> str:
    return name.rpartition("/")[2].removesuffix(".yaml")


def compose(name: str, overrides: Sequence[str] = (), *, config_dir: Path | None = None) -> dict[str, Any]:
    """A recipe as plain values, keys not checked yet.

    Another loss, as `loss=simpo` or `loss.name=simpo`, brings what is particular to it on the recipe's setting, and
    leaves behind what is particular to the recipe's own loss.
    """
    if config_dir is not None and not config_dir.is_dir():
        raise ConfigError(f"--config-dir {config_dir} is not a directory; give the folder of your recipes")
    file, name = None if _is_in(config_dir, name) else recipe_file(name), _stem(name)
    folders = _folders(config_dir, file)
    known = _names(folders)
    if name not in known:
        near = nearest(name, known)
        remedy = "`nemo-lmpo train --list` shows the recipes" if near is None else f"did you mean {near}?"
        raise ConfigError(f"{printable(name)} is not a recipe; {remedy}")
    _require_readable(overrides)
    groups = {path.name for folder in folders for path in folder.iterdir() if path.is_dir()}
    with_groups = [_choose_loss_by_name(override, folders) for override in overrides]
    for override in with_groups:
        _require_choice(override, groups, folders)
    hydras = partial(compose_plain, name, groups=groups, folders=folders, products=_products(folders))
    try:
        return hydras([_for_hydra(override, groups) for override in with_groups])
    except NoGroupError:
        # The user's own recipe names no loss file: then `loss=simpo` adds one, and `loss.name=simpo` is a value.
        added = [re.sub(r"^loss=", "+loss=", override) for override in overrides]
        return hydras([_for_hydra(override, groups) for override in added])


def _is_in(config_dir: Path | None, name: str) -> bool:
    return config_dir is not None and "/" not in name and (config_dir / f"{_stem(name)}.yaml").is_file()


def _folders(config_dir: Path | None, file: Path | None = None) -> list[Path]:
    """Where recipes are looked for, each folder once: the file's, the user's, the package's."""
    own = [folder for folder in (file and file.parent, config_dir) if folder is not None]
    folders = {folder.resolve(): folder for folder in [*own, recipes_dir()]}
    package = folders.pop(recipes_dir().resolve())
    return [*folders.values(), package]


def _choices(group: str, folders: Sequence[Path]) -> list[str]:
    packages = package_losses() if group == LOSS else ()
    return sorted({path.stem for folder in folders for path in (folder / group).glob("*.yaml")} | set(packages))


def _products(folders: Sequence[Path]) -> dict[str, tuple[str, str]]:
    """Loss and setting by the name of both together; files of the group `loss` that vary a loss are left out."""
    own = _choices(LOSS, folders[:-1])  # of packages, too
    losses = [choice for choice in _choices(LOSS, folders) if choice in own or _names_a_loss(folders[-1], choice)]
    return {
        f"{loss}_{setting}": (loss, setting)
        for loss in losses
        for setting in _choices(SETTING, folders)
        if all(loss == only or not setting.endswith(end) for end, only in _ONE_LOSS.items())
    }


def _names_a_loss(folder: Path, choice: str) -> bool:
    """Whether a file is a loss by itself, and not a variant of one."""
    return bool(
        re.search(rf"^name: {re.escape(choice)}$", (folder / LOSS / f"{choice}.yaml").read_text(), re.MULTILINE)
    )


def _choose_loss_by_name(override: str, folders: Sequence[Path]) -> str:
    """`loss.name=simpo`, and `+loss=simpo`, as the choice of the file of that name, where there is one."""
    found = re.fullmatch(r"\+{0,2}loss(?:\.name)?=([\w-]+)", override)
    return (
        f"loss={found[1]}" if found and (found[1] in _choices(LOSS, folders) or ".name" not in override) else override
    )


def _require_choice(override: str, groups: Set[str], folders: Sequence[Path]) -> None:
    found = GROUP_CHOICE.match(override)
    if found is None or found["group"] not in groups or found["choice"] == "null":
        return
    group, choice, known = found["group"], found["choice"], _choices(found["group"], folders)
    if "/" not in choice and choice not in known:
        hint = did_you_mean(choice, known)
        raise ConfigError(f"{group}={choice} is not a file of the group {group}{hint} Known: {', '.join(known)}")


def _require_readable(overrides: Sequence[str]) -> None:
    """Name the override that cannot be read; Hydra tells only at which sign it stopped."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    for override in overrides:
        try:
            OverridesParser.create().parse_override(override)
        except HydraException as error:
            raise ConfigError(
                f"{override} cannot be read ({first_line(error)}); write key=value, and quote a value with special "
                f"signs twice: \"key='value'\""
            ) from None


def _for_hydra(override: str, groups: Set[str]) -> str:
    """Let `a.b=c` set keys that a recipe does not mention; unknown ones are caught later, with a suggestion."""
    choice = GROUP_CHOICE.match(override)
    if not _VALUE_OVERRIDE.match(override) or (choice is not None and choice["group"] in groups):
        return override
    return f"++{override}"


def config_from_mapping(raw: Mapping[str, Any], *, name: str = "run") -> Config:
    """A checked configuration from plain values.

    Raises:
        ConfigError: unknown keys (with the nearest known one), wrong types, unknown choices, values out of bounds, and
            settings that do not go together; all of them, one a line.
    """
    problems: list[str] = []
    values = {"name": name, **without_mode(raw, problems)}
    section = values.pop("loss", None)
    unknown = partial(about_unknown_key, loss=loss_name(section))
    config: Config = collect(Config, values, unknown=unknown, problems=problems)
    config.loss = collect_loss(section, problems)
    raise_all([*problems, *problems_together(config)])
    return config


def config_as_dict(config: Config) -> dict[str, Any]:
    """Plain values, loss options included, as saved in `config.yaml`."""
    return dataclasses.asdict(config)
