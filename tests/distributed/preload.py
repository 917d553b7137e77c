"""Imports once what every rank needs: the fork server loads this, and the ranks inherit it."""

from __future__ import annotations

import gc

import datasets  # noqa: F401
import megatron.core.dist_checkpointing.strategies.cached_metadata_filesystem_reader
import megatron.core.dist_checkpointing.strategies.torch
import megatron.core.distributed
import megatron.core.models.gpt.gpt_layer_specs
import megatron.core.optimizer.distrib_optimizer
import megatron.core.optimizer_param_scheduler
import transformers.models.llama.modeling_llama  # noqa: F401

import nemo_lmpo.data.builtin.tiny_tokenizer
import nemo_lmpo.monitor.reporter
import nemo_lmpo.training.session  # noqa: F401
from nemo_lmpo.config.recipe import load_recipe

load_recipe("lmpo_tiny", ["trainer.max_steps=1"])  # brings Hydra, the parser's tables and the losses
# A full pass over what was imported takes a rank half a second, and a copy of every page that the server shares.
gc.collect()
gc.freeze()
