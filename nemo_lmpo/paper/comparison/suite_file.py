"""A suite of one's own from a YAML file: variants, what is measured, and what one expects.

title: My loss against SimPO
about: Both with the published values.
variants:
SimPO: {loss: simpo}
mine: {loss: my_loss, overrides: [loss.width=0.5]}
measures: [accuracy, length]
claims:
- {text: Mine answers shorter, measure: length, high: SimPO, low: mine}
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from nemo_lmpo.errors import ConfigError, did_you_mean, shown
from nemo_lmpo.loss.packages import loss_names
from nemo_lmpo.paper.comparison.suites import MEASURES, QUALITY, START, Claim, Suite, Variant
from nemo_lmpo.runtime.files import read_small
from nemo_lmpo.runtime.safe_yaml import load_yaml

_KEYS = ("title", "about", "variants", "measures", "claims")
_VARIANT_KEYS = ("loss", "overrides")
_CLAIM_KEYS = ("text", "source", "measure", "high", "low")
_T = TypeVar("_T")


def read_suite(path: Path) -> Suite:
    """The suite that a file describes; the start model is a variant of every suite.

    Raises:
        ConfigError: the file cannot be read, or says something that no suite has.
    """
    try:
        found = load_yaml(read_small(path))
    except FileNotFoundError:
        raise ConfigError(f"--suite {path} does not exist") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"--suite {path} cannot be read ({error})") from None
    where = f"--suite {path}"
    values = _mapping(found, where, _KEYS)
    variants = _mapping(values.get("variants"), f"{where}: variants")
    if not variants:
        raise ConfigError(f"{where}: variants is empty; name at least one")
    contenders = {START.label: START} | {label: _variant(label, value, where) for label, value in variants.items()}
    measures = _texts(values.get("measures", list(QUALITY)), f"{where}: measures")
    for name in measures:
        _known(name, MEASURES, f"{where}: measure")
    claims = values.get("claims", [])
    if not isinstance(claims, Sequence) or isinstance(claims, str):
        raise ConfigError(f"{where}: claims={shown(claims)} is not a list")
    title = _text(values.get("title", path.stem), f"{where}: title")
    about = _text(values.get("about", ""), f"{where}: about")
    name = "".join(letter if letter.isalnum() else "_" for letter in path.stem)
    judged = tuple(_claim(one, f"{where}: claim {place}", contenders) for place, one in enumerate(claims, 1))
    return Suite(name, title, about, tuple(contenders.values()), tuple(measures), judged)


def _variant(label: str, value: Any, where: str) -> Variant:
    where = f"{where}: variant {shown(label)}"
    if label == START.label:
        raise ConfigError(f"{where}: it is a variant of every suite; leave it out")
    given = _mapping(value, where, _VARIANT_KEYS)
    loss = _text(given.get("loss"), f"{where}: loss")
    _known(loss, loss_names(), f"{where}: loss")
    return Variant(label, loss, tuple(_texts(given.get("overrides", []), f"{where}: overrides")))


def _claim(value: Any, where: str, variants: Mapping[str, Variant]) -> Claim:
    given = _mapping(value, where, _CLAIM_KEYS)
    texts = {name: _text(given.get(name), f"{where}: {name}") for name in ("text", "measure", "high", "low")}
    _known(texts["measure"], MEASURES, f"{where}: measure")
    for side in ("high", "low"):
        _known(texts[side], variants, f"{where}: {side}")
    source = _text(given.get("source", ""), f"{where}: source")
    return Claim(texts["text"], source, texts["measure"], variants[texts["high"]], variants[texts["low"]])


def _mapping(value: Any, where: str, known: Sequence[str] | None = None) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where}={shown(value)} is not a mapping; write `key: value` lines")
    for key in value:
        if known is not None:
            _known(str(key), known, f"{where}: key")
    return {str(key): one for key, one in value.items()}


def _known(name: str, known: Sequence[str] | Mapping[str, _T], where: str) -> None:
    if name not in known:
        raise ConfigError(f"{where} {shown(name)} is unknown{did_you_mean(name, known)} Known: {', '.join(known)}")


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise ConfigError(f"{where}={shown(value)} is not a text")
    return value


def _texts(value: Any, where: str) -> list[str]:
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise ConfigError(f"{where}={shown(value)} is not a list")
    return [_text(one, where) for one in value]
