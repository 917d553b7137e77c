"""What is said about a key that no setting has: the setting that was meant, where one can be told."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from nemo_lmpo.config.mode import MODE_WORDS
from nemo_lmpo.config.names_elsewhere import COUNTERPARTS, WITHOUT
from nemo_lmpo.config.schema import all_keys
from nemo_lmpo.errors import nearest, shown
from nemo_lmpo.loss.options import OPTIONS
from nemo_lmpo.loss.packages import find_options

_MOST_SUGGESTIONS = 3
_SHORTEST_BEGINNING = 4
"""Letters of a beginning that names a setting: `warm`, but not `s`."""


def about_unknown_key(key: str, value: Any, loss: str) -> str:
    """A sentence about a dotted key that is not a setting of a run with this loss.

    Names from other trainers are answered with the setting here or with the reason why there is none. Where nothing is
    near, the group's settings are listed and none is suggested.
    """
    group, _, last = key.rpartition(".")
    users = [name for name in OPTIONS if last in options_of(name)]
    if group == "loss" and users:
        return (
            f"{key}={shown(value)}: loss.name={loss} does not use it ({', '.join(users)} would); remove it, or change "
            f"loss.name. {_options(loss)}"
        )
    sentence = _elsewhere(key, loss)
    if sentence is None:
        known = [*(key for key in all_keys() if key != "loss"), *(f"loss.{option}" for option in options_of(loss))]
        meant = _meant(key, [*known, *MODE_WORDS])
        if meant:
            sentence = f"did you mean {_or(meant)}?"
        elif users:
            sentence = f"loss.{last} is an option of {_or(users)}, and loss.name={loss}"
        elif group != "loss":
            sentence = _listed(group, known)
    if group != "loss":
        return f"unknown key {key}; {sentence}"
    return f"unknown key {key}" + (f"; {sentence} " if sentence else ". ") + _options(loss)


def options_of(loss: str) -> list[str]:
    """The names of a loss's options."""
    return [of.name for of in dataclasses.fields(find_options(loss)) if of.name != "name"]


def _options(loss: str) -> str:
    return f"Options of {loss}: {', '.join(options_of(loss)) or 'none'}"


def _elsewhere(key: str, loss: str) -> str | None:
    """For a name of another trainer, whatever groups it stands in there."""
    parts = key.replace("-", "_").split(".")
    for start in range(len(parts)):
        name = ".".join(parts[start:])
        if name in WITHOUT:
            return WITHOUT[name]
        if name in COUNTERPARTS:
            return _counterpart(COUNTERPARTS[name], loss)
    return None


def _counterpart(setting: str, loss: str) -> str:
    group, _, option = setting.rpartition(".")
    if group == "loss" and option != "name" and option not in options_of(loss):
        users = [name for name in OPTIONS if option in options_of(name)]
        return f"did you mean {setting}? It is an option of {_or(users)}, and loss.name={loss}"
    return f"did you mean {setting}?"


def _meant(key: str, known: Sequence[str]) -> list[str]:
    """Settings that the key could be: the same name in another group, or nearly the same name."""
    group, _, last = key.replace("-", "_").rpartition(".")
    same = [name for name in known if name.rpartition(".")[2] == last]
    if same:
        shared = {name: len(set(name.split(".")) & set(key.split("."))) for name in same}
        most = max(shared.values())
        return [name for name in same if shared[name] == most][:_MOST_SUGGESTIONS]
    siblings = {name.rpartition(".")[2]: name for name in known if name.rpartition(".")[0] == group}
    if len(last) >= _SHORTEST_BEGINNING:
        begin = [name for sibling, name in siblings.items() if sibling.startswith(last) or last.startswith(sibling)]
        if begin:
            return begin[:1]
    near = nearest(last, siblings)
    if near is not None:
        return [siblings[near]]
    if siblings and group:
        return []
    anywhere = {name.rpartition(".")[2]: name for name in reversed(known)}
    near = nearest(last, anywhere, likeness=0.8)
    if near is not None:
        return [anywhere[near]]
    near = nearest(key, known, likeness=0.75)
    return [] if near is None else [near]


def _listed(group: str, known: Sequence[str]) -> str:
    """The names in the nearest group that exists."""
    while group and not any(name.startswith(f"{group}.") for name in known):
        group = group.rpartition(".")[0]
    names = [name.removeprefix(f"{group}.") for name in known if not group or name.startswith(f"{group}.")]
    heads = dict.fromkeys(name.partition(".")[0] + (".*" if "." in name else "") for name in names)
    return f"known{f' in {group}' if group else ''}: {', '.join(heads)}"


def _or(names: Sequence[str]) -> str:
    return " or ".join(filter(None, (", ".join(names[:-1]), names[-1])))
