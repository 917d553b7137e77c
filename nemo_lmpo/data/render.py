"""The one place where a chat template is rendered."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from nemo_lmpo.data.messages import PLAIN_INPUTS, Inputs, Message
from nemo_lmpo.formats.template_limits import TemplateFailed, within_limits

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
_GENERATION = re.compile(r"\{%-?\s*(end)?generation\s*-?%\}")
"""Marks around what the assistant says, which transformers adds to Jinja."""


class TemplateRefusal(Exception):
    """The template does not render a conversation; the text says why in one line."""


class TemplateRenderer:
    """A chat template with the tokenizer whose special tokens it may write.

    Args:
        tokenizer: gives the special tokens.
        template: the template's Jinja text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str) -> None:
        self.tokenizer = tokenizer
        self.template = template

    def __call__(
        self, conversations: Sequence[list[Message]], inputs: Inputs = PLAIN_INPUTS, *, generate: bool = False
    ) -> list[str]:
        """The text of each conversation, as transformers renders it.

        Args:
            conversations: whole messages.
            inputs: what the template gets beside them.
            generate: whether an answer is to follow (`add_generation_prompt`).

        Raises:
            TemplateRefusal: the template raises, or fails on one of them.
        """

        def render() -> list[str]:
            # one call for many conversations is several times faster than a call each
            texts: list[str] = self.tokenizer.apply_chat_template(
                list(conversations),
                chat_template=self.template,
                tokenize=False,
                add_generation_prompt=generate,
                tools=inputs.tools,
                **inputs.options,
            )
            return texts

        try:
            return list(within_limits(render))
        except TemplateFailed as error:
            raise TemplateRefusal(str(error)) from None

    @property
    def has_marks(self) -> bool:
        """Whether the template marks what the assistant says (`{% generation %}`)."""
        return _MARK.search(self.template) is not None

    def marked(self, conversation: list[Message], inputs: Inputs = PLAIN_INPUTS) -> list[tuple[int, int]]:
        """Start and stop, in a conversation's text, of the tokens that transformers takes for the assistant's.

        Raises:
            TemplateRefusal: the template raises, or fails.
        """

        def render() -> Any:
            return self.tokenizer.apply_chat_template(
                conversation,
                chat_template=self.template,
                tokenize=True,
                return_dict=True,
                return_assistant_tokens_mask=True,
                tokenizer_kwargs={"return_offsets_mapping": True},
                tools=inputs.tools,
                **inputs.options,
            )

        try:
            found = within_limits(render)
        except TemplateFailed as error:
            raise TemplateRefusal(str(error)) from None
        tokens = zip(found["offset_mapping"], found["assistant_masks"], strict=True)
        runs = (list(run) for marked, run in groupby(tokens, key=lambda token: bool(token[1])) if marked)
        return [(run[0][0][0], run[-1][0][1]) for run in runs]

    def variables(self) -> frozenset[str]:
        """The variables that the template reads and does not set itself."""
        from jinja2 import TemplateError, meta
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        environment = ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"])
        text = _GENERATION.sub("", self.template)
        try:
            return frozenset(meta.find_undeclared_variables(environment.parse(text)))
        except (TemplateError, RecursionError):  # a tag of an extension that is not known here, or too deep
            return frozenset(re.findall(r"[A-Za-z_]\w*", text))
