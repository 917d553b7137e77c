"""The work of one rank, counted from sizes: what :mod:`nemo_lmpo.trace` executes, without executing it.

A product ``[m, k] x [k, n]`` of forward is joined in backward by two as large, for its input and its weight. What is
no product is counted in bytes that kernels read and write.
"""

from __future__ import annotations

from dataclasses import dataclass

from nemo_lmpo.config.rules import ParallelLayout
from nemo_lmpo.config.schema import Config
from nemo_lmpo.loss.registry import build_loss
from nemo_lmpo.sizing.flops import Shape
from nemo_lmpo.sizing.memory import logprob_chunk
from nemo_lmpo.sizing.work import Product, Work

SIZE = 2
"""Bytes of a BF16 number."""
HEAD = 128
"""Head dimension of published runs."""
FORWARD_OF_LOGITS, BACKWARD_OF_LOGITS = 28, 38
"""Bytes moved per logit: maximum, exponentials and their sum; and exponentials again, their gradient and its cast."""


@dataclass(frozen=True)
class Split:
    """How a model is laid out."""

    tensor: int = 1
    pipeline: int = 1
    virtual: int = 1
    context: int = 1
    data: int = 1
    sequence_parallel: bool = False
    recompute: bool = False
    """Whole layers are computed again in backward."""
    recompute_mlp: bool = False
    """The MLPs are."""
    shard: str = "nothing"
    """What data-parallel ranks share: `nothing`, `optimizer` (its state) or `all` (weights and gradients, too)."""
    overlap: bool = False
    """Gradients are reduced while backward runs."""
    fused: bool = True
    """With Transformer Engine's fused rotary embedding."""
    rounded_moments: bool = False
    """AdamW's moments are bfloat16, which kernels of their own make float32 and round."""
    accumulate: int = 10
    """Bytes moved per weight to add a micro-batch's gradient to the float32 buffer: 10 by a kernel of its own, 8 inside
    of the product."""
    shared_copies: bool = False
    """Weights that ranks share are gathered through one buffer per layer, and so are gradients shared out, as torch's
    FSDP2 does. Not counted for published runs, most of which kept a layer's weights in one piece."""
    overlap_gather: bool = False
    """Weights are gathered behind the first micro-batch's forward."""
    offload: bool = False
    """The optimizer steps on the host."""
    hide_tensor: bool = False
    """Tensor parallelism's collectives run inside of the products."""
    fp8: bool = False
    """Products of layers are in FP8."""
    chunk: int = 1024
    """Positions whose logits exist at a time."""
    passes: int = 0
    """Forward passes of a step besides training's own, without gradients."""
    dense_scores: int = 0
    """Length of sequences whose scores are whole in memory (published runs from before flash attention)."""
    expert: int = 1
    """Ranks over which a layer's experts lie, and over which each of them is cut."""
    expert_tensor: int = 1

    @property
    def replicas(self) -> int:
        """Ranks that hold the same weights."""
        return self.data * self.context

    @property
    def expert_replicas(self) -> int:
        """Ranks that hold the same parts of the same experts."""
        return max(1, self.replicas * self.tensor // (self.expert * self.expert_tensor))

    @property
    def gathering(self) -> float:
        """Bytes moved per weight to gather it: this rank's part cast and put in the buffer, the whole taken out."""
        return 4 + 12 / self.replicas if self.shared_copies else 0.0

    @property
    def sharing_out(self) -> float:
        """Bytes moved per weight to share its gradient out: put in the buffer in float32, this rank's part added up."""
        return 6 + 12 / self.replicas if self.shared_copies else float(self.accumulate)


def split_of(layout: ParallelLayout) -> Split:
    """The layout of a configuration."""
    model, optim = layout.config.model, layout.config.optim
    return Split(
        tensor=model.tensor_model_parallel_size,
        pipeline=model.pipeline_model_parallel_size,
        virtual=model.virtual_pipeline_model_parallel_size or 1,
        context=model.context_parallel_size,
        data=layout.data_parallel_size,
        expert=model.expert_model_parallel_size,
        expert_tensor=model.expert_tensor_parallel_size,
        sequence_parallel=model.sequence_parallel,
        recompute=model.activations_checkpoint_granularity == "full",
        recompute_mlp=model.activations_checkpoint_granularity == "selective" and "mlp" in model.recompute_modules,
        shard="all" if model.fsdp else "optimizer" if optim.use_distributed_optimizer else "nothing",
        shared_copies=model.fsdp,
        overlap=optim.overlap_grad_reduce,
        fused=model.transformer_engine is not False,
        accumulate=8 if model.transformer_engine is not False else 10,
        overlap_gather=optim.overlap_param_gather,
        offload=optim.cpu_offload,
        hide_tensor=model.tp_comm_overlap,
        fp8=model.fp8 is not None,
        rounded_moments=optim.moments_dtype == "bf16",
        chunk=logprob_chunk(model, layout.architecture),
        passes=len(further_passes(layout.config)),
    )


def further_passes(config: Config) -> list[str]:
    """What a step goes forward for besides training itself."""
    loss = build_loss(config.loss)
    found = []
    if loss.statistics is not None and loss.statistics.update == "before_step":
        found.append("statistics before the losses")
    if config.model.reference_in_memory and loss.needs_reference:
        found.append("the reference model")
    return found


@dataclass(frozen=True)
class RowSize:
    """A micro-batch."""

    tokens: int
    predicted: int
    """Positions that meet the vocabulary."""
    attended: int
    """(Query, key) pairs."""


def layer_work(shape: Shape, split: Split, row: RowSize) -> Work:
    """Forward and backward of a layer, on a rank."""
    work = Work()
    tokens, tensor = row.tokens // split.context, split.tensor
    outside = tokens // tensor if split.sequence_parallel else tokens
    forwards = (2 if split.recompute else 1) + split.passes
    mlp_forwards = forwards + split.recompute_mlp
    products = [
        ((shape.query + shape.key_value) // tensor, shape.hidden, forwards),
        (shape.hidden, shape.query // tensor, forwards),
    ]
    if not shape.experts:
        products += [
            (shape.fc1 // tensor, shape.hidden, mlp_forwards),
            (shape.hidden, shape.ffn // tensor, mlp_forwards),
        ]
    for columns, depth, times in products:
        work.products[Product(tokens, columns, depth, fp8=split.fp8)] += times
        work.products[Product(tokens, depth, columns, fp8=split.fp8)] += 1
        work.products[Product(columns, depth, tokens, fp8=split.fp8)] += 1
        if split.fp8:
            # Each operand's largest value is looked for (2 bytes), then it is read and written in rows and in columns
            # (4): the input in each forward, the output's gradient once.
            work.moved["fp8"] += 6 * tokens * (depth * times + columns)
            work.kernels["fp8"] += 2 * (times + 1)
    inner = shape.fc1 // tensor + shape.ffn // tensor
    heads = (shape.query + shape.key_value) // tensor
    # Two norms (2 and 3) and two residual additions (3 and 3); the activation; keys laid out, rotation, QKV parted.
    work.moved["outside"] = SIZE * outside * shape.hidden * (2 * (2 * forwards + 3) + 2 * (3 * forwards + 3))
    if not shape.experts:
        work.moved["activation"] = SIZE * tokens * (inner * mlp_forwards + inner + shape.fc1 // tensor)
    again = forwards - 1
    work.moved["heads"] = SIZE * tokens * heads * (14 + 7 * again if split.fused else 24 + 16 * again)
    # Weights that ranks share are gathered for each forward and for backward.
    gathered = (2 + split.passes) * split.gathering
    work.moved["gradients"] = round((split.sharing_out + gathered) * layer_rank_weights(shape, split))
    work.kernels["layer"] = (47 + 20 * again if split.fused else 81 + 42 * again) + 4 * split.recompute_mlp
    if split.dense_scores:
        # Forward, forward again, backward; masks, softmax and dropout go over the scores some sixteen times.
        scores = tokens * split.dense_scores * shape.query // (tensor * HEAD)
        work.moved["scores"] = SIZE * 16 * scores
    _tensor_parallel(work, shape, split, tokens, forwards)
    if shape.experts:
        work = work.plus(experts_work(shape, split, outside, forwards))
    if split.context > 1:
        whole = SIZE * row.tokens * shape.key_value // tensor
        work.send("all-gather", "context", whole // 2, split.context, 2 * forwards)
        work.send("reduce-scatter", "context", whole // 2, split.context, 2)
    return work


def experts_work(shape: Shape, split: Split, tokens: int, forwards: int) -> Work:
    """Router, dispatch and experts of a layer, forward and backward, on a rank whose ``tokens`` go to even loads.

    Tokens are laid by expert, sent, laid by local expert, computed, and all that backwards; each laying reads and
    writes them once.
    """
    work = Work()
    local, rows = max(1, shape.experts // split.expert), tokens * shape.chosen * split.expert_tensor
    each = max(1, rows // local)
    for columns, depth in (
        (shape.fc1 // split.expert_tensor, shape.hidden),
        (shape.hidden, shape.ffn // split.expert_tensor),
    ):
        work.products[Product(each, columns, depth, local, grouped=True)] += forwards
        work.products[Product(each, depth, columns, local, grouped=True)] += 1
        work.products[Product(columns, depth, each, local, grouped=True)] += 1
    work.products[Product(tokens, shape.experts, shape.hidden)] += forwards
    work.products[Product(tokens, shape.hidden, shape.experts)] += 1
    work.products[Product(shape.experts, shape.hidden, tokens)] += 1
    inner = (shape.fc1 + shape.ffn) // split.expert_tensor
    work.moved["activation"] = SIZE * rows * (inner * (forwards + 1) + shape.fc1 // split.expert_tensor)
    layings = 2 if local == 1 or split.expert * split.expert_tensor == 1 else 4
    if not split.fused:
        layings *= 2  # the experts' outputs are put together, and rows that meet are added up by two kernels
    work.moved["dispatch"] = SIZE * 2 * layings * (forwards + 1) * tokens * shape.chosen * shape.hidden
    # The softmax, the choice and its map, and what statistics read.
    work.moved["router"] = 4 * 16 * (forwards + 1) * tokens * shape.experts
    # A launch for each expert's product, which is what Transformer Engine's grouped layers do, too; without it also for
    # its activation and for adding each of its gradients.
    each_expert = 2 * forwards + 4 if split.fused else 3 * forwards + 7
    work.kernels["experts"] = 38 + 21 * forwards + local * each_expert
    _dispatch(work, shape, split, tokens, forwards)
    return work


def _dispatch(work: Work, shape: Shape, split: Split, tokens: int, forwards: int) -> None:
    """What experts' tokens, and the float32 weights of their choices, take to travel there and back."""
    choices = tokens * shape.chosen
    sent = choices * shape.hidden
    if split.expert > 1:
        work.send("all-to-all", "expert", SIZE * sent, split.expert, 2 * forwards + 2)
        work.send("all-to-all", "expert", 4 * choices, split.expert, forwards + 1)
    if split.expert_tensor > 1:
        # Outputs of parts of an expert are added up in float32, and so are their gradients gathered.
        cut, group = split.expert_tensor, "expert tensor"
        work.send("all-gather", group, SIZE * sent * cut, cut, forwards)
        work.send("all-gather", group, 4 * sent * cut, cut)
        work.send("all-gather", group, 4 * choices * cut, cut, forwards)
        work.send("reduce-scatter", group, 4 * sent * cut, cut, forwards)
        work.send("reduce-scatter", group, SIZE * sent * cut, cut)
        work.send("reduce-scatter", group, 4 * choices * cut, cut)
        work.moved["dispatch"] += (SIZE + 4) * (cut + 1) * sent * (forwards + 1)


def _tensor_parallel(work: Work, shape: Shape, split: Split, tokens: int, forwards: int) -> None:
    if split.tensor == 1:
        return
    whole = SIZE * tokens * shape.hidden
    if split.sequence_parallel and shape.experts:
        # The attention block alone: tokens go to experts as they are split.
        work.send("all-gather", "tensor", whole, split.tensor, forwards + 2)
        work.send("reduce-scatter", "tensor", whole, split.tensor, forwards + 1)
    elif split.sequence_parallel:
        # Each block gathers its input and scatters its output; backward does both again, and gathers the input
        # once more for the weight's gradient.
        work.send("all-gather", "tensor", whole, split.tensor, 2 * forwards + split.recompute_mlp + 4)
        work.send("reduce-scatter", "tensor", whole, split.tensor, 2 * forwards + split.recompute_mlp + 2)
    else:
        work.send("all-reduce", "tensor", whole, split.tensor, 2 * forwards + split.recompute_mlp + 2)


def head_work(shape: Shape, split: Split, row: RowSize) -> Work:
    """Log-probabilities and their gradient on the last stage.

    The logits are computed twice for training, and once in each further pass.
    """
    work = Work()
    rows, positions = shape.vocabulary // split.tensor, row.predicted // split.context
    work.products[Product(positions, rows, shape.hidden)] += 2 + split.passes
    work.products[Product(positions, shape.hidden, rows)] += 1
    work.products[Product(rows, shape.hidden, positions)] += 1
    work.moved["logits"] = positions * rows * (FORWARD_OF_LOGITS * (1 + split.passes) + BACKWARD_OF_LOGITS)
    # Each chunk of positions adds its part of the matrix's gradient to the buffer, inside of the product.
    chunks = -(-positions // split.chunk)
    work.moved["gradients"] = 8 * chunks * rows * shape.hidden
    work.kernels["head"] = 150 + 25 * chunks + split.passes * (25 + 12 * chunks)
    if split.sequence_parallel:
        whole = SIZE * row.tokens // split.context * shape.hidden
        work.send("all-gather", "tensor", whole, split.tensor, 1 + split.passes)
        work.send("reduce-scatter", "tensor", whole, split.tensor)
    if split.shared_copies:
        # The output matrix is gathered for forward, the embedding for backward, too; the head's float32 sum is cast.
        both = (3 + 2 * split.passes) * split.gathering + 6 + split.sharing_out * (1 if shape.tied else 2)
        work.moved["gradients"] += round(both * rows * shape.hidden)
    return work


def micro_batch_work(shape: Shape, split: Split, row: RowSize, *, last: bool) -> Work:
    """Forward and backward of a micro-batch on a stage; ``last``: with the head."""
    work = layer_work(shape, split, row).times(stage_layers(shape, split))
    if last:
        work = work.plus(head_work(shape, split, row))
    if split.pipeline > 1:
        hidden = SIZE * row.tokens // split.context * shape.hidden
        work.send("send", "pipeline", hidden // split.tensor if split.sequence_parallel else hidden, 2)
    return work


def attention_flops(shape: Shape, split: Split, row: RowSize) -> float:
    """Of a micro-batch on a stage: ``q k`` and ``p v`` forward, and five products of that size backward."""
    forwards = (2 if split.recompute or split.dense_scores else 1) + split.passes
    of_layer = (4.0 * forwards + 10.0) * shape.query / split.tensor * row.attended / split.context
    return of_layer * stage_layers(shape, split)


def stage_layers(shape: Shape, split: Split) -> float:
    """Layers of a stage."""
    return shape.layers / split.pipeline


def rank_weights(shape: Shape, split: Split) -> float:
    """Weights of the busiest rank before they are shared over data-parallel ranks."""
    return shared_rank_weights(shape, split) + expert_rank_weights(shape, split)


def shared_rank_weights(shape: Shape, split: Split) -> float:
    """Those of them that every token meets."""
    matrices = 1 if split.pipeline > 1 or shape.tied else 2
    layers = stage_layers(shape, split) * shape.shared_weights
    return (layers + matrices * shape.vocabulary * shape.hidden) / split.tensor


def expert_rank_weights(shape: Shape, split: Split) -> float:
    """Those of them that are experts'."""
    return stage_layers(shape, split) * shape.expert_weights / (split.expert * split.expert_tensor)


def layer_rank_weights(shape: Shape, split: Split) -> float:
    """Weights of a layer on a rank."""
    return shape.shared_weights / split.tensor + shape.expert_weights / (split.expert * split.expert_tensor)
