"""A prompt and an answer as a reward model sees them: token ids by its chat template, with one BOS."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nemo_lmpo.data.messages import text_of
from nemo_lmpo.data.tokenizer import chat_template_text
from nemo_lmpo.errors import ConfigError, DataError, first_line
from nemo_lmpo.pairs.candidate import AskedPrompt
from nemo_lmpo.pairs.score import Keep, Missing

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOO_LONG = "longer than the reward model takes"


def conversation(prompt: AskedPrompt, answer: str) -> list[dict[str, Any]]:
    """The prompt's messages with the answer behind them."""
    return [*prompt.messages, {"role": "assistant", "content": answer}]


def prompt_text(prompt: AskedPrompt) -> str:
    """The prompt as one text for a reader: of several messages each with its role."""
    given = prompt.given
    if isinstance(given, str):
        return given
    return "\n\n".join(f"{message['role'].capitalize()}: {text_of(message)}" for message in given)


@dataclass(frozen=True)
class RewardRendering:
    """Makes a reward model's token ids."""

    tokenizer: PreTrainedTokenizerBase
    template: str
    most_tokens: int

    def ids(self, prompt: AskedPrompt, answer: str) -> list[int]:
        """Of a conversation.

        Raises:
            DataError: the template refuses it.
        """
        try:
            text = self.tokenizer.apply_chat_template(
                conversation(prompt, answer),
                chat_template=self.template,
                tools=prompt.inputs.tools,
                tokenize=False,
                **dict(prompt.inputs.options),
            )
        except Exception as error:  # whatever a template raises
            raise DataError(
                f"the reward model's chat template refuses prompt {prompt.id} ({first_line(error)}); give another one "
                "with --reward-template"
            ) from None
        ids = list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        bos = self.tokenizer.bos_token_id
        if bos is not None and ids[:1] != [bos] and self._adds_bos():
            ids.insert(0, bos)
        if ids[:2] == [bos, bos]:
            raise DataError("the reward model's chat template writes two BOS tokens; correct it with --reward-template")
        return ids

    def all_ids(self, prompts: Missing, keep: Keep) -> dict[str, list[int]]:
        """Of all candidates, by name; those that are longer than the model takes have no score.

        Raises:
            DataError: as of :meth:`ids`.
        """
        found = {one.name: self.ids(prompt, one.text) for prompt, them in prompts for one in them}
        long = [name for name, ids in found.items() if len(ids) > self.most_tokens]
        if long:
            keep(dict.fromkeys(long), TOO_LONG)
        return {name: ids for name, ids in found.items() if len(ids) <= self.most_tokens}

    def _adds_bos(self) -> bool:
        """Whether the tokenizer puts a BOS in front of texts by itself."""
        ids: Sequence[int] = self.tokenizer("a")["input_ids"]
        return bool(ids[0] == self.tokenizer.bos_token_id)


def rendering(
    tokenizer: PreTrainedTokenizerBase, template: str | None, most_tokens: int, given: str
) -> RewardRendering:
    """How a reward model's conversations are rendered.

    Raises:
        ConfigError: it has no chat template, and none is given.
    """
    try:
        return RewardRendering(tokenizer, chat_template_text(template, tokenizer), most_tokens)
    except ConfigError as error:
        raise ConfigError(f"--reward-model {given}: {error}; name a template with --reward-template") from None
