"""Special tokens that stand in the texts of the data, where they would act as control tokens."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from nemo_lmpo.data.messages import Inputs, RowError, all_texts, with_texts
from nemo_lmpo.data.schema import ConversationRow, PreferenceRow
from nemo_lmpo.errors import ConfigError, shown

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

POLICIES = ("keep", "error", "split")
# Private-use letters, which no text holds: around a real token's number, and around that of a token named by a text.
_REAL, _NAMED = ("\U000f6001{}\U000f6002", "\U000f6003{}\U000f6004")
_MARKS = re.compile("[\U000f6001-\U000f6004]")
_PROBE = "ok {0} a  b.{0}{0}\n{0}\u00e9 <x"


_TEMPLATE_MARK = re.compile(r"<\|[^|<>\s'\"{}]+\|>")


def split_marks(template: str, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Marks as `<|im_start|>` in a template's text that the tokenizer splits into pieces."""
    found = dict.fromkeys(_TEMPLATE_MARK.findall(template))
    return [mark for mark in found if len(tokenizer(mark, add_special_tokens=False)["input_ids"]) > 1]


Sayable = TypeVar("Sayable", PreferenceRow, ConversationRow)


def _said(row: PreferenceRow | ConversationRow) -> list[Any]:
    """All of a row that a template may write."""
    if isinstance(row, ConversationRow):
        return [row.messages, row.inputs.tools, dict(row.inputs.options)]
    answers = [row.chosen, row.rejected, row.chosen_fields, row.rejected_fields]
    return [row.prompt, row.inputs.tools, dict(row.inputs.options), *answers]


class SpecialTokens:
    """Finds special tokens in texts and, if told, makes ordinary text of them.

    Args:
        tokenizer: whose special tokens are meant.
        policy: `keep` (they act as the tokens they name), `error` (such rows cannot be used) or `split` (they are
            ordinary text; what the chat template writes acts as before).

    Raises:
        ConfigError: the policy is unknown, or the tokenizer is of a kind that cannot split.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, policy: str = "keep") -> None:
        if policy not in POLICIES:
            raise ConfigError(f"data.special_tokens_in_text={policy} is unknown; choose {', '.join(POLICIES)}")
        self.policy = policy
        self._tokenizer = tokenizer
        known = {str(token) for token in tokenizer.all_special_tokens}
        known |= {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
        self._names = sorted(filter(None, known), key=lambda name: (-len(name), name))
        self._pattern = re.compile("|".join(map(re.escape, self._names))) if self._names else None
        self._renamed = self._renamed_backend() if policy == "split" and self._names else None

    def found_in(self, row: PreferenceRow | ConversationRow) -> str | None:
        """The first special token in the row's texts."""
        if self._pattern is None:
            return None
        for text in all_texts(_said(row)):
            if found := self._pattern.search(text):
                return found.group()
        return None

    def checked(self, row: Sayable) -> Sayable | RowError:
        """The row as it goes to the chat template, or why it cannot be used."""
        if self.policy == "keep":
            return row
        if self.policy == "error":
            found = self.found_in(row)
            message = "the texts hold the special token {}; see data.special_tokens_in_text"
            return row if found is None else RowError("special token in a text", message.format(shown(found)))
        said = _said(row)
        if any(map(_MARKS.search, all_texts(said))):
            detail = "the texts hold private-use characters that stand for tokens here"
            return RowError("special token in a text", detail)
        if self._pattern is None:
            return row
        messages, tools, options, *answers = with_texts(said, lambda text: self._marked(text, _NAMED))
        roles = [message["role"] for message in said[0]]
        messages = [{**message, "role": role} for message, role in zip(messages, roles, strict=True)]
        inputs = Inputs(tools, options) if tools or options else row.inputs
        names = ("chosen", "rejected", "chosen_fields", "rejected_fields")
        changed: dict[str, Any] = dict(zip(names, answers, strict=False))
        changed["messages" if isinstance(row, ConversationRow) else "prompt"] = messages
        return replace(row, inputs=inputs, **changed)

    def tokenize(self, texts: list[str]) -> list[list[int]]:
        """Ids of texts that the chat template made of :meth:`checked` rows."""
        if not texts:
            return []
        if self._renamed is None:
            encoded = self._tokenizer(
                texts,
                add_special_tokens=False,
                return_attention_mask=False,
                return_token_type_ids=False,
                verbose=False,
            )
            ids: list[list[int]] = encoded["input_ids"]
            return ids
        renamed = [self._unnamed(self._marked(text, _REAL)) for text in texts]
        return [encoding.ids for encoding in self._renamed.encode_batch(renamed, add_special_tokens=False)]

    def _marked(self, text: str, mark: str) -> str:
        assert self._pattern is not None
        return self._pattern.sub(lambda found: mark.format(self._names.index(found.group())), text)

    def _unnamed(self, text: str) -> str:
        before, after = _NAMED.split("{}")
        return re.sub(f"{before}(\\d+){after}", lambda found: self._names[int(found.group(1))], text)

    def _renamed_backend(self) -> Any:
        """The tokenizer with its special tokens under names that no text holds, so that their own are ordinary text."""
        from tokenizers import Tokenizer

        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise ConfigError("data.special_tokens_in_text=split needs a fast tokenizer; choose keep or error")
        names = {name: _REAL.format(place) for place, name in enumerate(self._names)}
        content = json.loads(backend.to_str())
        for token in content["added_tokens"]:
            token["content"] = names.get(token["content"], token["content"])
        model = content["model"]
        if isinstance(model.get("vocab"), dict):
            model["vocab"] = {names.get(piece, piece): number for piece, number in model["vocab"].items()}
        elif isinstance(model.get("vocab"), list):
            model["vocab"] = [[names.get(piece, piece), score] for piece, score in model["vocab"]]
        if model.get("unk_token") in names:
            model["unk_token"] = names[model["unk_token"]]
        content["post_processor"] = None
        renamed = Tokenizer.from_str(json.dumps(content))
        for name, other in names.items():
            own = self._tokenizer(_PROBE.format(name), add_special_tokens=False)["input_ids"]
            if own != renamed.encode(_PROBE.format(other), add_special_tokens=False).ids:
                raise ConfigError(
                    f"data.special_tokens_in_text=split does not work with this tokenizer (token {shown(name)}); "
                    "choose keep or error"
                )
        return renamed
