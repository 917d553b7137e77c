"""From examples to this rank's micro-batches: which make a step, and which part of them this process computes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from nemo_lmpo.config.schema import Config
from nemo_lmpo.data.epoch import Lengths
from nemo_lmpo.data.example import Example, PackedRow, PackedSequence
from nemo_lmpo.data.mismatched import MismatchedLengths
from nemo_lmpo.data.pack import example_tokens, imbalance, pack_examples, plan_micro_batches
from nemo_lmpo.model.attention_plan import AttentionPlan, plan_attention
from nemo_lmpo.parallel.context import attention_spans, local_positions
from nemo_lmpo.parallel.groups import ParallelGroups
from nemo_lmpo.sizing.flops import causal_pairs
from nemo_lmpo.sizing.row_length import longest_row, row_multiple


class Examples(Protocol):
    """What training needs of a dataset."""

    @property
    def num_responses(self) -> int:
        """Responses of each example."""

    @property
    def mismatched(self) -> Examples | None:
        """The same prompts with answers of other examples, where the loss compares with these."""

    @property
    def lengths(self) -> np.ndarray | Lengths | MismatchedLengths:
        """``[N, 3]``: tokens of prompt, first response and second one, which is 0 where there is none."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...


class ExampleList(list[Example]):
    """Examples in memory, at least one."""

    mismatched: Examples | None = None
    """As :attr:`Examples.mismatched`."""

    @property
    def num_responses(self) -> int:
        """As :attr:`Examples.num_responses`."""
        return len(self[0].responses)

    @property
    def lengths(self) -> np.ndarray:
        """As :attr:`Examples.lengths`."""
        found = np.zeros((len(self), 3), dtype=np.int64)
        for row, example in zip(found, self, strict=True):
            row[0] = len(example.prompt_ids)
            row[1 : 1 + len(example.responses)] = [len(response.ids) for response in example.responses]
        return found


@dataclass(kw_only=True)
class MicroBatch(PackedRow):
    """A rank's part of a packed row under context parallelism (the whole row without it)."""

    attention_plan: AttentionPlan
    """Who attends to whom."""
    shared: Tensor
    """``[P]`` bool: targets within the common length of a pair's responses."""
    example_count: Tensor
    """``B`` as a scalar int32, which megatron-core wants where the loss is."""
    membership: Tensor | None = None
    """``[S, T / cp]`` bool: which tokens belong to each sequence of the row, padding to none; for routers."""

    def map(self, move: Callable[[Tensor], Tensor]) -> MicroBatch:
        """The micro-batch with every tensor replaced by ``move(tensor)``."""
        tensors: dict[str, Any] = {n: move(v) for n, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, attention_plan=self.attention_plan.map(move), **tensors)


def localize(row: PackedSequence, *, cp_rank: int, cp_size: int, membership: bool = False) -> MicroBatch:
    """Cut out what a context-parallel rank holds, on the host; ``membership`` if routers of experts want it."""
    spans = attention_spans(row.segments, row.num_tokens, cp_rank=cp_rank, cp_size=cp_size)
    held = local_positions(row.num_tokens, cp_rank=cp_rank, cp_size=cp_size)
    place = torch.full((row.num_tokens,), -1, dtype=torch.int64)
    place[held] = torch.arange(held.numel())
    local = place[row.predict_positions]
    here = local >= 0
    return MicroBatch(
        input_ids=row.input_ids[:, held],
        position_ids=row.position_ids[:, held],
        attention_plan=plan_attention(spans, row.num_tokens, cp_size=cp_size),
        predict_positions=local[here],
        target_ids=row.target_ids[here],
        sequence_index=row.sequence_index[here],
        example_index=row.example_index,
        response_lengths=row.response_lengths,
        reference_logps=row.reference_logps,
        desirable=row.desirable,
        shared=within_common_length(row.sequence_index, row.response_lengths)[here],
        example_count=torch.tensor(row.num_examples, dtype=torch.int32),
        membership=sequence_membership(row)[:, held] if membership else None,
    )


