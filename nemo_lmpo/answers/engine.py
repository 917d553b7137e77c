"""Generation through `transformers`."""

from __future__ import annotations

import json
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from nemo_lmpo.answers.answer import Answer
from nemo_lmpo.answers.sampling import DEFAULT_NEW_TOKENS, MAX_SEED, Sampling
from nemo_lmpo.answers.trained_model import open_trained, read_training_config, tokenizer_of
from nemo_lmpo.data.encode import PairEncoder
from nemo_lmpo.data.stops import stop_ids
from nemo_lmpo.data.tokenizer import chat_template_text, padding_id
from nemo_lmpo.errors import ConfigError, DataError
from nemo_lmpo.formats.architecture import architecture_to_hf
from nemo_lmpo.formats.chat_files import renders_with_default
from nemo_lmpo.formats.conversion import tensor_names
from nemo_lmpo.formats.export_record import check_weights
from nemo_lmpo.formats.find_model import find_model
from nemo_lmpo.formats.model_files import ModelFiles

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Progress = Callable[[int], object]


@dataclass
class Prompting:
    """All of a stored model but its weights: how conversations become its token ids, and which ids end an answer."""

    directory: Path
    """Where it lies; of a run, its newest checkpoint."""
    trained: Mapping[str, Any]
    """The configuration that it was trained with; empty for models that were not trained here."""
    files: ModelFiles
    tokenizer: PreTrainedTokenizerBase
    encoder: PairEncoder
    stop_ids: list[int]
    """Tokens that end a response."""

    def load(self, device: str, dtype: torch.dtype) -> Generator:
        """The same with the weights.

        Raises:
            CheckpointError: they are not those that were exported.
        """
        check_weights(self.directory)
        return Generator(**vars(self), model=transformers_model(self.files, dtype).to(device).eval())


