"""Sizes of a decoder, and the FLOPs of a training step by the mathematics of the model.

Model FLOPs are what forward and backward need by the mathematics of the model, with two operations for a
multiply-add and a backward pass of twice the forward pass:

- `6 * N * tokens` for the `N` weights of all matrices inside the layers that a token meets: of a mixture's experts,
  those that are chosen for it;
- `6 * hidden * vocabulary * predicted_tokens` for the output matrix, which only positions that predict a
  response token meet;
- `12 * layers * heads * head_dim * attended_pairs` for attention: `q k` and `p v` are `2 * head_dim`
  operations each for every (query, key) pair that the mask lets through, times three for the backward pass.

Activation recomputation, padding and the pairs a kernel computes only to mask them are not model FLOPs, so
they lower the utilisation (MFU). Tokens are those really computed: a shared prompt counts once.
"""

from __future__ import annotations

from dataclasses import dataclass

from nemo_lmpo.formats.architecture import Architecture


@dataclass(frozen=True)
class Shape:
    """Sizes of a decoder, of this project's or of a published run."""

    layers: int
    hidden: int
    ffn: int
    query: int
    """Heads x head dimension."""
    key_value: int
    """Keys and values together: 2 x groups x head dimension."""
    vocabulary: int
    gated: bool = True
    """SwiGLU, with two input matrices; else one."""
    tied: bool = False
    experts: int = 0
    """MLPs of inner size ``ffn`` in a layer of a mixture; 0: a layer has one MLP, and no router."""
    chosen: int = 1
    """MLPs that compute a token."""

    @property
    def fc1(self) -> int:
        """Columns of the MLP's first product."""
        return self.ffn * (2 if self.gated else 1)

    @property
    def layer_weights(self) -> int:
        """Weights of a layer's matrices."""
        return self.shared_weights + self.expert_weights

    @property
    def mlp_weights(self) -> int:
        """Weights of one MLP, or expert."""
        return self.hidden * (self.fc1 + self.ffn)

    @property
    def expert_weights(self) -> int:
        """Weights of all experts of a layer."""
        return self.experts * self.mlp_weights

    @property
    def shared_weights(self) -> int:
        """Weights of a layer that every token meets: attention, and the MLP or the router of experts."""
        attention = self.hidden * (2 * self.query + self.key_value)
        return attention + (self.hidden * self.experts if self.experts else self.mlp_weights)

    @property
    def active_weights(self) -> int:
        """Weights of a layer that a token meets."""
        return self.shared_weights + (self.chosen * self.mlp_weights if self.experts else 0)

    @property
    def weights(self) -> int:
        """Weights of all matrices, embeddings included."""
        return self.layers * self.layer_weights + (1 if self.tied else 2) * self.vocabulary * self.hidden

    def model_flops(self, tokens: int, predicted: int, attended: int) -> float:
        """Of forward and backward by the mathematics of the model (see the top of this file)."""
        products = self.layers * self.active_weights * tokens + self.vocabulary * self.hidden * predicted
        return 6.0 * products + 12.0 * self.layers * self.query * attended


def shape_of(architecture: Architecture) -> Shape:
    """The sizes of a model."""
    return Shape(
        layers=architecture.num_layers,
        hidden=architecture.hidden_size,
        ffn=architecture.mlp_size,
        query=architecture.num_attention_heads * architecture.head_dim,
        key_value=2 * architecture.num_query_groups * architecture.head_dim,
        vocabulary=architecture.vocab_size,
        tied=architecture.tie_word_embeddings,
        experts=0 if architecture.experts is None else architecture.experts.number,
        chosen=1 if architecture.experts is None else architecture.experts.per_token,
    )


def causal_pairs(length: int, prefix: int = 0, window: int | None = None) -> int:
    """(Query, key) pairs of a segment that attends to a whole prefix and causally to itself.

    Args:
        length: queries, each of which also is a key for itself and later queries.
        prefix: keys in front of the segment that all of its queries attend to.
        window: at most this many newest keys a query (sliding window), itself included.
    """
    if window is None:
        return length * prefix + length * (length + 1) // 2
    growing = min(length, max(0, window - prefix))
    return growing * prefix + growing * (growing + 1) // 2 + (length - growing) * window


def model_flops(
    architecture: Architecture,
    *,
    tokens: int,
    predicted_tokens: int | None = None,
    attended: int | None = None,
) -> float:
    """FLOPs of one training step, forward and backward, over all devices.

    Args:
        architecture: sizes of the decoder.
        tokens: positions that went through the layers.
        predicted_tokens: positions that met the output matrix; unset: all.
        attended: (query, key) pairs, as `batches.attended_pairs` counts them; unset: ``tokens`` as one causal sequence.
    """
    predicted = tokens if predicted_tokens is None else predicted_tokens
    pairs = causal_pairs(tokens, window=architecture.sliding_window) if attended is None else attended
    return shape_of(architecture).model_flops(tokens, predicted, pairs)
