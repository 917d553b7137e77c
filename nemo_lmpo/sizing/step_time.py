"""How long a step takes: a roofline over its work, collectives where nothing hides them, and the pipeline's bubble."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from nemo_lmpo.sizing.cards import Card, Machine
from nemo_lmpo.sizing.flops import Shape
from nemo_lmpo.sizing.rank_work import (
    RowSize,
    Split,
    attention_flops,
    expert_rank_weights,
    micro_batch_work,
    rank_weights,
    shared_rank_weights,
    stage_layers,
)
from nemo_lmpo.sizing.work import Product, Work

TILE_ROWS, TILE_COLUMNS, PROLOGUE = 128, 256, 128
"""A matrix product is dealt to processors by tiles; each begins with about this much depth at less than full speed."""
HIDDEN = 0.9
"""Share of backward behind which gradient reduction and weight gathering can hide."""
EXPOSED_OF_SEQUENCE_PARALLEL = 0.6
"""Of a layer's ten collectives backward hides four behind products: the input's second gathering and the scattering of
its gradient, of both blocks."""
INTERLEAVED_EXPOSED = 0.2
"""Of what the interleaved schedule sends, the part that computation does not hide."""
GROUPED = 0.8
"""Rate of the grouped products of experts over that of as many single ones: an assumption, which nothing measured here
supports."""
OPTIMIZER_BYTES, ROUNDING_BYTES = 60, 56
"""Moved a weight in clipping, AdamW in one kernel and the copy back to BF16; and more where moments are bfloat16: made
float32 (12), and of each a random number made (4), added (12) and cut off (6)."""


FP8_RATE = 1.6
"""Of an FP8 product against a BF16 one. Peaks are twice as high; an assumption, as no FP8 run was published with all
that it takes to compute it."""
OVERLAPPED_IN_PRODUCTS = 0.8
"""Share of tensor parallelism's collectives that run inside of products with `model.tp_comm_overlap`; an assumption."""
HOST_BANDWIDTH, HOST_LINK = 200e9, 25e9
"""Bytes/s of a node's memory that AdamW on the host gets, and that a GPU exchanges with it over PCIe 4.0; assumed."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step by what they are spent on; together they are the step."""

    compute: float
    """Kernels of the busiest stage, or the host where it launches them more slowly than they run."""
    communicate: float
    """Collectives inside of the layers that nothing hides."""
    bubble: float
    """Stages waiting for the pipeline to fill and to drain."""
    reduce: float
    """Gradients and weights between replicas that nothing hides."""
    optimizer: float
    host_bound: bool = False
    """The host is slower than the device."""

    @property
    def total(self) -> float:
        """The step."""
        return self.compute + self.communicate + self.bubble + self.reduce + self.optimizer


