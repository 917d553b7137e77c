"""Pairs as the paper authors' released trainer lays them (SimPO's `run_simpo.py` and `simpo_trainer.py`, too).

What differs from :class:`~nemo_lmpo.data.encode.PairEncoder`: the assistant's header belongs to the response, as the
prompt is rendered without it and the answer as a conversation of its own; an end of turn that is not the last token
gets an EOS behind it; a prompt that is cut loses its BOS; and where a cut prompt does not suffice, both responses are
cut to what `max_length` has beyond `max_prompt_length`, not beyond the prompt.
"""

from __future__ import annotations

from collections.abc import Sequence

from nemo_lmpo.data.chat import ChatFormat, with_system
from nemo_lmpo.data.encode import EncodedRow, Encoder
from nemo_lmpo.data.messages import Message, RowError, label, text_of
from nemo_lmpo.data.render import TemplateRefusal, TemplateRenderer
from nemo_lmpo.data.schema import ConversationRow, PreferenceRow, UnpairedRow
from nemo_lmpo.data.special_tokens import SpecialTokens
from nemo_lmpo.data.unused import given_fields, refuse_empty_answers, unused_columns
from nemo_lmpo.errors import ConfigError
from nemo_lmpo.runtime.chat_record import ChatRecord


class ReleasedPairEncoder(Encoder):
    """Renders and tokenizes pairs as the released trainer does.

    One thing it cannot do: prompts that differ between chosen and rejected. Where only one of the responses merges
    with the prompt's last token, that token belongs to both responses here. Without a system prompt, conversations get
    an empty one where the template knows system messages, as the released code has it.
    """

    def __post_init__(self, special: SpecialTokens | None) -> None:
        super().__post_init__(special)
        if self.tokenizer.eos_token_id is None:
            raise ConfigError("data.compat=released_code needs a tokenizer with an EOS token; set eos_token")
        self._render = TemplateRenderer(self.tokenizer, self.template)
        if self.system_prompt is None and ("system" in self.template or "<|im_start|>" in self.template):
            self.system_prompt = ""

    @property
    def settings(self) -> list[object]:
        """What decides the ids, beside the tokenizer."""
        return ["released_code", *super().settings]

    def record(self) -> ChatRecord:
        """What every later use of the model has to do alike."""
        chat = ChatFormat(self.tokenizer, self.template)
        return self._recorded(chat, adds_bos=self.tokenizer.bos_token_id is not None)

    def _encode_pairs(self, rows: Sequence[PreferenceRow]) -> list[EncodedRow | RowError]:
        return [self._encode(row) for row in rows]

    def _encode_conversations(self, rows: Sequence[ConversationRow]) -> list[EncodedRow | RowError]:
        detail = "the row is a conversation, and data.compat=released_code lays pairs only"
        return [RowError("not a pair", detail)] * len(rows)

    def _encode_answers(self, rows: Sequence[UnpairedRow]) -> list[EncodedRow | RowError]:
        detail = "the row is an answer with a label, and data.compat=released_code lays pairs only"
        return [RowError("not a pair", detail)] * len(rows)

    def _encode(self, row: PreferenceRow) -> EncodedRow | RowError:
        checked = self.special_tokens.checked(row)
        if isinstance(checked, RowError):
            return checked
        lost = _not_rendered(row)
        try:
            refuse_empty_answers(row, lost)
            texts_only = [{"role": message["role"], "content": text_of(message)} for message in checked.prompt]
            prompt = self._rendered(with_system(texts_only, self.system_prompt))
            texts = [self._response(checked.chosen), self._response(checked.rejected)]
        except RowError as error:
            return error
        except TemplateRefusal as error:
            return RowError("refused by the chat template", f"the chat template refuses the row: {error}")
        prompt_ids, *wholes = self.special_tokens.tokenize([prompt, *(prompt + text for text in texts)])
        # a last token of the prompt that merges with the response belongs to the response
        kept = len(prompt_ids) - any(whole[: len(prompt_ids)] != prompt_ids for whole in wholes)
        if any(whole[:kept] != prompt_ids[:kept] for whole in wholes):
            return RowError("refused by the chat template", "the prompt's tokens change with the response")
        chosen, rejected = (self._ended(whole[kept:]) for whole in wholes)
        return self._bounded(
            self._with_bos(prompt_ids[:kept]),
            chosen,
            rejected,
            self.special_tokens.found_in(row) is not None,
            lost=lost,
        )

    def _rendered(self, messages: list[Message]) -> str:
        return self._render([messages])[0]

    def _response(self, text: str) -> str:
        rendered = self._rendered([{"role": "assistant", "content": text}])
        return rendered.removeprefix(str(self.tokenizer.bos_token)) if self.tokenizer.bos_token else rendered

    def _with_bos(self, ids: list[int]) -> list[int]:
        bos = self.tokenizer.bos_token_id
        return ids if bos is None or ids[:1] == [bos] else [bos, *ids]

    def _ended(self, ids: list[int]) -> list[int]:
        return ids if ids[-1:] == [self.tokenizer.eos_token_id] else [*ids, self.tokenizer.eos_token_id]

    def _end_of_prompt(self, ids: list[int]) -> list[int]:
        return ids[-self.max_prompt_length :]

    def _room(self, prompt: list[int]) -> int:
        return self.max_length - self.max_prompt_length


def _not_rendered(row: PreferenceRow) -> tuple[str, ...]:
    """What the released code knows nothing of: all but texts of messages."""
    messages = [*row.prompt, row.chosen_message, row.rejected_message]
    names = given_fields(messages) | {name for name in ("tools",) if row.inputs.tools}
    names |= {f"chat_template_kwargs.{name}" for name in row.inputs.options}
    return (*(f"`{label(name)}`" for name in sorted(names)), *unused_columns(row))
