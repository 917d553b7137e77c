"""Names that people know from TRL, Hugging Face's Trainer, PEFT, NeMo-Aligner and NeMo-RL, and what they are here.

Only messages about unknown keys use it. A name that is a setting's last part here (`weight_decay`, `max_steps`, `beta`)
needs no line, unless it means something else there.
"""

from __future__ import annotations

from collections.abc import Iterator

_COUNTERPARTS: dict[str, str] = {
    # Length and amount of training
    "max_num_epochs": "trainer.max_epochs",
    "num_train_epochs": "trainer.max_epochs",
    "epochs": "trainer.max_epochs",
    "max_num_steps": "trainer.max_steps",
    "train_batch_size": "model.global_batch_size",
    "train_global_batch_size": "model.global_batch_size",
    "max_seq_length": "data.max_length",
    "max_total_sequence_length": "data.max_length",
    "seq_length": "data.max_length",
    "encoder_seq_length": "data.max_length",
    "cutoff_len": "data.max_length",
    "max_input_seq_length": "data.max_prompt_length",
    # Optimizer and schedule
    "learning_rate": "optim.lr",
    "adam_epsilon": "optim.eps",
    "adam_beta1": "optim.betas",
    "adam_beta2": "optim.betas",
    "max_grad_norm": "trainer.gradient_clip_val",
    "clip_grad": "trainer.gradient_clip_val",
    "warmup": "optim.sched.warmup_fraction",
    "warmup_ratio": "optim.sched.warmup_fraction",
    "lr_scheduler": "optim.sched.name",
    "lr_scheduler_type": "optim.sched.name",
    "scheduler": "optim.sched.name",
    "overlap_grad_sync": "optim.overlap_grad_reduce",
    # Validation, logging, checkpoints
    "eval_steps": "trainer.val_check_interval",
    "val_period": "trainer.val_check_interval",
    "logging_steps": "logging.log_interval",
    "log_every_n_steps": "logging.log_interval",
    "disable_tqdm": "logging.progress_bar",
    "enable_progress_bar": "logging.progress_bar",
    "run_name": "name",
    "output_dir": "run_dir",
    "logging_dir": "run_dir",
    "explicit_log_dir": "run_dir",
    "log_dir": "run_dir",
    "checkpoint_dir": "run_dir",
    "generate_during_eval": "logging.samples",
    "wandb_project": "logging.wandb.project",
    "wandb_logger_kwargs.project": "logging.wandb.project",
    "wandb_logger_kwargs.name": "logging.wandb.name",
    "save_steps": "checkpoint.save_interval",
    "save_period": "checkpoint.save_interval",
    "every_n_train_steps": "checkpoint.save_interval",
    "save_total_limit": "checkpoint.keep_last",
    "save_top_k": "checkpoint.keep_best",
    "keep_top_k": "checkpoint.keep_best",
    "metric_for_best_model": "checkpoint.monitor",
    "metric_name": "checkpoint.monitor",
    "greater_is_better": "checkpoint.mode",
    "higher_is_better": "checkpoint.mode",
    "resume_from_checkpoint": "checkpoint.resume",
    "resume_if_exists": "checkpoint.resume",
    "checkpoint_must_save_by": "trainer.max_time_per_run",
    "max_time": "trainer.max_time_per_run",
    # Model and layout
    "model_name_or_path": "model.restore_from_path",
    "model_name": "model.restore_from_path",
    "pretrained_checkpoint": "model.restore_from_path",
    "tokenizer_name_or_path": "model.tokenizer",
    "tokenizer.name": "model.tokenizer",
    "dtype": "trainer.precision",
    "torch_dtype": "trainer.precision",
    "mixed_precision": "trainer.precision",
    "attn_implementation": "model.attention_backend",
    "gpus": "trainer.devices",
    "gpus_per_node": "trainer.devices",
    "nnodes": "trainer.num_nodes",
    "tensor_parallel_size": "model.tensor_model_parallel_size",
    "tp_size": "model.tensor_model_parallel_size",
    "pipeline_parallel_size": "model.pipeline_model_parallel_size",
    "pp_size": "model.pipeline_model_parallel_size",
    "cp_size": "model.context_parallel_size",
    "expert_parallel_size": "model.expert_model_parallel_size",
    "ep_size": "model.expert_model_parallel_size",
    "etp_size": "model.expert_tensor_parallel_size",
    "freeze_moe_router": "model.moe_freeze_router",
    "use_cpu": "trainer.accelerator",
    "no_cuda": "trainer.accelerator",
    "full_determinism": "trainer.deterministic",
    "ddp_timeout": "trainer.distributed_timeout",
    "data_seed": "model.seed",
    "random_seed": "model.seed",
    # Adapters
    "use_peft": "model.peft.name",
    "peft_scheme": "model.peft.name",
    "r": "model.peft.rank",
    "lora_r": "model.peft.rank",
    "lora_rank": "model.peft.rank",
    "adapter_dim": "model.peft.rank",
    "lora_alpha": "model.peft.alpha",
    "lora_dropout": "model.peft.dropout",
    "adapter_dropout": "model.peft.dropout",
    "lora_target_modules": "model.peft.target_modules",
    # Data
    "dataset_name": "data.train.path",
    "dataset": "data.train.path",
    "train_file": "data.train.path",
    "data_prefix": "data.train.path",
    "dataset_train_split": "data.train.split",
    "dataset_test_split": "data.validation.split",
    "validation_file": "data.validation.path",
    "dataset_num_proc": "data.num_workers",
    "assistant_only_loss": "data.predict",
    "max_train_samples": "data.train.limit",
    "max_eval_samples": "data.validation.limit",
    "max_samples": "data.train.limit",
    # Losses
    "loss.type": "loss.name",
    "loss.label": "loss.name",
    "loss_type": "loss.name",
    "preference_loss": "loss.name",
    "pref_loss": "loss.name",
    "method": "loss.name",
    "ref_policy_kl_penalty": "loss.beta",
    "reference_policy_kl_penalty": "loss.beta",
    "pref_beta": "loss.beta",
    "preference_average_log_probs": "loss.average_log_probs",
    "rpo_alpha": "loss.sft_weight",
    "sft_loss_weight": "loss.sft_weight",
    "pref_ftx": "loss.sft_weight",
    "cpo_alpha": "loss.lam",
    "lambda": "loss.lam",
    "lambda_": "loss.lam",
    "simpo_gamma": "loss.gamma",
    "gamma_beta_ratio": "loss.gamma",
    "home_advantage": "loss.h",
}