@dataclass
class Generator(Prompting):
    """A model with its tokenizer, ready to answer."""

    model: PreTrainedModel

    def respond(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, progress: Progress = lambda done: None
    ) -> list[Answer]:
        """Answer prompts given as token ids, in their order.

        Args:
            prompts: token ids, each up to where the response begins.
            sampling: how tokens are chosen. Sampled responses depend on the batch size, too.
            progress: called with how many more prompts are done.

        Raises:
            DataError: a prompt leaves no room within the model's positions.
        """
        responses: dict[int, Answer] = {}
        for batch in self.batches(prompts, sampling):
            responses.update(batch)
            progress(len(batch))
        return [responses[index] for index in range(len(prompts))]

    def batches(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, done: Container[int] = ()
    ) -> Iterator[dict[int, Answer]]:
        """Answer prompts batch by batch; each batch as responses by the index of their prompts.

        Which prompts share a batch follows from all prompts, and each batch has a seed of its own. So batches that are
        left out change nothing in the others: what resumes gives the same bits as what was never interrupted.

        Args:
            prompts: as for :meth:`respond`.
            sampling: how tokens are chosen.
            done: indices of prompts that need no answer; a batch of which all are done is left out.

        Raises:
            DataError: a prompt leaves no room within the model's positions.
        """
        limit = self._new_tokens(max((len(prompt) for prompt in prompts), default=0), sampling.max_new_tokens)
        # Prompts of similar length together, so that little is padded.
        order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
        for start in range(0, len(order), sampling.batch_size):
            selected = order[start : start + sampling.batch_size]
            if all(index in done for index in selected):
                continue
            torch.manual_seed((sampling.seed + start) % (MAX_SEED + 1))
            ids = self._batch([prompts[index] for index in selected], sampling, limit)
            yield {index: self._response(row) for index, row in zip(selected, ids, strict=True)}

    def _new_tokens(self, longest: int, wanted: int | None) -> int:
        """The limit of new tokens for prompts of which the longest has ``longest`` tokens."""
        positions = int(self.model.config.max_position_embeddings)
        room = positions - longest
        if room < 1:
            raise DataError(
                f"a prompt of {longest} tokens leaves no room in the model's {positions} positions; shorten it"
            )
        if wanted is None:
            return min(DEFAULT_NEW_TOKENS, room)
        if wanted > room:
            raise DataError(
                f"a prompt of {longest} tokens and --max-new-tokens {wanted} are more than the model's {positions} "
                "positions; lower the limit or shorten the prompt"
            )
        return wanted

    @torch.inference_mode()
    def _batch(self, prompts: Sequence[Sequence[int]], sampling: Sampling, limit: int) -> list[list[int]]:
        """New token ids of each prompt, padding and all."""
        from transformers import GenerationConfig

        pad, width = padding_id(self.tokenizer), max(len(prompt) for prompt in prompts)
        ids = torch.tensor([[pad] * (width - len(prompt)) + list(prompt) for prompt in prompts])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        sampled = sampling.temperature > 0
        choices = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k}
        # The model's own generation defaults (Llama 3 samples) must not mix in.
        self.model.generation_config = GenerationConfig(
            max_new_tokens=limit,
            do_sample=sampled,
            eos_token_id=self.stop_ids,
            pad_token_id=pad,
            **(choices if sampled else {}),
        )
        device = self.model.device
        output = self.model.generate(ids.to(device), attention_mask=mask.to(device))
        return [row[width:].tolist() for row in output]

    def _response(self, ids: list[int]) -> Answer:
        end = next((place for place, token in enumerate(ids) if token in self.stop_ids), None)
        kept = ids if end is None else ids[: end + 1]
        text = self.tokenizer.decode(kept, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return Answer(text.strip(), kept, finished=end is not None)


def load_generator(
    checkpoint: Path | str,
    *,
    device: str | None = None,
    dtype: torch.dtype | None = None,
    chat_template: str | None = None,
    system_prompt: str | None = None,
) -> Generator:
    """Open a model in any stored form.

    Args:
        checkpoint: path or hub name of a model in any form (:func:`nemo_lmpo.formats.find_model.find_model`).
        device: `cpu` or `cuda`; by default the GPU if there is one.
        dtype: of weights and computation; by default BF16 on a GPU and float32 elsewhere.
        chat_template: as `data.chat_template`; by default what the checkpoint was trained with, or its tokenizer's.
        system_prompt: as `data.system_prompt`.

    Raises:
        CheckpointError: no model there, or a damaged one.
        ConfigError: there is no tokenizer or chat template, or no such device.
    """
    device = choose_device(device)
    prompting = open_prompting(checkpoint, chat_template=chat_template, system_prompt=system_prompt)
    return prompting.load(device, dtype or default_dtype(device))


def default_dtype(device: str) -> torch.dtype:
    """BF16 on a GPU, float32 elsewhere."""
    return torch.bfloat16 if device.startswith("cuda") else torch.float32


def open_prompting(
    checkpoint: Path | str, *, chat_template: str | None = None, system_prompt: str | None = None
) -> Prompting:
    """As :func:`load_generator`, without reading the weights."""
    directory = find_model(checkpoint).path
    files = open_trained(directory, chat_template=chat_template)
    tokenizer = tokenizer_of(files)
    if system_prompt is None and files.chat is not None and (chat_template or not renders_with_default(files.chat)):
        system_prompt = files.chat.system_prompt
    encoder = PairEncoder(
        tokenizer,
        # A trained model's own template is that of its training.
        chat_template_text(chat_template, tokenizer),
        # The pairs' own bound is on what is learned from; here a prompt may fill the model's positions.
        max_length=files.architecture.max_position_embeddings + 1,
        max_prompt_length=files.architecture.max_position_embeddings,
        system_prompt=system_prompt,
    )
    ends = stop_ids(encoder.chat, files.side_file("generation_config.json"), files.origin)
    return Prompting(directory, read_training_config(directory), files, tokenizer, encoder, ends)


def transformers_model(files: ModelFiles, dtype: torch.dtype) -> PreTrainedModel:
    """The model as `transformers` computes it, on the CPU; nothing is written to disk."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig
    from transformers.utils import logging

    content = files.side_file("config.json")
    settings: dict[str, Any] = json.loads(content) if content else architecture_to_hf(files.architecture)
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    state = {name: files.source.get(name).to(dtype) for name in tensor_names(files)}
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].from_pretrained(
            None, config=config, state_dict=state, dtype=dtype, attn_implementation="sdpa"
        )
    finally:
        if shown:
            logging.enable_progress_bar()


def choose_device(device: str | None) -> str:
    """As named; by default the GPU if there is one.

    Raises:
        ConfigError: no such device.
    """
    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"--device {device}: there is no GPU that torch can use; set cpu")
    return device