def product_seconds(product: Product, card: Card) -> float:
    """Time of a matrix product."""
    tiles = -(-product.m // TILE_ROWS) * -(-product.n // TILE_COLUMNS) * product.batch
    waves = tiles / card.processors
    # Libraries choose smaller tiles or split the depth where the last wave would leave processors idle: half of it.
    full = 0.5 + 0.5 * waves / -(-tiles // card.processors)
    rate = card.peak * card.products * full * product.k / (product.k + PROLOGUE) * (GROUPED if product.grouped else 1)
    rate, size = (rate * FP8_RATE, 1) if product.fp8 else (rate, 2)
    return max(product.flops / rate, product.elements * size / (card.bandwidth * card.moved))


def device_seconds(work: Work, attention: float, card: Card) -> float:
    """Time of a rank's kernels one after the other; ``attention`` in FLOPs."""
    products = sum(product_seconds(product, card) * times for product, times in work.products.items())
    moved = sum(work.moved.values()) / (card.bandwidth * card.moved)
    return products + attention / (card.peak * card.attention) + moved


def rate_of(ranks: int, stride: int, card: Card) -> float:
    """Bytes/s that each rank of a group sends.

    Args:
        ranks: size of the group.
        stride: distance of two neighbors of it, in ranks of the job.
        card: the GPU and its node.
    """
    if ranks * stride <= card.joined:
        return card.link * card.collectives
    together = max(1, card.joined // stride)  # members on a node, whose network cards the group's rings share
    return min(card.link, card.network * together) * card.collectives


def all_to_all_rate(ranks: int, stride: int, card: Card) -> float:
    """Bytes/s that each rank of a group sends to all others: over its own network card what goes to other nodes.

    Arguments are those of :func:`rate_of`.
    """
    near = max(1, min(ranks, card.node // stride))
    far = (ranks - near) / max(ranks - 1, 1)
    return card.collectives / (far / card.network + (1 - far) / card.link)


def communication_seconds(work: Work, group: str, rate: float, card: Card) -> float:
    """Time of a group's collectives."""
    sent = sum(number for (_, name), number in work.sent.items() if name == group)
    calls = sum(number for (_, name), number in work.calls.items() if name == group)
    return sent / rate + calls * card.latency


def hides_nothing(split: Split, card: Card) -> bool:
    """Whether no collective of tensor parallelism can be counted on to hide behind a product.

    Before Blackwell that takes CUDA_DEVICE_MAX_CONNECTIONS=1, with which FSDP's own communication would stand still
    (Megatron-LM warns of the two together), so the run leaves the variable alone with FSDP.
    """
    return split.shard == "all" and split.tensor > 1 and card.before_blackwell


@dataclass(frozen=True)
class MicroBatchTime:
    """Seconds of a micro-batch on a stage, forward and backward."""

    compute: float
    communicate: float
    host_bound: bool

    @property
    def total(self) -> float:
        """Both, one after the other."""
        return self.compute + self.communicate


def micro_batch_time(work: Work, attention: float, split: Split, card: Card) -> MicroBatchTime:
    """Time of a micro-batch's work, counted or executed.

    Args:
        work: of one micro-batch on one stage.
        attention: its FLOPs in attention kernels.
        split: the layout.
        card: the GPU in its node.
    """
    device = device_seconds(work, attention, card)
    host = work.num_kernels * card.launch
    inside = communication_seconds(work, "tensor", rate_of(split.tensor, 1, card), card)
    if split.sequence_parallel and split.hide_tensor:
        inside *= 1 - OVERLAPPED_IN_PRODUCTS
    elif split.sequence_parallel and not hides_nothing(split, card):
        inside *= EXPOSED_OF_SEQUENCE_PARALLEL
    inside += communication_seconds(work, "context", rate_of(split.context, split.tensor, card), card)
    inside += communication_seconds(work, "expert", all_to_all_rate(split.expert, split.expert_tensor, card), card)
    inside += communication_seconds(work, "expert tensor", rate_of(split.expert_tensor, 1, card), card)
    # Hidden states go forward in each pass and their gradients back; the interleaved schedule sends more often, behind
    # computation.
    sent = work.sent["send", "pipeline"] / rate_of(2, split.tensor * split.replicas, card)
    inside += (2 + split.passes) * sent * (1 if split.virtual == 1 else INTERLEAVED_EXPOSED * split.virtual)
    return MicroBatchTime(max(device, host), inside, host > device)


@lru_cache(maxsize=64)
def _work(shape: Shape, split: Split, row: RowSize, last: bool) -> Work:
    """Counted once for all machines that a plan compares."""
    return micro_batch_work(shape, split, row, last=last)


def counted(shape: Shape, split: Split, row: RowSize, card: Card, *, last: bool) -> MicroBatchTime:
    """Time of a micro-batch by the formulas of :mod:`nemo_lmpo.sizing.rank_work`."""
    work = _work(shape, split, row, last)
    return micro_batch_time(work, attention_flops(shape, split, row), split, card)


def step_time(shape: Shape, split: Split, row: RowSize, micro_batches: int, machine: Machine) -> StepTime:
    """Seconds of an optimizer step.

    Args:
        shape: the model.
        split: its layout, whose ranks are numbered tensor, context, data, pipeline from the inside out.
        row: a micro-batch.
        micro_batches: of a replica.
        machine: what it runs on.
    """
    last = counted(shape, split, row, machine.card, last=True)
    other = last if split.pipeline == 1 else counted(shape, split, row, machine.card, last=False)
    return step_of(shape, split, last, other, micro_batches, machine.card)


def step_of(
    shape: Shape, split: Split, last: MicroBatchTime, other: MicroBatchTime, micro_batches: int, card: Card
) -> StepTime:
    """Seconds of a step from those of a micro-batch on the last stage, which is the busiest, and on the others."""
    reduce, gather = _between_replicas(shape, split, micro_batches, last, card)
    each = OPTIMIZER_BYTES + (ROUNDING_BYTES if split.rounded_moments else 0)
    own = (
        rank_weights(shape, split)
        if split.shard == "nothing"
        else shared_rank_weights(shape, split) / split.replicas
        + expert_rank_weights(shape, split) / split.expert_replicas
    )
    optimizer = own * each / (card.bandwidth * card.moved)
    if split.offload:
        # Gradients down and weights up, behind which the host reads and writes 28 bytes of a weight.
        optimizer = own * max((4 + 2) / HOST_LINK, 28 * card.node / HOST_BANDWIDTH)
    return StepTime(
        compute=micro_batches * last.compute,
        communicate=micro_batches * last.communicate + gather,
        bubble=(split.pipeline - 1) * other.total / split.virtual,
        reduce=reduce,
        optimizer=optimizer,
        host_bound=last.host_bound,
    )


def _between_replicas(
    shape: Shape, split: Split, micro_batches: int, micro: MicroBatchTime, card: Card
) -> tuple[float, float]:
    """Seconds at the end of a step, and seconds in all micro-batches together."""
    backward = 2 / (3 + split.passes) * micro.total
    groups = (
        (shared_rank_weights(shape, split), split.replicas, split.tensor),
        (expert_rank_weights(shape, split), split.expert_replicas, split.expert * split.expert_tensor),
    )
    # Seconds that a byte of every weight takes.
    seconds = sum(
        weights * (ranks - 1) / ranks / rate_of(ranks, stride, card) for weights, ranks, stride in groups if ranks > 1
    )
    if seconds == 0:
        return 0.0, 0.0
    if split.shard == "all":
        # Weights are gathered for each forward and for backward, gradients scattered, layer by layer ahead of use.
        needed = seconds * (2 * (2 + split.passes) + 4)
        layer = seconds / max(stage_layers(shape, split), 1) * 4
        return 0.0, micro_batches * (max(0.0, needed - HIDDEN * micro.total) + layer)
    gradients = seconds * 4  # float32, a reduce-scatter
    exposed = max(0.0, gradients - HIDDEN * backward) if split.overlap else gradients
    gathered = seconds * (2 if split.shard == "optimizer" else 4)
    if split.overlap_gather:
        gathered = max(0.0, gathered - HIDDEN * micro.total / 3)  # behind one forward
    if split.shard == "nothing" and split.overlap:
        gathered = max(0.0, gathered + gradients - HIDDEN * backward) - exposed
    return exposed + gathered, 0.0
