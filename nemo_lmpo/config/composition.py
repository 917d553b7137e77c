"""Hydra's part of a recipe: its files put together, and the values that are set on them."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager, nullcontext
from functools import lru_cache
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_lmpo.errors import ConfigError
from nemo_lmpo.loss.packages import package_losses
from nemo_lmpo.runtime.safe_yaml import load_yaml

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override
    from omegaconf import DictConfig

LOSS, SETTING, SPECIALIZATION, COMPAT = "loss", "setting", "specialization", "compat"
ANY_RUN = "train"
"""The recipe of any loss on any setting, `loss=... setting=...`."""
GROUP_CHOICE = re.compile(r"^(?P<sign>\+{0,2})(?P<group>[\w-]+)=(?P<choice>[\w/-]+)$")
_KEY = re.compile(r"(?!hydra\b)[\w-]+(\.[\w-]+)*")
_OURS = "nemo_lmpo"
_UNUSED = ("output", "launcher", "sweeper", "help", "hydra_help", "hydra_logging", "job_logging", "env")
"""Hydra's own groups, for programs that Hydra starts: a quarter of the time of a composition."""

Products = Mapping[str, tuple[str, str]]
"""Loss and setting by the name of both together."""
_Composed = tuple["DictConfig", dict[str, str | None]]
"""Settings, interpolations not resolved yet, and the file that was chosen of each group."""


class NoGroupError(Exception):
    """A choice of a loss for a recipe that has none to replace."""


def compose_plain(
    name: str, overrides: Sequence[str], *, groups: Set[str], folders: Sequence[Path], products: Products
) -> dict[str, Any]:
    """A recipe with overrides, as Hydra composes it, in plain values.

    What the package's files give is composed once as long as they stay as they are: a comparison asks for dozens of
    runs that differ in values only.

    Args:
        name: of a file in a folder, or of ``products``.
        overrides: in Hydra's form.
        groups: names whose values are files.
        folders: the user's own recipes, if any, and the package's.
        products: recipes without a file.

    Raises:
        ConfigError: Hydra cannot compose it.
        NoGroupError: see there.
    """
    import yaml
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    choices, values = _choices_and_values(overrides, groups)
    try:
        if len(folders) > 1:
            config, chosen = _compose_files(name, choices, folders, products)
        else:
            config, chosen = _compose_package(name, choices, folders[0], products)
        for value in values:
            OmegaConf.update(config, value.key_or_group, value.value(), merge=True, force_add=True)
        plain = OmegaConf.to_container(config, resolve=True)
    except (HydraException, OmegaConfBaseException, yaml.YAMLError, OSError) as error:
        if f"Could not override '{LOSS}'" in str(error):
            raise NoGroupError from None
        reason = " ".join(str(error).split())
        raise ConfigError(f"recipe {name}: {reason}") from None
    if not isinstance(plain, dict):
        file = _folder_of(name, folders) / f"{name}.yaml"
        raise ConfigError(f"recipe {name}: {file} holds no settings; write them as `key: value`")
    if name == ANY_RUN:
        plain.setdefault("name", f"{chosen[LOSS]}_{chosen[SETTING]}")
    return {str(key): value for key, value in plain.items()}


