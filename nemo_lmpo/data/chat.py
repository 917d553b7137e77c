"""Conversations as text: what of a rendered conversation is prompt and what is response."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from nemo_lmpo.data.schema import Message, PreferenceRow, RowError
from nemo_lmpo.errors import ConfigError, shown
from nemo_lmpo.formats.architecture import parse_json
from nemo_lmpo.formats.fields import Fields

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PROBE = "zqprobeqz"


class ChatFormat:
    """A chat template with a tokenizer: renders a pair as prompt text, chosen text and rejected text.

    A response ends with the template's end-of-turn token; what the template puts behind it (ChatML's newline) is no
    part of it. A prompt ends where the response's own text begins, the assistant's header included.

    Args:
        tokenizer: gives the special tokens that the template may use.
        template: the template's Jinja text.
        system_prompt: a system message for conversations that have none.

    Raises:
        ConfigError: the template cannot render a plain exchange, or gives no way to end a response.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str, system_prompt: str | None = None) -> None:
        from jinja2 import TemplateError

        self.tokenizer = tokenizer
        self.template = template
        self.system_prompt = system_prompt
        exchange = [{"role": "user", "content": "Hello"}, _assistant(_PROBE)]
        try:
            rendered = self._apply([exchange])[0]
        except (TemplateError, TypeError, ValueError) as error:
            raise ConfigError(f"data.chat_template cannot render a plain exchange ({error}); correct it") from None
        found = rendered.rfind(_PROBE)
        if found < 0:
            raise ConfigError("data.chat_template leaves out the assistant's text; use another template")
        self._tail = rendered[found + len(_PROBE) :]
        """What the template puts behind the last response."""
        self.end_of_turn, self.append_eos = self._end_of_turn()
        bos = tokenizer.bos_token
        self.bos_marks_turns = bool(bos) and rendered.count(str(bos)) > 1
        """Whether what the tokenizer calls BOS is the marker in front of every message (SmolLM2)."""

    def render(self, rows: Sequence[PreferenceRow]) -> list[tuple[str, str, str] | RowError]:
        """Prompt, chosen and rejected text of each row, or why the template does not take it.

        Without a BOS that the tokenizer, not the template, adds; without EOS where ``append_eos``.
        """
        from jinja2 import TemplateError

        prompts = [with_system(row.prompt, self.system_prompt) for row in rows]
        chosen = [[*prompt, _assistant(row.chosen)] for prompt, row in zip(prompts, rows, strict=True)]
        rejected = [[*prompt, _assistant(row.rejected)] for prompt, row in zip(prompts, rows, strict=True)]
        try:
            # one call for many conversations is several times faster than a call each
            texts = [self._apply(prompts, generate=True), self._apply(chosen), self._apply(rejected)]
        except (TemplateError, TypeError, ValueError) as error:
            if len(rows) == 1:
                reason = f"the chat template refuses the row: {shown(str(error))}"
                return [RowError("refused by the chat template", reason)]
            return [self.render([row])[0] for row in rows]
        return [
            self._split(prompt, row, *rendered) for prompt, row, *rendered in zip(prompts, rows, *texts, strict=True)
        ]

    def _apply(self, conversations: list[list[Message]], generate: bool = False) -> list[str]:
        rendered = self.tokenizer.apply_chat_template(
            conversations, chat_template=self.template, tokenize=False, add_generation_prompt=generate
        )
        return list(rendered)

    def _end_of_turn(self) -> tuple[str, bool]:
        """The part of the tail up to its first special token; without one, the tail's text, and EOS is appended."""
        tokens = {str(token) for token in self.tokenizer.all_special_tokens}
        tokens |= {str(token) for token in getattr(self.tokenizer, "added_tokens_decoder", {}).values()}
        ends = [self._tail.find(token) + len(token) for token in tokens if token and token in self._tail]
        if ends:
            first = min(ends)
            return self._tail[:first], False
        if self.tokenizer.eos_token_id is None:
            raise ConfigError(
                "neither data.chat_template nor the tokenizer has a token that ends a response; set eos_token"
            )
        return self._tail.rstrip(), True

    def _split(
        self, prompt: list[Message], row: PreferenceRow, prompt_text: str, chosen: str, rejected: str
    ) -> tuple[str, str, str] | RowError:
        if not (chosen.startswith(prompt_text) and rejected.startswith(prompt_text)):
            # the generation prompt is not how a finished conversation goes on: take the finished one's header
            bare = self._apply([prompt])[0]
            headers = {_header(bare, chosen, row.chosen), _header(bare, rejected, row.rejected)}
            header = headers.pop()
            if header is None or headers:
                return RowError(
                    "refused by the chat template", "the chat template changes the prompt with the response"
                )
            prompt_text = bare + header
        responses = []
        for text in (chosen, rejected):
            if not text.endswith(self._tail):
                return RowError("refused by the chat template", "the chat template ends this response unlike others")
            body = text[len(prompt_text) : len(text) - len(self._tail)]
            if not body.strip():
                return RowError("empty response", "the chat template leaves nothing of a response")
            responses.append(body + self.end_of_turn)
        return prompt_text, responses[0], responses[1]


def with_system(prompt: list[Message], system_prompt: str | None) -> list[Message]:
    """The prompt, behind a system message if it has none and there is one to give."""
    if system_prompt is None or prompt[0]["role"] == "system":
        return prompt
    return [{"role": "system", "content": system_prompt}, *prompt]


def _assistant(text: str) -> Message:
    return {"role": "assistant", "content": text}


def _header(bare: str, full: str, response: str) -> str | None:
    """What stands between a rendered prompt and its response, if the prompt is rendered alike in both."""
    found = full.find(response.strip(), len(bare)) if full.startswith(bare) else -1
    return None if found < 0 else full[len(bare) : found]


def stop_ids(chat: ChatFormat, generation_config: bytes | None, origin: str) -> list[int]:
    """Tokens that end an answer: EOS, the template's end of turn, and what a model's own generation config names.

    Args:
        chat: template and tokenizer.
        generation_config: the model's `generation_config.json` if it has one.
        origin: names the model in errors.

    Raises:
        CheckpointError: the generation config is damaged.
    """
    found = {chat.tokenizer.eos_token_id}
    end = chat.tokenizer(chat.end_of_turn, add_special_tokens=False)["input_ids"]
    if end and not chat.append_eos:
        found.add(end[-1])
    place = f"{origin}: generation_config.json"
    named = Fields(parse_json(generation_config or b"{}", place), place).values.get("eos_token_id")
    found.update(named if isinstance(named, list) else [named])
    return sorted(token for token in found if isinstance(token, int))
