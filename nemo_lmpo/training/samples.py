"""Answers of the policy in training to a few validation prompts, greedily, in whatever layout it trains."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from nemo_lmpo.data.chat import ChatFormat
from nemo_lmpo.data.example import Example, Response
from nemo_lmpo.data.stops import stop_ids
from nemo_lmpo.formats.start_model import StartModel
from nemo_lmpo.model.packed_gpt import PackedGPTModel
from nemo_lmpo.monitor.samples import Sample
from nemo_lmpo.monitor.watchdog import watched
from nemo_lmpo.training.batches import BatchBuilder, ExampleList, Examples, MicroBatch
from nemo_lmpo.training.example_table import ExampleTable
from nemo_lmpo.training.parts import StepBatches
from nemo_lmpo.training.pipeline import run_pipeline
from nemo_lmpo.training.policy import Policy
from nemo_lmpo.training.step import LossFunction, forward_micro_batch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKEN = "token"
"""Column of the table of next tokens."""


class GreedyAnswers:
    """Continues prompts by the most probable token until an end token or the limit.

    Every token is a forward pass over all unfinished sequences in packed rows; nothing is kept from one to the next.
    It draws no random numbers, and leaves weights, gradients and statistics alone.
    """

    def __init__(self, policy: Policy, batches: BatchBuilder, *, ends: Sequence[int], max_tokens: int) -> None:
        """Take what answering needs.

        Args:
            policy: answers with its present weights.
            batches: lays rows as those of training.
            ends: tokens that end an answer.
            max_tokens: of an answer; fewer where a row, or the model's positions, have no room for as many.
        """
        self.policy = policy
        self.batches = batches
        self.ends = frozenset(ends)
        self.max_tokens = max_tokens
        self.room = min(batches.row_tokens, policy.architecture.max_position_embeddings)

    def __call__(self, prompts: Sequence[list[int]]) -> list[list[int]]:
        """The answer to each prompt, its end token included; the same on every rank.

        Communicates: for every token what the layout's forward pass does, the choice of the token over the tensor-
        and context-parallel groups, and its distribution over all ranks. All ranks call it together.
        """
        answers: list[list[int]] = [[] for _ in prompts]
        unfinished = list(range(len(prompts)))
        timeout = self.policy.config.trainer.step_timeout
        while unfinished:
            with watched(f"token {max(map(len, answers)) + 1} of sampled answers", timeout):
                tokens = self._next_tokens([prompts[place] + answers[place] for place in unfinished])
            for place, token in zip(unfinished, tokens, strict=True):
                answers[place].append(token)
            unfinished = [place for place in unfinished if not self._ended(prompts[place], answers[place])]
        return answers

    def finished(self, answer: list[int]) -> bool:
        """Whether the policy ended the answer itself."""
        return answer[-1] in self.ends

    def _ended(self, prompt: list[int], answer: list[int]) -> bool:
        return self.finished(answer) or len(answer) >= min(self.max_tokens, self.room - len(prompt))

    def _next_tokens(self, sequences: Sequence[list[int]]) -> list[int]:
        """The token after each sequence.

        A sequence is laid as the prompt of a response that is one unknown token: a response's last token is never fed,
        so all that is laid in a row is the sequence, and the position that predicts is its end.
        """
        unknown = (Response([0]),)
        examples = ExampleList(Example(f"sample {place}", ids, unknown) for place, ids in enumerate(sequences))
        batch = self.batches.build(examples, np.arange(len(examples)))
        table = ExampleTable((TOKEN,), batch.num_examples, self.policy.device)

        def forward_step(micro_batches: Iterator[MicroBatch], model: Any) -> tuple[Tensor, LossFunction]:
            return forward_micro_batch(micro_batches, model, partial(self._choose, table))

        run_pipeline(list(self.policy.chunks), batch.micro_batches, forward_step, forward_only=True)
        table.share(self.policy.groups)
        return [int(token) for token in table.read().column(TOKEN).tolist()]

    def _choose(
        self, table: ExampleTable, hidden: Tensor, *, micro_batch: MicroBatch, model: PackedGPTModel
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Note the tokens of a row on the last stage; the rest is megatron-core's form of a loss.

        Communicates over the tensor-parallel group, and over the context-parallel one: of its ranks, the one that
        holds a sequence's last token chooses.
        """
        chosen = model.most_probable(hidden, micro_batch.predict_positions)
        tokens = torch.zeros(micro_batch.num_examples, dtype=torch.int64, device=hidden.device)
        tokens[micro_batch.sequence_index] = chosen
        context = self.policy.groups.context
        if context.size() > 1:
            dist.all_reduce(tokens, group=context)
        table.put(micro_batch.example_index, {TOKEN: tokens})
        return hidden.new_zeros(()), micro_batch.example_count, {}


def distinct_prompts(examples: Examples, count: int) -> list[list[int]]:
    """Token ids of the first ``count`` different prompts, or of all there are if fewer."""
    found: dict[tuple[int, ...], None] = {}
    for index in range(len(examples)):
        if len(found) == count:
            break
        found.setdefault(tuple(examples[index].prompt_ids))
    return [list(ids) for ids in found]


class AnswerSamples:
    """The run's sampled prompts, and the policy's answers to them at any moment."""

    def __init__(self, answers: GreedyAnswers, prompts: list[list[int]], tokenizer: PreTrainedTokenizerBase) -> None:
        self.answers = answers
        self.prompts = prompts
        self.tokenizer = tokenizer
        self._texts = [self._decode(prompt, skip_special_tokens=False) for prompt in prompts]

    def take(self) -> list[Sample]:
        """An answer to each prompt, the same on every rank; communicates as :class:`GreedyAnswers`."""
        return [
            Sample(
                prompt=text,
                answer=self._decode(ids, skip_special_tokens=True).strip(),
                tokens=len(ids),
                finished=self.answers.finished(ids),
            )
            for text, ids in zip(self._texts, self.answers(self.prompts), strict=True)
        ]

    def _decode(self, ids: list[int], *, skip_special_tokens: bool) -> str:
        text: str = self.tokenizer.decode(
            ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
        )
        return text


def sample_metrics(samples: Sequence[Sample]) -> dict[str, float]:
    """Mean tokens of the answers, and the fraction that the limit cut."""
    return {
        "samples/length": sum(sample.tokens for sample in samples) / len(samples),
        "samples/truncated": sum(not sample.finished for sample in samples) / len(samples),
    }


def answer_samples(policy: Policy, base: StartModel, steps: StepBatches) -> AnswerSamples | None:
    """What `logging.samples` asks for; None: nothing.

    Raises:
        ConfigError: the chat template gives no way to end an answer.
        CheckpointError: the start model's generation config is damaged.
    """
    config, pairs, tokenizer = policy.config, steps.data.validation, steps.data.tokenizer
    if config.logging.samples == 0 or pairs is None:
        return None
    chat = ChatFormat(tokenizer, steps.data.chat.template)
    path = None if base.sidecars is None else base.sidecars / "generation_config.json"
    generation_config = path.read_bytes() if path is not None and path.is_file() else None
    ends = stop_ids(chat, generation_config, str(base.sidecars))
    answers = GreedyAnswers(policy, steps.builder, ends=ends, max_tokens=config.logging.sample_tokens)
    return AnswerSamples(answers, distinct_prompts(pairs, config.logging.samples), tokenizer)