def _choices_and_values(overrides: Sequence[str], groups: Set[str]) -> tuple[tuple[str, ...], list[Override]]:
    """What decides on the files, and what only sets a key.

    With anything else among them (a key taken away, a sweep, a setting of Hydra's own) Hydra gets all, in their order.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser

    choices: list[str] = []
    values: list[Override] = []
    for line, override in zip(overrides, OverridesParser.create().parse_overrides(list(overrides)), strict=True):
        key, choice = override.key_or_group, GROUP_CHOICE.match(line)
        if choice is not None and choice["group"] in groups:
            choices.append(line)
        elif override.is_force_add() and _KEY.fullmatch(key) and key not in groups and not override.is_sweep_override():
            values.append(override)
        else:
            return tuple(overrides), []
    return tuple(choices), values


def _folder_of(name: str, folders: Sequence[Path]) -> Path:
    """Where the file of that name is, or would be."""
    return next((folder for folder in folders if (folder / f"{name}.yaml").is_file()), folders[-1])


def _compose_files(name: str, overrides: Sequence[str], folders: Sequence[Path], products: Products) -> _Composed:
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from omegaconf import open_dict

    _register(name, folders, products)
    primary = _folder_of(name, folders)
    others = ",".join(f"file://{folder.resolve()}" for folder in folders if folder != primary)
    search = [f"hydra.searchpath=[{others}]"] if others else []
    # Own recipes may choose in these groups, to no effect; what is left out cannot be chosen in.
    names_hydra = len(folders) > 1 or any("hydra" in override for override in overrides)
    without = [] if names_hydra else [f"~hydra/{group}" for group in _UNUSED]
    GlobalHydra.instance().clear()
    checked = _refusing_large_files() if len(folders) > 1 else nullcontext()
    with checked, initialize_config_dir(config_dir=str(primary.resolve()), version_base="1.3"):
        config = compose(name, overrides=[*search, *without, *overrides], return_hydra_config=True)
    chosen = dict(config.hydra.runtime.choices)
    with open_dict(config):
        del config["hydra"]
    return config, chosen


@contextmanager
def _refusing_large_files() -> Iterator[None]:
    """Within the block OmegaConf, which writes out all aliases of a file, reads no file that they make too large."""
    from omegaconf import OmegaConf

    load = OmegaConf.load

    def load_checked(file: Any) -> Any:
        content = file.read()
        try:
            load_yaml(content)
        except ValueError as error:
            raise ConfigError(f"{file.name} cannot be read ({error}); correct the file") from None
        return load(StringIO(content))

    OmegaConf.load = load_checked  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        OmegaConf.load = load  # type: ignore[method-assign]


def _compose_package(name: str, overrides: tuple[str, ...], folder: Path, products: Products) -> _Composed:
    """A copy of what the package's files give."""
    files = [(path, path.stat()) for path in folder.rglob("*.yaml")]
    state = sorted((str(path), stat.st_mtime_ns, stat.st_size) for path, stat in files)
    config, chosen = _remembered(name, overrides, folder, products.get(name), tuple(state))
    return copy.deepcopy(config), chosen


@lru_cache(maxsize=128)
def _remembered(
    name: str, overrides: tuple[str, ...], folder: Path, product: tuple[str, str] | None, state: object
) -> _Composed:
    """Composed anew where any file was added, taken away or written again."""
    return _compose_files(name, overrides, [folder], {} if product is None else {name: product})


def _register(wanted: str, folders: Sequence[Path], products: Products) -> None:
    """Let Hydra find a loss on a setting by the name of both, also in the `defaults` of the user's own recipes, and the
    losses of packages.

    Without own recipes only the name that is asked for, since Hydra copies its whole store for every composition.
    Where there is a file, Hydra would take the entry for the file's schema.
    """
    from hydra.core.config_store import ConfigNode, ConfigStore

    store = ConfigStore.instance()
    for entry in [key for key, node in store.repo.items() if isinstance(node, ConfigNode) and node.provider == _OURS]:
        del store.repo[entry]
    has_own = len(folders) > 1
    for name, (loss, setting) in products.items():
        if (has_own or name == wanted) and not any((folder / f"{name}.yaml").is_file() for folder in folders):
            special = {f"optional {SPECIALIZATION}": f"${{{LOSS}}}_${{{SETTING}}}"}
            node = {"defaults": [{SETTING: setting}, {LOSS: loss}, special, {COMPAT: None}, "_self_"], "name": name}
            store.store(name=name, node=node, provider=_OURS)
    for loss in package_losses():
        store.repo.get(LOSS, {}).pop(f"{loss}.yaml", None)
        if not any((folder / LOSS / f"{loss}.yaml").is_file() for folder in folders):
            store.store(group=LOSS, name=loss, node={"name": loss}, provider=_OURS)