def sequence_membership(row: PackedSequence) -> Tensor:
    """``[S, T]`` bool: the tokens of each sequence of a whole row, those of a shared prompt in several.

    A segment belongs to the sequences that have a token predicted in it: of a prompt alone, its last position predicts
    the first token of each response.
    """
    starts, lengths = row.segments[:, 0].long(), row.segments[:, 1].long()
    sequences = int(row.sequence_index.max()) + 1 if row.sequence_index.numel() else 0
    segment_of_target = torch.searchsorted(starts, row.predict_positions, right=True) - 1
    belongs = torch.zeros(sequences, len(starts), dtype=torch.bool)
    belongs[row.sequence_index, segment_of_target] = True
    return belongs.repeat_interleave(lengths, dim=1)


def within_common_length(sequence_index: Tensor, response_lengths: Tensor) -> Tensor:
    """``[P]`` bool: which targets of a whole row have a counterpart in the other responses of their example.

    Args:
        sequence_index: ``[P]``, targets of a response in their order, responses one behind the other.
        response_lengths: ``[B, R]``.
    """
    lengths = response_lengths.flatten().long()
    starts = lengths.cumsum(0) - lengths
    place = torch.arange(sequence_index.numel()) - starts[sequence_index]
    return place < response_lengths.amin(dim=1).long()[sequence_index // response_lengths.shape[1]]


@dataclass
class StepBatch:
    """What this process computes of one step, and what the step is as a whole."""

    micro_batches: list[MicroBatch]
    example_ids: list[str]
    """All examples of the global batch, in its order."""
    kind: str
    """What they are: one of :data:`~nemo_lmpo.data.example.PAIRS` and its siblings."""
    tokens: int
    """Tokens fed to the model over all ranks, without padding."""
    predicted: int
    """Predicted tokens over all ranks: positions that meet the vocabulary matrix."""
    attended: int
    """Query-key pairs that attention computes over all ranks (for the FLOP count)."""
    mean_length: float
    """Predicted tokens of an example's first response, a mean over the global batch."""
    imbalance: float
    """Tokens of the busiest data-parallel rank over the mean."""
    mismatched: StepBatch | None = None
    """The same prompts with answers of other examples, in rows of their own; None where no loss looks at them."""

    @property
    def num_examples(self) -> int:
        """Examples of the global batch."""
        return len(self.example_ids)

    @property
    def all_micro_batches(self) -> list[MicroBatch]:
        """Those of the step, and those of the mismatched answers."""
        return [*self.micro_batches, *([] if self.mismatched is None else self.mismatched.micro_batches)]

    def to(self, device: torch.device) -> StepBatch:
        """The step with its tensors on ``device``: on GPUs one pinned, asynchronous copy a dtype."""
        if device.type == "cpu":
            return self
        tensors: list[Tensor] = []

        def collect(tensor: Tensor) -> Tensor:
            tensors.append(tensor)
            return tensor

        for micro_batch in self.all_micro_batches:
            micro_batch.map(collect)
        moved = iter(copy_together(tensors, device))

        def taken(batch: StepBatch, mismatched: StepBatch | None) -> StepBatch:
            parts = [part.map(lambda _: next(moved)) for part in batch.micro_batches]
            return replace(batch, micro_batches=parts, mismatched=mismatched)

        own = taken(self, None)
        return own if self.mismatched is None else replace(own, mismatched=taken(self.mismatched, None))


def copy_together(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Copies of many small host tensors on ``device``, made of one buffer a dtype."""
    copies: dict[int, Tensor] = {}
    for dtype in {tensor.dtype for tensor in tensors}:
        places = [place for place, tensor in enumerate(tensors) if tensor.dtype == dtype]
        buffer = torch.cat([tensors[place].flatten() for place in places])
        if device.type == "cuda":
            buffer = buffer.pin_memory()
        parts = buffer.to(device, non_blocking=True).split([tensors[place].numel() for place in places])
        copies.update({place: part.view(tensors[place].shape) for place, part in zip(places, parts, strict=True)})
    return [copies[place] for place in range(len(tensors))]


@dataclass
class BatchBuilder:
    """Packs examples into micro-batches. Every rank computes the same plan; nothing is communicated."""

    config: Config
    groups: ParallelGroups
    device: torch.device
    pad_id: int
    sliding_window: int | None = None
    mixture: bool = False
    """Whether the model's routers want to know which tokens belong to which sequence."""

    def __post_init__(self) -> None:
        config, groups, device = self.config, self.groups, self.device
        self.share_prompt = config.data.share_prompt
        self.row_tokens = config.data.row_budget
        self.max_examples_per_row = config.model.micro_batch_size
        interleaved = config.model.virtual_pipeline_model_parallel_size is not None
        self.multiple_of_rows = groups.pipeline.size() if interleaved else 1
        gpu = device.type == "cuda"
        self.pad_to_multiple = row_multiple(config.model, gpu=gpu)
        # Pipeline stages exchange one shape; on GPUs, one shape also means memory that fits again and no kernel that
        # is compiled anew.
        self.equal_lengths = groups.pipeline.size() > 1 or gpu
        # Buffers inside of which collectives run are of one shape for the whole run.
        self.one_length = longest_row(config, gpu=gpu) if config.model.tp_comm_overlap else None

    def build(self, examples: Examples, indices: np.ndarray) -> StepBatch:
        """The step that is made of ``examples[indices]``, on the device."""
        return self.build_on_host(examples, indices).to(self.device)

    def build_on_host(self, examples: Examples, indices: np.ndarray) -> StepBatch:
        """The step that is made of ``examples[indices]``, in main memory."""
        lengths = examples.lengths[indices]
        plan = plan_micro_batches(
            lengths,
            dp_size=self.groups.data.size(),
            row_tokens=self.row_tokens,
            max_examples_per_row=self.max_examples_per_row,
            share_prompt=self.share_prompt,
            multiple_of_rows=self.multiple_of_rows,
        )
        picked = [examples[int(index)] for index in indices]
        own = plan[self.groups.data.rank()]
        sequences = [
            pack_examples(
                [picked[position] for position in positions],
                positions,
                share_prompt=self.share_prompt,
                responses=examples.num_responses,
                pad_to_multiple=self.one_length
                or (self._length(own, lengths) if self.equal_lengths else self.pad_to_multiple),
                pad_id=self.pad_id,
            )
            for positions in own
        ]
        context = self.groups.context
        return StepBatch(
            micro_batches=[
                localize(sequence, cp_rank=context.rank(), cp_size=context.size(), membership=self.mixture)
                for sequence in sequences
            ],
            example_ids=[example.example_id for example in picked],
            kind=picked[0].kind,
            tokens=fed_tokens(lengths, share_prompt=self.share_prompt),
            predicted=int(sum(response.predicted for example in picked for response in example.responses)),
            attended=attended_pairs(lengths, share_prompt=self.share_prompt, window=self.sliding_window),
            mean_length=float(np.mean([example.responses[0].predicted for example in picked])),
            imbalance=imbalance(plan, lengths, share_prompt=self.share_prompt),
            mismatched=None if examples.mismatched is None else self.build_on_host(examples.mismatched, indices),
        )

    def _length(self, plan: list[list[int]], lengths: np.ndarray) -> int:
        """Tokens that hold the longest of these micro-batches, padded."""
        costs = example_tokens(lengths, self.share_prompt)
        longest = max(int(costs[positions].sum()) for positions in plan)
        return -(-max(longest, 1) // self.pad_to_multiple) * self.pad_to_multiple


def fed_tokens(lengths: np.ndarray, *, share_prompt: bool) -> int:
    """Tokens that go through the model for examples of these ``[B, 3]`` lengths, padding not counted."""
    return int(example_tokens(lengths, share_prompt).sum())


def attended_pairs(lengths: np.ndarray, *, share_prompt: bool, window: int | None = None) -> int:
    """(Query, key) pairs of a step.

    Args:
        lengths: ``[B, 3]`` tokens of prompt, first response and second one, which is 0 where there is none.
        share_prompt: whether a pair's prompt is laid once.
        window: the model's sliding window.
    """
    total = 0
    for prompt, *lengths_of_responses in lengths.tolist():
        responses = [length for length in lengths_of_responses if length]
        total += causal_pairs(prompt, window=window) * (1 if share_prompt else len(responses))
        # The last token of a response predicts nothing and is not fed.
        total += sum(causal_pairs(response - 1, prompt, window) for response in responses)
    return total
