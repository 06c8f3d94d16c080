"""Names that other fine-tuning tools give to the keys of a recipe: one table for messages, imports and the docs."""

from __future__ import annotations

from dataclasses import dataclass

HF = "transformers"
TRL = "TRL"
PEFT = "PEFT"
AXOLOTL = "Axolotl"
LLAMA_FACTORY = "LLaMA-Factory"
TORCHTUNE = "torchtune"


@dataclass(frozen=True)
class Synonym:
    """Another library's name for something that a recipe says."""

    name: str
    used_by: tuple[str, ...]
    here: str
    """Our key, or keys joined by " and "; empty when rayft has no such setting."""
    note: str = ""
    """What differs, as a sentence."""

    @property
    def answer(self) -> str:
        """The sentence an error message ends with."""
        here = f"here: {self.here}" if self.here else "there is no such key here"
        note = f". {self.note}" if self.note else ""
        return f"That is the name in {', '.join(self.used_by)}; {here}{note}"


_GLOBAL = "It counts the whole cluster: micro batch x accumulation x workers"
_NO_ACCUMULATION = "Accumulation follows from the global batch, the micro batch and the number of workers"

TABLE: tuple[Synonym, ...] = (
    # model
    Synonym("model_name_or_path", (HF, TRL, LLAMA_FACTORY), "model.base"),
    Synonym("base_model", (AXOLOTL,), "model.base"),
    Synonym("pretrained_model_name_or_path", (HF,), "model.base"),
    Synonym("model_name", ("Unsloth",), "model.base"),
    Synonym("base_model_name_or_path", (PEFT,), "model.base"),
    Synonym("model_revision", (TRL, LLAMA_FACTORY), "model.revision"),
    Synonym("revision_of_model", (AXOLOTL,), "model.revision"),
    Synonym("torch_dtype", (HF, TRL), "model.dtype", "One of auto, bf16, fp16, fp32"),
    Synonym("bf16", (HF, TRL, AXOLOTL, LLAMA_FACTORY), "model.dtype", "Write model.dtype: bf16"),
    Synonym("fp16", (HF, TRL, AXOLOTL, LLAMA_FACTORY), "model.dtype", "Write model.dtype: fp16"),
    Synonym("pure_bf16", (LLAMA_FACTORY,), "", "Trainable weights are always kept in fp32"),
    Synonym("load_in_4bit", (HF, TRL, AXOLOTL), "model.quantization", "Write model.quantization: nf4"),
    Synonym("load_in_8bit", (HF, TRL, AXOLOTL), "model.quantization", "Write model.quantization: int8"),
    Synonym("quantization_bit", (LLAMA_FACTORY,), "model.quantization", "Write nf4 for 4 bit, int8 for 8 bit"),
    Synonym("quantization_method", (LLAMA_FACTORY,), "model.quantization", "bitsandbytes: nf4, fp4 or int8"),
    Synonym("bnb_4bit_quant_type", (HF, TRL), "model.quantization", "Write nf4 or fp4"),
    Synonym("double_quantization", (LLAMA_FACTORY,), "model.bnb_4bit_use_double_quant"),
    Synonym("use_bnb_nested_quant", (TRL,), "model.bnb_4bit_use_double_quant"),
    Synonym("flash_attention", (AXOLOTL,), "model.attn_implementation", "Write flash_attention_2"),
    Synonym("sdp_attention", (AXOLOTL,), "model.attn_implementation", "Write sdpa"),
    Synonym("flash_attn", (LLAMA_FACTORY,), "model.attn_implementation"),
    Synonym("attn_impl", ("ms-swift",), "model.attn_implementation"),
    Synonym("new_special_tokens", (LLAMA_FACTORY,), "model.add_tokens"),
    Synonym("add_special_tokens", (LLAMA_FACTORY,), "model.add_tokens"),
    Synonym("special_tokens", (AXOLOTL,), "model.add_tokens", "A list of new tokens"),
    # adapter
    Synonym("peft_type", (PEFT,), "adapter.method"),
    Synonym("peft_config", (TRL,), "adapter"),
    Synonym("use_peft", (TRL,), "adapter", "The section's presence switches it on"),
    Synonym("finetuning_type", (LLAMA_FACTORY,), "adapter.method", "No adapter section means full fine-tuning"),
    Synonym("train_type", ("ms-swift",), "adapter.method", "No adapter section means full fine-tuning"),
    Synonym("r", (PEFT,), "adapter.rank"),
    Synonym("lora_r", (TRL, AXOLOTL), "adapter.rank"),
    Synonym("lora_rank", (LLAMA_FACTORY, TORCHTUNE), "adapter.rank"),
    Synonym("lora_alpha", (PEFT, TRL, AXOLOTL, LLAMA_FACTORY, TORCHTUNE), "adapter.alpha"),
    Synonym("lora_dropout", (PEFT, TRL, AXOLOTL, LLAMA_FACTORY, TORCHTUNE), "adapter.dropout"),
    Synonym("lora_target", (LLAMA_FACTORY,), "adapter.target_modules", "`all` is all-linear here"),
    Synonym("lora_target_modules", (TRL, AXOLOTL), "adapter.target_modules"),
    Synonym("lora_target_linear", (AXOLOTL,), "adapter.target_modules", "Write all-linear"),
    Synonym("lora_attn_modules", (TORCHTUNE,), "adapter.target_modules"),
    Synonym("apply_lora_to_mlp", (TORCHTUNE,), "adapter.target_modules"),
    Synonym("lora_modules_to_save", (TRL, AXOLOTL), "adapter.modules_to_save"),
    Synonym("additional_target", (LLAMA_FACTORY,), "adapter.modules_to_save"),
    Synonym("lora_bias", (PEFT,), "adapter.bias"),
    Synonym("peft_use_rslora", (AXOLOTL,), "adapter.use_rslora"),
    Synonym("peft_use_dora", (AXOLOTL,), "adapter.use_dora"),
    Synonym("peft_init_lora_weights", (AXOLOTL,), "adapter.init_lora_weights"),
    Synonym("pissa_init", (LLAMA_FACTORY,), "adapter.init_lora_weights", "Write pissa or pissa_niter_16"),
    Synonym("loraplus_lr_embedding", (AXOLOTL, LLAMA_FACTORY), ""),
    Synonym("lora_model_dir", (AXOLOTL,), "adapter.init_from"),
    Synonym("adapter_name_or_path", (LLAMA_FACTORY,), "adapter.init_from"),
    # data
    Synonym("datasets", (AXOLOTL,), "data.train", "A path, or a list of {path, format, columns}"),
    Synonym("dataset", (LLAMA_FACTORY, TORCHTUNE), "data.train", "A path, or a list of {path, format, columns}"),
    Synonym("dataset_name", (TRL,), "data.train"),
    Synonym("dataset_dir", (LLAMA_FACTORY,), "data.train"),
    Synonym("train_file", (HF,), "data.train"),
    Synonym("train_dataset", (HF, TRL), "data.train"),
    Synonym("data_files", (HF, AXOLOTL), "data.train"),
    Synonym("eval_dataset", (HF, TRL, LLAMA_FACTORY), "data.validation"),
    Synonym("test_datasets", (AXOLOTL,), "data.validation"),
    Synonym("val_set_size", (AXOLOTL,), "data.validation", "A fraction, or sources"),
    Synonym("val_size", (LLAMA_FACTORY,), "data.validation", "A fraction, or sources"),
    Synonym("validation_split", (HF,), "data.validation"),
    Synonym("max_samples", (LLAMA_FACTORY,), "data.train[].limit"),
    Synonym("interleave_probs", (LLAMA_FACTORY,), "data.train[].weight"),
    Synonym("dataset_text_field", (TRL,), "data.train[].columns", "Write columns: {text: NAME}"),
    Synonym("field_messages", (AXOLOTL,), "data.train[].columns", "Write columns: {messages: NAME}"),
    Synonym("column_map", (TORCHTUNE,), "data.train[].columns"),
    Synonym("type", (AXOLOTL,), "data.train[].format"),
    Synonym("formatting", (LLAMA_FACTORY,), "data.train[].format"),
    Synonym("max_seq_length", (TRL, "Unsloth"), "data.max_length"),
    Synonym("max_seq_len", (TORCHTUNE,), "data.max_length"),
    Synonym("sequence_len", (AXOLOTL,), "data.max_length"),
    Synonym("cutoff_len", (LLAMA_FACTORY,), "data.max_length"),
    Synonym("block_size", (HF,), "data.max_length"),
    Synonym("sample_packing", (AXOLOTL,), "data.packing"),
    Synonym("packed", (TORCHTUNE,), "data.packing"),
    Synonym("neat_packing", (LLAMA_FACTORY,), "data.packing", "Packed examples never see each other here"),
    Synonym("packing_strategy", (TRL,), "data.packing"),
    Synonym("train_on_inputs", (AXOLOTL, TORCHTUNE), "data.train_on", "Write assistant or all"),
    Synonym("train_on_prompt", (LLAMA_FACTORY,), "data.train_on", "Write assistant or all"),
    Synonym("mask_history", (LLAMA_FACTORY,), "data.train_on", "Write last_assistant"),
    Synonym("assistant_only_loss", (TRL,), "data.train_on", "Write assistant"),
    Synonym("completion_only_loss", (TRL,), "data.train_on", "Write assistant"),
    Synonym("roles_to_train", (AXOLOTL,), "data.train_on"),
    Synonym("train_on_responses_only", ("Unsloth",), "data.train_on", "Write assistant"),
    Synonym("template", (LLAMA_FACTORY,), "data.chat_template", "The tokenizer's own template is the default"),
    Synonym("chat_template_path", (TRL,), "data.chat_template"),
    Synonym("chat_template_jinja", (AXOLOTL,), "data.chat_template"),
    # train
    Synonym("num_train_epochs", (HF, TRL, LLAMA_FACTORY), "train.epochs"),
    Synonym("num_epochs", (AXOLOTL,), "train.epochs"),
    Synonym("max_steps_per_epoch", (TORCHTUNE,), "train.max_steps"),
    Synonym("per_device_train_batch_size", (HF, TRL, LLAMA_FACTORY), "train.micro_batch_size"),
    Synonym("per_gpu_train_batch_size", (HF,), "train.micro_batch_size"),
    Synonym("per_device_eval_batch_size", (HF, TRL, LLAMA_FACTORY), "train.micro_batch_size"),
    Synonym("eval_batch_size", (AXOLOTL,), "train.micro_batch_size"),
    Synonym("batch_size", (TORCHTUNE,), "train.global_batch_size and train.micro_batch_size", _GLOBAL),
    Synonym("train_batch_size", (HF, "DeepSpeed"), "train.global_batch_size", _GLOBAL),
    Synonym("train_micro_batch_size_per_gpu", ("DeepSpeed",), "train.micro_batch_size"),
    Synonym("gradient_accumulation_steps", (HF, TRL, AXOLOTL, LLAMA_FACTORY, TORCHTUNE), "train.global_batch_size",
            _NO_ACCUMULATION),
    Synonym("auto_find_batch_size", (HF,), "train.micro_batch_size", "Write auto, which is the default"),
    Synonym("lr", ("PyTorch", TORCHTUNE, AXOLOTL), "train.learning_rate"),
    Synonym("optimizer", (AXOLOTL, TORCHTUNE, "DeepSpeed"), "train.optim"),
    Synonym("optimizer_name", ("Ludwig",), "train.optim"),
    Synonym("lr_scheduler", (AXOLOTL, TORCHTUNE), "train.lr_scheduler_type"),
    Synonym("scheduler", ("DeepSpeed",), "train.lr_scheduler_type"),
    Synonym("cosine_min_lr_ratio", (AXOLOTL,), "train.lr_scheduler_type and train.lr_scheduler_kwargs",
            "Write cosine_with_min_lr and {min_lr_rate: 0.1}"),
    Synonym("warmup_ratio", (HF, TRL, AXOLOTL, LLAMA_FACTORY), "train.warmup_steps", "Below 1 = share of all steps"),
    Synonym("num_warmup_steps", (HF, TORCHTUNE), "train.warmup_steps"),
    Synonym("clip_grad_norm", (TORCHTUNE,), "train.max_grad_norm"),
    Synonym("gradient_clipping", ("DeepSpeed",), "train.max_grad_norm"),
    Synonym("enable_activation_checkpointing", (TORCHTUNE,), "train.gradient_checkpointing"),
    Synonym("activation_checkpointing", (HF, "DeepSpeed"), "train.gradient_checkpointing"),
    Synonym("use_gradient_checkpointing", (PEFT, "Unsloth"), "train.gradient_checkpointing"),
    Synonym("compile", (TORCHTUNE,), "train.torch_compile"),
    Synonym("enable_liger_kernel", (LLAMA_FACTORY,), "train.use_liger_kernel"),
    Synonym("loss_fn", (TORCHTUNE,), "train.loss_function"),
    Synonym("compute_loss_func", (HF,), "train.loss_function"),
    Synonym("stage", (LLAMA_FACTORY,), "train.objective", "sft stays sft, pt is clm"),
    Synonym("rl", (AXOLOTL,), "train.objective", "sft or clm so far"),
    Synonym("freeze_trainable_layers", (LLAMA_FACTORY,), "train.trainable.last_blocks"),
    Synonym("unfrozen_parameters", (AXOLOTL,), "train.trainable.patterns"),
    Synonym("evals_per_epoch", (AXOLOTL,), "train.eval_steps", "Below 1 = share of all steps"),
    Synonym("saves_per_epoch", (AXOLOTL,), "train.save_steps", "Below 1 = share of all steps"),
    Synonym("evaluation_strategy", (HF,), "train.eval_steps"),
    Synonym("eval_strategy", (HF, TRL, LLAMA_FACTORY), "train.eval_steps"),
    Synonym("save_strategy", (HF, TRL, LLAMA_FACTORY), "train.save_steps"),
    Synonym("log_every_n_steps", (TORCHTUNE,), "train.logging_steps"),
    Synonym("metric_logger", (TORCHTUNE,), "train.report_to"),
    Synonym("wandb_project", (AXOLOTL,), "train.report_to", "Write [wandb]; the project comes from WANDB_PROJECT"),
    Synonym("use_wandb", (AXOLOTL,), "train.report_to", "Write [wandb]"),
    Synonym("preprocessing_num_workers", (LLAMA_FACTORY,), "train.dataloader_num_workers"),
    Synonym("neftune_noise_alpha", (HF, TRL, AXOLOTL, LLAMA_FACTORY), "train.trainer_args.neftune_noise_alpha"),
    Synonym("adam_beta1", (HF, AXOLOTL), "train.trainer_args.adam_beta1"),
    Synonym("adam_beta2", (HF, AXOLOTL), "train.trainer_args.adam_beta2"),
    Synonym("adam_epsilon", (HF, AXOLOTL), "train.trainer_args.adam_epsilon"),
    # scale, run
    Synonym("num_workers", ("Ray Train",), "scale.workers"),
    Synonym("ray_num_workers", (AXOLOTL, LLAMA_FACTORY), "scale.workers"),
    Synonym("num_processes", ("accelerate",), "scale.workers"),
    Synonym("nproc_per_node", ("torchrun",), "scale.workers"),
    Synonym("use_gpu", ("Ray Train",), "scale.device", "Write gpu"),
    Synonym("use_cpu", (HF,), "scale.device", "Write cpu"),
    Synonym("distributed_type", ("accelerate",), "scale.strategy"),
    Synonym("deepspeed", (HF, AXOLOTL, LLAMA_FACTORY), "scale.strategy", "Write zero1, zero2 or zero3"),
    Synonym("zero_stage", ("accelerate",), "scale.strategy", "Write zero1, zero2 or zero3"),
    Synonym("zero_optimization", ("DeepSpeed",), "scale.strategy", "Write zero1, zero2 or zero3"),
    Synonym("fsdp", (HF, AXOLOTL), "scale.strategy", "Write fsdp"),
    Synonym("fsdp_config", (HF, AXOLOTL), "scale.strategy", "Write fsdp"),
    Synonym("fsdp_cpu_offload", (TORCHTUNE,), "scale.offload"),
    Synonym("offload_optimizer", ("DeepSpeed",), "scale.offload"),
    Synonym("use_ray", (AXOLOTL, LLAMA_FACTORY), "scale.workers", "Ray is always used; 0 runs without it"),
    Synonym("output_dir", (HF, TRL, AXOLOTL, LLAMA_FACTORY, TORCHTUNE), "storage and name",
            "The run is <storage>/<name>"),
    Synonym("logging_dir", (HF,), "storage and name"),
    Synonym("storage_path", ("Ray Train",), "storage"),
    Synonym("ray_storage_path", (LLAMA_FACTORY,), "storage"),
    Synonym("run_name", (HF, TRL, LLAMA_FACTORY), "name"),
    Synonym("ray_run_name", (AXOLOTL, LLAMA_FACTORY), "name"),
    Synonym("wandb_name", (AXOLOTL,), "name"),
    Synonym("data_seed", (HF,), "seed", "One seed decides the order of the data too"),
    Synonym("resume_from_checkpoint", (HF, AXOLOTL, LLAMA_FACTORY), "", "Use the option --resume"),
    Synonym("overwrite_output_dir", (HF, LLAMA_FACTORY), "", "Use the option --overwrite"),
    Synonym("do_train", (HF, LLAMA_FACTORY), "", "Each verb is a command: rayft train, rayft evaluate"),
    Synonym("do_eval", (HF,), "", "Each verb is a command: rayft train, rayft evaluate"),
    # evaluate
    Synonym("predict_with_generate", (HF, LLAMA_FACTORY), "evaluate.metrics"),
    Synonym("compute_metrics", (HF,), "evaluate.metrics", "Names, or file.py:function"),
    Synonym("generation_max_length", (HF,), "evaluate.max_new_tokens"),
)  # fmt: skip

_BY_NAME = {entry.name: entry for entry in TABLE}


def synonym(path: str) -> Synonym | None:
    """The entry for the last part of a dotted path; `-` counts as `_`, as on other tools' command lines."""
    return _BY_NAME.get(path.rpartition(".")[2].replace("-", "_"))
