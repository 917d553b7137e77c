"""What a model card takes from the start model's own card, and how it names files of this machine."""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_lmpo.formats.find_model import hub_name_of
from nemo_lmpo.formats.public_names import hub_names, public_name
from nemo_lmpo.report.escape import visible
from nemo_lmpo.report.read import read_config
from nemo_lmpo.report.summary import setting
from nemo_lmpo.runtime.files import read_small
from nemo_lmpo.runtime.run_files import ARCHITECTURE, CHECKPOINTS
from nemo_lmpo.runtime.safe_yaml import load_yaml

_logger = logging.getLogger(__name__)

_HEAD = re.compile(r"\A(?:\ufeff)?---\s*\n(.*?)\n---\s*(?:\n|\Z)", re.DOTALL)
_START, _TRAIN = "model.restore_from_path", "data.train.path"
_PATHS = (_START, "model.tokenizer", _TRAIN, "data.validation.path", "data.chat_template")
_MOST_STARTS = 16
_MOST_HEAD = 2**16


@dataclass(frozen=True)
class Origin:
    """Fields of a card's head that a trained model has from its start; empty where that says nothing."""

    base_model: tuple[str, ...] = ()
    datasets: tuple[str, ...] = ()
    language: tuple[str, ...] = ()
    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None


def origin_of(config: Mapping[str, Any]) -> Origin:
    """From the start's own card: of a hub model or its directory, or of the start of the run that it comes from."""
    own = tuple(hub_names(setting(config, _TRAIN)))
    start = config
    for _ in range(_MOST_STARTS):
        given = setting(start, _START)
        if not isinstance(given, str):
            return Origin(datasets=own)
        path, name = _place(given)
        trained = _training_config(path) if path is not None else None
        if trained is None:
            break
        own = (*own, *hub_names(setting(trained, _TRAIN)))
        start = trained
    head = _card_head(path / "README.md") if path is not None else {}
    base = (name,) if name is not None else _texts(head.get("base_model"))
    return Origin(
        base,
        tuple(dict.fromkeys((*own, *_texts(head.get("datasets"))))),
        _texts(head.get("language")),
        *(next(iter(_texts(head.get(key))), None) for key in ("license", "license_name", "license_link")),
    )


def _place(given: str) -> tuple[Path | None, str | None]:
    """Where a start lies on this machine, and its name on the hub."""
    path = Path(given).expanduser()
    if path.exists():
        found = hub_name_of(path.absolute())
        return path, found[0] if found else None
    if not hub_names(given):
        return None, None
    from huggingface_hub import try_to_load_from_cache

    card = try_to_load_from_cache(given, "README.md")
    return (Path(card).parent if isinstance(card, str) else None), given


def _training_config(path: Path) -> Mapping[str, Any] | None:
    """The configuration of a run or checkpoint; None for other models."""
    if (path / ARCHITECTURE).is_file() or (path / CHECKPOINTS).is_dir():
        return read_config(path)
    return None


def _card_head(path: Path) -> Mapping[str, Any]:
    """The YAML head of a model card; empty without one."""
    if not path.is_file():
        return {}
    try:
        head = _HEAD.match(read_small(path).decode("utf-8"))
        values = load_yaml(head[1]) if head is not None and len(head[1]) <= _MOST_HEAD else {}
    except (OSError, ValueError) as error:
        _logger.warning("%s cannot be read (%s); the model card takes nothing from it", path, type(error).__name__)
        return {}
    return values if isinstance(values, Mapping) else {}


def _texts(value: Any) -> tuple[str, ...]:
    listed = value if isinstance(value, list) else [value]
    return tuple(visible(one)[:500] for one in listed if isinstance(one, str) and one.strip())


def public_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration as others may see it: of paths of this machine, the last part only."""
    shown = copy.deepcopy(dict(config))
    for key in _PATHS:
        *groups, name = key.split(".")
        group: Any = shown
        for part in groups:
            group = group.get(part) if isinstance(group, dict) else None
        if isinstance(group, dict) and group.get(name) is not None:
            value = group[name]
            group[name] = [public_name(one) for one in value] if isinstance(value, list) else public_name(value)
    return shown
