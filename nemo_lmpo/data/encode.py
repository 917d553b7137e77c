"""Texts as token ids: prompt and responses kept apart, one BOS, lengths bounded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nemo_lmpo.data.chat import ChatFormat
from nemo_lmpo.data.schema import PreferenceRow, RowError
from nemo_lmpo.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Texts to put in front of a response, so that a tokenizer that begins every text with a space begins these with it.
_ANCHORS = ("\n", "a", ".")


@dataclass(frozen=True)
class EncodedRow:
    """Token ids of one pair and whether anything was cut off."""

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]
    prompt_cut: bool
    response_cut: bool
    special_tokens: bool = False
    """Whether the texts hold special tokens of the tokenizer."""


class PairEncoder:
    """Renders and tokenizes pairs.

    ``prompt_ids + response_ids`` is the tokenisation of the whole conversation wherever its first tokens are the
    prompt's; where prompt and response would merge into one token, the response is tokenized on its own.

    Args:
        tokenizer: the tokenizer.
        template: Jinja text of the chat template.
        max_length: most tokens of prompt and response.
        max_prompt_length: most tokens of the prompt.
        system_prompt: a system message for conversations that have none.

    Raises:
        ConfigError: lengths that leave no room, or a template that cannot be used.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: str,
        *,
        max_length: int,
        max_prompt_length: int,
        system_prompt: str | None = None,
    ) -> None:
        check_lengths(max_length, max_prompt_length)
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.max_prompt_length = max_prompt_length
        self.chat = ChatFormat(tokenizer, template, system_prompt)
        self._bos = tokenizer.bos_token_id
        end = [tokenizer.eos_token_id] if self.chat.append_eos else self._tokenize([self.chat.end_of_turn])[0]
        self._end = end[-1]
        self._adds_bos = self._bos is not None and tokenizer("a")["input_ids"][:1] == [self._bos]

    def encode(self, rows: Sequence[PreferenceRow]) -> list[EncodedRow | RowError]:
        """Token ids of each row, or why it cannot be used."""
        rendered = self.chat.render(rows)
        good = [texts for texts in rendered if not isinstance(texts, RowError)]
        prompts = self._tokenize([prompt for prompt, _, _ in good])
        chosen = self._responses(good, prompts, 1)
        rejected = self._responses(good, prompts, 2)
        encoded = iter([self._bounded(*ids) for ids in zip(prompts, chosen, rejected, strict=True)])
        return [texts if isinstance(texts, RowError) else next(encoded) for texts in rendered]

    def _tokenize(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        return self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]

    def _responses(self, texts: list[tuple[str, str, str]], prompts: list[list[int]], side: int) -> list[list[int]]:
        whole = self._tokenize([text[0] + text[side] for text in texts])
        responses = []
        for text, prompt, ids in zip(texts, prompts, whole, strict=True):
            response = ids[len(prompt) :] if ids[: len(prompt)] == prompt else self._alone(text[side])
            if self.chat.append_eos:
                response = [*response, self._end]
            while response[-2:] == [self._end, self._end]:  # the data's text ended with the token already
                response = response[:-1]
            responses.append(response)
        return responses

    def _alone(self, response: str) -> list[int]:
        """Ids of a response that would merge with its prompt, without the space some tokenizers put in front."""
        for anchor in _ANCHORS:
            before, ids = self._tokenize([anchor, anchor + response])
            if ids[: len(before)] == before:
                return ids[len(before) :]
        return self._tokenize([response])[0]

    def _bounded(self, prompt: list[int], chosen: list[int], rejected: list[int]) -> EncodedRow | RowError:
        prompt = self._with_one_bos(prompt)
        if not prompt:
            return RowError(
                "empty prompt", "the prompt has no tokens, so nothing could predict the first response token"
            )
        prompt_cut = len(prompt) > self.max_prompt_length
        if prompt_cut:
            prompt = self._end_of_prompt(prompt)
        room = self.max_length - len(prompt)
        response_cut = max(len(chosen), len(rejected)) > room
        if response_cut:
            chosen, rejected = chosen[:room], rejected[:room]
            if chosen == rejected:
                return RowError(
                    "equal after truncation",
                    f"chosen and rejected are equal in the {room} tokens that data.max_length={self.max_length} leaves",
                )
        if not chosen or not rejected:
            return RowError("empty response", "a response has no tokens")
        return EncodedRow(prompt, chosen, rejected, prompt_cut, response_cut)

    def _with_one_bos(self, ids: list[int]) -> list[int]:
        """One BOS if the template wrote any or the tokenizer would add one, else none."""
        if self._bos is None:
            return ids
        repeated = next((i for i, token in enumerate(ids) if token != self._bos), len(ids))
        return [self._bos, *ids[repeated:]] if repeated or self._adds_bos else ids

    def _end_of_prompt(self, ids: list[int]) -> list[int]:
        """The prompt's last tokens, behind its BOS if it has a real one."""
        if ids[0] == self._bos and not self.chat.bos_marks_turns and self.max_prompt_length > 1:
            return [ids[0], *ids[len(ids) - self.max_prompt_length + 1 :]]
        return ids[len(ids) - self.max_prompt_length :]


def check_lengths(max_length: int, max_prompt_length: int) -> None:
    """Refuse lengths that leave no room for a prompt or a response.

    Raises:
        ConfigError: naming both.
    """
    if max_prompt_length < 1:
        raise ConfigError(f"data.max_prompt_length={max_prompt_length} must be at least 1")
    if max_length <= max_prompt_length:
        raise ConfigError(
            f"data.max_length={max_length} leaves no room for a response after data.max_prompt_length="
            f"{max_prompt_length}; raise the first or lower the second"
        )
