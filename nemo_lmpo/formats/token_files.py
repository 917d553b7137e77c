"""Tokens that the files beside a SentencePiece model add to it, and duties of tokens, as transformers reads them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nemo_lmpo.errors import CheckpointError, shown
from nemo_lmpo.formats.architecture import parse_json
from nemo_lmpo.formats.fields import LARGEST_SIZE, Fields

SETTINGS = "tokenizer_config.json"
DUTIES_FILE = "special_tokens_map.json"
ADDED_FILE = "added_tokens.json"
TOKEN_FILES = (SETTINGS, DUTIES_FILE, ADDED_FILE)
"""What decides, besides the model itself, which tokens there are."""
DUTIES = tuple(f"{kind}_token" for kind in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
_LISTS = ("additional_special_tokens", "extra_special_tokens")
_FLAGS = ("special", "lstrip", "rstrip", "single_word")


@dataclass(frozen=True)
class AddedToken:
    """A token that is found in a text before the text is cut into pieces."""

    content: str
    special: bool = False
    """It is left out where text is made of ids for people."""
    lstrip: bool = False
    """It swallows the white space to its left."""
    rstrip: bool = False
    single_word: bool = False
    """It is found only where no letter stands beside it."""


@dataclass(frozen=True)
class TokenFiles:
    """What the files say."""

    settings: Mapping[str, Any]
    """The fields of `tokenizer_config.json`, and of `special_tokens_map.json` where that counts."""
    duties: Mapping[str, str]
    """The token of each duty (`bos_token`, ...) that has one."""
    further: tuple[str, ...]
    """Special tokens without a duty."""
    added: Mapping[int, AddedToken]
    """Tokens by id, among them every special one that the model has no piece for."""

    def token_id(self, duty: str, pieces: Sequence[str]) -> int | None:
        """The id of the token of a duty, or None."""
        text = self.duties.get(duty)
        ids = (number for number, token in self.added.items() if token.content == text)
        return next(ids, pieces.index(text) if text in pieces else None)


def read_token_files(
    files: Mapping[str, bytes], pieces: Sequence[str], usual: Mapping[str, str], origin: str
) -> TokenFiles:
    """Read what lies beside a SentencePiece model.

    `added_tokens_decoder` of `tokenizer_config.json` counts, and only without it the two older files.

    Args:
        files: content by name; files that are not there are not an error.
        pieces: the model's own tokens, by id.
        usual: the tokens of duties that the files leave open.
        origin: what errors call the directory.

    Raises:
        CheckpointError: a file is damaged, or describes a token that is not valid.
    """
    settings = dict(_fields(files, SETTINGS, origin))
    if settings.get("added_tokens_decoder") is not None:
        added = _decoder(Fields(settings["added_tokens_decoder"], f"{origin}: {SETTINGS}: added_tokens_decoder"))
    else:
        duties = _fields(files, DUTIES_FILE, origin)
        lists = {name: [*_list(settings, name, origin), *_list(duties, name, origin)] for name in _LISTS}
        settings.update({**duties, **{name: tokens for name, tokens in lists.items() if tokens}})
        added = {}
    found = {duty: text for duty in DUTIES if (text := _text(settings.get(duty, usual.get(duty)), duty, origin))}
    listed = [token for name in _LISTS for token in _list(settings, name, origin)]
    further = tuple(dict.fromkeys(text for token in listed if (text := _text(token, "a special token", origin))))
    special = (*found.values(), *further)
    if settings.get("added_tokens_decoder") is None:
        for text, number in _fields(files, ADDED_FILE, origin).items():
            _text(text, "a token", f"{origin}: {ADDED_FILE}")
            added[_id(number, f"{origin}: {ADDED_FILE}")] = AddedToken(text, special=text in special)
    known = {*pieces, *(token.content for token in added.values())}
    for text in dict.fromkeys(special):
        if text not in known:
            # Behind all others; a tokenizer whose ids have gaps may have one there already.
            number = len(known) if len(known) not in added else max(added) + 1
            added[number] = AddedToken(text, special=True)
            known.add(text)
    return TokenFiles(settings, found, further, added)


def _fields(files: Mapping[str, bytes], name: str, origin: str) -> Mapping[str, Any]:
    return Fields(parse_json(files.get(name, b"{}"), f"{origin}: {name}"), f"{origin}: {name}").values


def _decoder(fields: Fields) -> dict[int, AddedToken]:
    added = {}
    for number, token in fields.values.items():
        described = Fields(token, f"{fields.origin}: {shown(number)}")
        flags = {name: described.flag(name) for name in _FLAGS}
        text = _text(described.values, "this", described.origin)
        assert text is not None
        added[_id(number, fields.origin)] = AddedToken(text, **flags)
    return added


def _id(number: object, origin: str) -> int:
    """An id, which JSON keeps as text where it names a field."""
    text = str(number)
    if isinstance(number, bool | float) or not text.isdecimal() or int(text) > LARGEST_SIZE:
        raise CheckpointError(f"{origin}: {shown(number)} is not the id of a token; correct it")
    return int(text)


def _list(fields: Mapping[str, Any], name: str, origin: str) -> list[Any]:
    value = fields.get(name)
    # Some models name their further tokens.
    value = list(value.values()) if isinstance(value, Mapping) else value
    if not isinstance(value, list | None):
        raise CheckpointError(f"{origin}: {name}={shown(value)} is not a list of tokens; correct it")
    return value or []


def _text(token: object, what: str, origin: str) -> str | None:
    """The text of a token, which may be described by its text alone."""
    if token is None:
        return None
    text = token.get("content") if isinstance(token, Mapping) else token
    if not isinstance(text, str) or not text:
        raise CheckpointError(f"{origin}: {what} is {shown(token)}, which is not a token; correct it")
    return text