_BATCH = (
    "model.global_batch_size counts the pairs of an optimizer step over all processes; how many fit a device at a time "
    "follows from data.row_tokens"
)
_PACKED = "rows are packed from whole pairs without padding, up to data.row_tokens"
_LAYOUT = (
    "the layout is set by model.*_parallel_size, model.fsdp and optim.use_distributed_optimizer; "
    "`nemo-lmpo plan` ranks what fits"
)
_PRECISION = "set trainer.precision to bf16 or 32"
_RECOMPUTE = "set model.activations_checkpoint_granularity to selective or full"
_TRACKERS = "set logging.wandb.project, logging.mlflow.experiment or logging.tensorboard"
_HUB = "models are pushed by `nemo-lmpo export RUN --push-to-hub OWNER/NAME`"
_REFERENCE = "the reference model is the start model and stays fixed"
_LOADER = "pairs are tokenized before training, by data.num_workers processes"
_QUANTIZED = "the base model is not quantized; model.peft.name=lora trains adapters on bf16 weights"
_BALANCED = "set model.moe_aux_loss to global_batch or sequence, and its weight by model.moe_aux_loss_coefficient"
_LOGGED = "metrics.jsonl has every step"
_ADAM = "the optimizer is AdamW: optim.lr, optim.weight_decay, optim.betas, optim.eps"
_VALIDATES = "set data.validation.path and trainer.val_check_interval"
_ADAPTER = "adapters are LoRA's: model.peft.rank, alpha, dropout and target_modules"

