"""megatron-core's GPT model on packed rows, ending in hidden states instead of logits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.enums import AttnBackend
from torch import Tensor

from nemo_lmpo.formats.architecture import Architecture
from nemo_lmpo.model.attention_plan import AttentionPlan
from nemo_lmpo.model.rotary import PositionedRotaryEmbedding
from nemo_lmpo.parallel.argmax import vocab_parallel_argmax
from nemo_lmpo.parallel.logprobs import VocabularyPart, vocab_parallel_scores

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_config import TransformerConfig


class PackedGPTModel(GPTModel):
    """A GPT model whose forward takes packed rows and gives the last hidden states of its stage.

    Logits are left to :meth:`scores`, which computes them at chosen positions only.
    """

    def __init__(
        self,
        config: TransformerConfig,
        spec: Any,
        *,
        architecture: Architecture,
        padded_vocab_size: int,
        pre_process: bool,
        post_process: bool,
        vp_stage: int | None = None,
    ) -> None:
        super().__init__(
            config,
            spec,
            vocab_size=padded_vocab_size,
            max_sequence_length=architecture.max_position_embeddings,
            pre_process=pre_process,
            post_process=post_process,
            share_embeddings_and_output_weights=architecture.tie_word_embeddings,
            position_embedding_type="rope",
            rotary_base=int(architecture.rope_theta),
            vp_stage=vp_stage,
        )
        self.architecture = architecture
        self.rotary_pos_emb = PositionedRotaryEmbedding(architecture)

    def _set_attention_backend(self) -> None:
        """Choose Transformer Engine's kernel by its environment variables, where its attention runs at all."""
        if self.config.attention_backend != AttnBackend.auto:
            super()._set_attention_backend()

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        attention_plan: AttentionPlan,
        membership: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Run this stage.

        Args:
            input_ids: ``[1, T / cp]``; used by the first stage.
            position_ids: ``[1, T / cp]``.
            attention_plan: what :class:`nemo_lmpo.model.attention.PackedAttention` needs of the micro-batch.
            membership: ``[S, T / cp]`` bool, which tokens belong to each sequence; routers of experts count by it.
            kwargs: megatron-core's further arguments.

        Returns:
            Hidden states ``[T / cp, 1, hidden_size]``, split over the tensor-parallel group along the first
            dimension under sequence parallelism.
        """
        self.rotary_pos_emb.position_ids = position_ids
        if membership is not None and self.config.sequence_parallel:
            membership = membership.chunk(self.pg_collection.tp.size(), dim=1)[self.pg_collection.tp.rank()]
        # megatron-core hands a bias on to core attention as it is, also when a layer is computed again.
        hidden: Tensor = super().forward(
            input_ids,
            position_ids,
            None,
            extra_block_kwargs={"attention_bias": attention_plan},
            **({} if membership is None else {"padding_mask": membership}),
            **kwargs,
        )
        return hidden

    def _preprocess(self, *args: Any, padding_mask: Tensor | None = None, **kwargs: Any) -> Any:
        """The base class would take a mask of tokens apart; routers get the membership of this rank's as it is."""
        made = super()._preprocess(*args, **kwargs)
        return made if padding_mask is None else (*made[:5], padding_mask, *made[6:])

    def _postprocess(self, hidden_states: Tensor, *args: object, **kwargs: object) -> Tensor:
        return hidden_states

    def output_weight(self) -> Tensor:
        """This rank's rows of the output matrix, ``[padded vocabulary / tp, hidden_size]``."""
        if self.share_embeddings_and_output_weights:
            shared: Tensor = self.shared_embedding_or_output_weight()
            return shared
        own: Tensor = self.output_layer.weight
        return own

    def vocabulary_part(self) -> VocabularyPart:
        """Which rows of the padded vocabulary :meth:`output_weight` holds."""
        rows = self.output_weight().shape[0]
        return VocabularyPart(first=self.pg_collection.tp.rank() * rows, vocab_size=self.architecture.vocab_size)

    def select_hidden(self, hidden_states: Tensor, positions: Tensor) -> Tensor:
        """Hidden states ``[P, hidden_size]`` at ``positions`` of this rank's part of the row.

        Communicates over the tensor-parallel group: under sequence parallelism an all-gather forward and a
        reduce-scatter backward, else an all-reduce backward.
        """
        group = self.pg_collection.tp
        if self.config.sequence_parallel:
            whole: Tensor = gather_from_sequence_parallel_region(hidden_states, group=group)
            return whole.squeeze(1).index_select(0, positions)
        # Select before the copy, so that backward adds up only the selected rows over the group.
        selected = hidden_states.squeeze(1).index_select(0, positions)
        copied: Tensor = copy_to_tensor_model_parallel_region(selected, group=group)
        return copied

    def scores(
        self, hidden_states: Tensor, positions: Tensor, targets: Tensor, *, chunk_tokens: int, correct: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Natural log-probabilities ``[P]`` float32 of ``targets``, and which are the most probable (last stage only).

        Args:
            hidden_states: what :meth:`forward` gave.
            positions: ``[P]`` int64, indices into this rank's part of the row.
            targets: ``[P]`` int64 token ids.
            chunk_tokens: positions whose logits exist at a time.
            correct: whether to tell, as ``[P]`` bool, which targets are the most probable tokens.
        """
        weight = self.output_weight()
        selected = self.select_hidden(hidden_states, positions).to(weight.dtype)
        return vocab_parallel_scores(
            selected,
            weight,
            targets,
            part=self.vocabulary_part(),
            group=self.pg_collection.tp,
            chunk_tokens=chunk_tokens,
            used_elsewhere=self.share_embeddings_and_output_weights and self.pre_process,
            correct=correct,
        )

    def most_probable(self, hidden_states: Tensor, positions: Tensor) -> Tensor:
        """The token ``[P]`` int64 that is most probable behind each position (last stage only).

        Communicates over the tensor-parallel group. Arguments are those of :meth:`scores`.
        """
        weight = self.output_weight()
        selected = self.select_hidden(hidden_states, positions).to(weight.dtype)
        return vocab_parallel_argmax(selected, weight, part=self.vocabulary_part(), group=self.pg_collection.tp)
