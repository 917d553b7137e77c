"""Imports once what every rank needs: the fork server loads this, and the ranks inherit it."""

from __future__ import annotations

import gc
import importlib

from nemo_lmpo.config.recipe import load_recipe

for name in (
    "nemo_lmpo.training.session",
    "nemo_lmpo.monitor.reporter",
    "nemo_lmpo.data.builtin.tiny_tokenizer",
    "megatron.core.distributed",
    "megatron.core.optimizer.distrib_optimizer",
    "megatron.core.optimizer_param_scheduler",
    "megatron.core.pipeline_parallel",
    "megatron.core.models.gpt.gpt_layer_specs",
    "megatron.core.dist_checkpointing.strategies.torch",
    "megatron.core.dist_checkpointing.strategies.cached_metadata_filesystem_reader",
    "transformers.models.llama.modeling_llama",
    "datasets",
):
    importlib.import_module(name)
load_recipe("lmpo_tiny", ["trainer.max_steps=1"])  # brings Hydra and the parser's tables
# A full pass over what was imported takes a rank half a second, and a copy of every page that the server shares.
gc.collect()
gc.freeze()
