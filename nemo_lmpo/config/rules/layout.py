"""Rules about a model on a number of processes: what divides what."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from nemo_lmpo.config.schema import Config, ModelConfig
from nemo_lmpo.formats.architecture import Architecture


@dataclass(frozen=True)
class ParallelLayout:
    """A configuration together with what it is to run on."""

    config: Config
    architecture: Architecture
    world_size: int

    @property
    def model_parallel_size(self) -> int:
        """Processes that share one copy of the data."""
        model = self.config.model
        return model.tensor_model_parallel_size * model.pipeline_model_parallel_size * model.context_parallel_size

    @property
    def data_parallel_size(self) -> int:
        """Replicas that see different pairs."""
        return self.world_size // self.model_parallel_size

    @property
    def replicas(self) -> int:
        """Ranks that have the same weights, or share them."""
        return self.data_parallel_size * self.config.model.context_parallel_size

    @property
    def expert_replicas(self) -> int:
        """Ranks that have the same parts of the same experts, or share them."""
        model = self.config.model
        cut = model.expert_tensor_parallel_size * model.expert_model_parallel_size * model.pipeline_model_parallel_size
        return self.world_size // cut

    def __str__(self) -> str:
        return layout_line(self.config.model, self.data_parallel_size)


def layout_line(model: ModelConfig, data_parallel: int) -> str:
    """`TP 2 x PP 2 (VPP 2) x CP 1 x DP 2 (EP 4)`.

    Virtual stages lie inside the pipeline stages and are not a factor of the number of processes; neither are experts,
    which lie on the ranks of the other groups.
    """
    virtual = model.virtual_pipeline_model_parallel_size
    return (
        f"TP {model.tensor_model_parallel_size} x PP {model.pipeline_model_parallel_size}"
        + (f" (VPP {virtual})" if virtual else "")
        + f" x CP {model.context_parallel_size} x DP {data_parallel}"
        + (f" (EP {model.expert_model_parallel_size})" if model.expert_model_parallel_size > 1 else "")
        + (f" (ETP {model.expert_tensor_parallel_size})" if model.expert_tensor_parallel_size > 1 else "")
    )


def world_size(layout: ParallelLayout) -> Iterator[str]:
    """Processes divide into copies of the model."""
    model = layout.config.model
    if layout.world_size % layout.model_parallel_size:
        yield (
            f"{layout.world_size} processes do not divide by model.tensor_model_parallel_size="
            f"{model.tensor_model_parallel_size} x model.pipeline_model_parallel_size="
            f"{model.pipeline_model_parallel_size} x model.context_parallel_size={model.context_parallel_size}; "
            f"start a multiple of {layout.model_parallel_size} processes or change the layout"
        )


def global_batch(layout: ParallelLayout) -> Iterator[str]:
    """The pairs of a step divide over the copies."""
    size, replicas = layout.config.model.global_batch_size, max(layout.data_parallel_size, 1)
    if size % replicas:
        yield (
            f"model.global_batch_size={size} does not divide by the data-parallel size {replicas}; "
            f"choose a multiple of {replicas}"
        )


def tensor_parallel(layout: ParallelLayout) -> Iterator[str]:
    """Every rank gets whole heads and equal parts of the matrices."""
    tensor = layout.config.model.tensor_model_parallel_size
    shape = layout.architecture
    sizes = [
        ("num_attention_heads", shape.num_attention_heads),
        ("num_key_value_heads", shape.num_query_groups),
        ("hidden_size", shape.hidden_size),
    ]
    if shape.experts is None:
        sizes.append(("intermediate_size", shape.ffn_hidden_size))
    for what, size in sizes:
        if size % tensor:
            yield (
                f"model.tensor_model_parallel_size={tensor} does not divide the model's {what}={size}; "
                f"choose a divisor of it"
            )


def pipeline(layout: ParallelLayout) -> Iterator[str]:
    """Every stage, and every chunk of one, gets equally many layers."""
    model, layers = layout.config.model, layout.architecture.num_layers
    stages, chunks = model.pipeline_model_parallel_size, model.virtual_pipeline_model_parallel_size
    slots = model.pipeline_slots(layers)
    if slots != layers and stages == 1:
        yield (
            "model.account_for_embedding_in_pipeline_split and model.account_for_loss_in_pipeline_split need "
            "model.pipeline_model_parallel_size of at least 2; leave them false"
        )
    counted = f"{layers} layers" if slots == layers else f"{layers} layers with embedding and loss as counted: {slots}"
    if slots % stages:
        yield (
            f"model.pipeline_model_parallel_size={stages} does not divide the model's {counted}; "
            f"choose a divisor of {slots}"
        )
    elif chunks is not None and slots % (stages * chunks):
        yield (
            f"model.pipeline_model_parallel_size={stages} x model.virtual_pipeline_model_parallel_size={chunks} does "
            f"not divide the model's {counted}; choose a divisor of {slots}"
        )


def recompute(layout: ParallelLayout) -> Iterator[str]:
    """Units of recomputed layers are equal."""
    model = layout.config.model
    layers = model.pipeline_slots(layout.architecture.num_layers) // model.pipeline_model_parallel_size
    layers //= model.virtual_pipeline_model_parallel_size or 1
    unit, uniform = model.activations_checkpoint_num_layers, model.activations_checkpoint_method == "uniform"
    if model.activations_checkpoint_granularity == "full" and uniform and layers and layers % unit:
        yield (
            f"model.activations_checkpoint_num_layers={unit} does not divide the {layers} layers of a stage, which "
            f"model.activations_checkpoint_method=uniform cuts into equal units; choose a divisor of {layers}, or block"
        )


def positions(layout: ParallelLayout) -> Iterator[str]:
    """No sequence is longer than the model was made for."""
    data = layout.config.data
    if data.max_length > layout.architecture.max_position_embeddings:
        yield (
            f"data.max_length={data.max_length} is more than the model's max_position_embeddings="
            f"{layout.architecture.max_position_embeddings}; lower it"
        )