_WITHOUT: dict[str, str] = {
    "adapter_name model_adapter_name ref_adapter_name": "a run has one adapter; the model without it is the reference",
    "activation_checkpointing activation_checkpointing_kwargs gradient_checkpointing gradient_checkpointing_kwargs "
    "activation_offloading": _RECOMPUTE,
    "batch_size per_device_train_batch_size per_gpu_train_batch_size train_micro_batch_size "
    "gradient_accumulation_steps accumulate_grad_batches auto_find_batch_size "
    "micro_train_batch_size": _BATCH,
    "per_device_eval_batch_size eval_batch_size val_global_batch_size val_micro_batch_size eval_accumulation_steps "
    "precompute_ref_batch_size eval_do_concat_batches batch_eval_metrics eval_use_gather_object "
    "log_prob_forward_micro_batch_size": "validation and the reference take rows of data.row_tokens, too",
    "bf16 fp16 bf16_full_eval fp16_full_eval tf32 half_precision_backend megatron_amp_O2": _PRECISION,
    "padding_free packing pad_to_multiple_of padding_value pad_token label_pad_token_id "
    "group_by_length length_column_name train_sampling_strategy": _PACKED,
    "deepspeed fsdp_config parallelism_config accelerator_config accelerate_config ddp_backend ddp_broadcast_buffers "
    "ddp_bucket_cap_mb ddp_find_unused_parameters ddp_static_graph bucket_cap_mb strategy dp_size dtensor_cfg "
    "megatron_cfg": _LAYOUT,
    "local_rank": "torchrun and srun tell each process its rank",
    "report_to use_wandb wandb_enabled create_wandb_logger project trackio_bucket_id trackio_space_id "
    "trackio_static_space_id": _TRACKERS,
    "hub_always_push hub_model_id hub_private_repo hub_revision hub_strategy push_to_hub": _HUB,
    "hub_token use_auth_token": "the environment's HF_TOKEN is used",
    "ref_model ref_model_name reference_model ref_model_init_kwargs force_use_ref_model sync_ref_model "
    "ref_model_mixup_alpha ref_model_sync_steps": _REFERENCE,
    "precompute_ref_log_probs": "it is always done before training, unless model.reference_in_memory=true",
    "reference_free": "choose a loss without a reference model: lmpo, simpo, cpo, orpo, rrhf, slic",
    "label_smoothing label_smoothing_factor": "no loss here smooths labels; docs/adding_a_loss.md adds one that does",
    "loss_weights preference_loss_weight": "a run has one loss; loss.sft_weight adds a supervised term to it",
    "f_divergence_type f_alpha_divergence_coef": "losses with a reference model use the reverse KL divergence",
    "use_weighting discopop_tau gt_reward_scale": "no loss here has it; docs/adding_a_loss.md says how to add one",
    "sft_average_log_probs": "loss.sft_weight always weighs the mean over a response's tokens",
    "disable_dropout hidden_dropout attention_dropout": "models are trained without dropout; adapters have "
    "model.peft.dropout",
    "max_completion_length max_target_length max_response_length": "a response may use what the prompt leaves of "
    "data.max_length",
    "truncation_mode": "a prompt that is too long loses its beginning, and a response its end",
    "is_encoder_decoder": "models are decoders",
    "model_init_kwargs": "model.restore_from_path and trainer.precision say what is loaded, and how",
    "model_revision revision": "download the revision, and give its directory as model.restore_from_path",
    "dataset_config dataset_streaming": "data.train.path takes files, directories and hub datasets as they are, "
    "read before training",
    "router_aux_loss_coef moe_aux_loss_coeff moe_router_load_balancing_type output_router_logits": _BALANCED,
    "moe_grouped_gemm moe_permute_fusion moe_token_dispatcher_type moe_router_dtype moe_shared_expert_overlap": "how "
    "tokens reach experts follows from the machine; routers compute in float32",
    "moe_expert_capacity_factor moe_pad_expert_input_to_capacity moe_token_drop_policy": "experts have no capacity, "
    "so no token is dropped",
    "moe_z_loss_coeff router_z_loss_coef": "routers have no z-loss; model.moe_aux_loss balances experts",
    "moe_per_layer_logging": "metrics.jsonl has moe/max_over_mean_worst, the worst layer's, in every step",
    "load_in_8bit load_in_4bit bnb_4bit_quant_type use_bnb_nested_quant bnb_4bit_quant_storage "
    "quantization": _QUANTIZED,
    "lora_target_parameters lora_modules_to_save lora_task_type use_rslora use_dora modules_to_save "
    "lora_tuning": _ADAPTER,
    "dataloader_num_workers dataloader_drop_last dataloader_in_order dataloader_multiprocessing_context "
    "dataloader_persistent_workers dataloader_pin_memory dataloader_prefetch_factor preprocessing_num_workers "
    "remove_unused_columns ignore_bias_buffers": _LOADER,
    "use_liger_kernel liger_kernel_config use_liger_loss": "logits exist for model.logprob_chunk_tokens positions at a "
    "time, without further kernels",
    "torch_compile torch_compile_backend torch_compile_mode torch_empty_cache_steps": "nothing is compiled at run time",
    "use_cache": "training needs no cache of keys and values",
    "flash_attn": "set model.attention_backend to auto, flash, te or sdpa",
    "optim_args optim_target_modules optimizer optimizer_type optim.name": _ADAM,
    "lr_scheduler_kwargs": "set optim.sched.min_lr",
    "warmup_steps num_warmup_steps constant_steps": "set optim.sched.warmup_fraction, the part of all steps",
    "neftune_noise_alpha": "embeddings get no noise",
    "eval_strategy evaluation_strategy do_eval do_predict do_train eval_delay prediction_loss_only "
    "include_for_metrics label_names limit_val_batches val_batches": _VALIDATES,
    "eval_on_start val_at_start": "the first validation is after trainer.val_check_interval steps; logging.samples "
    "shows answers before the first step",
    "logging_strategy logging_first_step logging_nan_inf_filter log_level log_level_replica log_on_each_node "
    "include_num_input_tokens_seen skip_memory_metrics": _LOGGED,
    "average_tokens_across_devices": "the loss is the mean over the pairs of model.global_batch_size, on any layout",
    "save_strategy save_on_each_node": "set checkpoint.save_interval",
    "save_only_model": "checkpoints hold all that a resume needs; `nemo-lmpo export RUN` writes the model alone",
    "load_best_model_at_end": "checkpoint.keep_best keeps the best checkpoints by checkpoint.monitor",
    "restore_callback_states_from_checkpoint ignore_data_skip enable_jit_checkpoint": "a run resumes exactly where its "
    "checkpoint was written",
    "save_safetensors": "models are exported as safetensors",
    "debug": "set trainer.profile, or run `nemo-lmpo trace`",
    "limit_train_batches": "set trainer.max_steps, or data.train.limit",
    "alpha": "model.peft.alpha scales adapters, and loss.alpha is an option of lmpo and rdpo",
}


def _with_a_name_each() -> Iterator[tuple[str, str]]:
    for names, sentence in _WITHOUT.items():
        for name in names.split():
            yield name, sentence


COUNTERPARTS = _COUNTERPARTS
"""The setting here, by the name elsewhere; a dotted name is what the key must end in."""
WITHOUT = dict(_with_a_name_each())
"""What to do instead, by a name elsewhere that has no counterpart of the same meaning."""
