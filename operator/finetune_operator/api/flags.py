"""The flags of the example scripts of diffusers, and what replaces each one: one table for messages and for the docs.

It covers the scripts whose methods and base models this operator trains: text_to_image, text_to_image_lora, their SDXL
variants, dreambooth, dreambooth_lora, dreambooth_lora_sdxl, textual_inversion, textual_inversion_sdxl, controlnet and
controlnet_sdxl. `messages` reads it for unknown fields, `flags_page` renders it for docs/reference/flags.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

VERSION = "0.40"
"""Release of diffusers whose flags were compared."""


@dataclass(frozen=True)
class ScriptFlag:
    """The replacement of one flag."""

    field: str | None = None
    """Path of the field that takes its place; None if there is none."""
    write: str | None = None
    """What to write, if the field takes another value than the flag."""
    note: str = ""
    """The difference to the flag; without a field, the reason why none is needed."""

    @property
    def advice(self) -> str:
        """What to do instead of writing the flag as a field."""
        if self.field is None:
            return f"leave it out: {self.note}"
        return f"write {self.field if self.write is None else self.write}"


def _none(note: str) -> ScriptFlag:
    return ScriptFlag(note=note)


_BASE: Mapping[str, ScriptFlag] = {
    "pretrained_model_name_or_path": ScriptFlag("spec.model.base"),
    "pretrained_vae_model_name_or_path": ScriptFlag("spec.model.vae"),
    "controlnet_model_name_or_path": ScriptFlag("spec.training.controlnet.base"),
    "revision": ScriptFlag("spec.model.revision"),
    "variant": ScriptFlag("spec.model.variant"),
    "non_ema_revision": _none("train from the weights of spec.model.revision and spec.model.variant"),
    "tokenizer_name": _none("the tokenizer is that of spec.model.base"),
    "prediction_type": _none("it is read from the scheduler of spec.model.base"),
    "cache_dir": _none("all jobs share the cache on the volume of spec.checkpoint.storage"),
}
_DATA: Mapping[str, ScriptFlag] = {
    "dataset_name": ScriptFlag("spec.dataset.source"),
    "train_data_dir": ScriptFlag("spec.dataset.source"),
    "instance_data_dir": ScriptFlag("spec.dataset.source"),
    "dataset_config_name": _none("write the parquet files of that configuration as spec.dataset.source"),
    "image_column": ScriptFlag("spec.dataset.columns.image"),
    "caption_column": ScriptFlag("spec.dataset.columns.caption", note="the LoRA script for SDXL has no default"),
    "conditioning_image_column": ScriptFlag("spec.dataset.columns.conditioning", note="has no default"),
    "max_train_samples": ScriptFlag("spec.dataset.maxSamples", note="takes the first ones; the scripts shuffle before"),
    "repeats": ScriptFlag("spec.dataset.repeats", note="the default is 1; in textual_inversion it is 100"),
    "resolution": ScriptFlag("spec.training.resolution", note="the default is 512; in the scripts for SDXL it is 1024"),
    "center_crop": ScriptFlag(
        "spec.training.centerCrop",
        note="the default is a random crop, and for ControlNet the centre; textual_inversion distorts the image to a "
        "square instead",
    ),
    "random_flip": ScriptFlag("spec.training.randomFlip", note="textual_inversion always mirrors half of the images"),
    "image_interpolation_mode": _none("images are always reduced with Lanczos"),
    "crops_coords_top_left_h": _none("SDXL is given the position of the real crop"),
    "crops_coords_top_left_w": _none("SDXL is given the position of the real crop"),
    "proportion_empty_prompts": ScriptFlag("spec.training.captionDropout"),
    "dataloader_num_workers": _none("the next micro-batch is always prepared while the model works"),
    "tokenizer_max_length": _none("captions have the length of the base's tokenizer"),
    "pre_compute_text_embeddings": _none("embeddings are computed once unless a text encoder is trained"),
    "text_encoder_use_attention_mask": _none("no supported base was trained with the mask"),
    "class_labels_conditioning": _none("no supported base has class labels"),
}
_LENGTH: Mapping[str, ScriptFlag] = {
    "max_train_steps": ScriptFlag("spec.training.steps", note="required unless epochs is given; has no default"),
    "num_train_epochs": ScriptFlag("spec.training.epochs", note="excludes steps; has no default"),
    "train_batch_size": ScriptFlag("spec.training.batchSize", note="the default is 1; in the scripts it is 4 or 16"),
    "gradient_accumulation_steps": ScriptFlag("spec.training.gradientAccumulation"),
    "seed": ScriptFlag("spec.training.seed", note="the default is 0; the scripts draw without a seed"),
    "resume_from_checkpoint": ScriptFlag(
        "spec.checkpoint.from",
        "checkpoint.from: {path: FOLDER}",
        note="a job continues from its own checkpoints by itself; the checkpoints of the scripts cannot be read",
    ),
    "checkpointing_steps": ScriptFlag("spec.checkpoint.interval.steps", note="the default is chosen automatically"),
    "checkpoints_total_limit": ScriptFlag("spec.checkpoint.keep", note="the default is 3; the scripts keep all"),
    "save_steps": ScriptFlag("spec.checkpoint.interval.steps", note="outputs are written after the last step"),
}
_OPTIMIZER: Mapping[str, ScriptFlag] = {
    "learning_rate": ScriptFlag(
        "spec.training.learningRate",
        note="has the defaults of the scripts, except for DreamBoothLoRA (1.0e-4; 5.0e-4 in dreambooth_lora)",
    ),
    "text_encoder_lr": ScriptFlag(
        "spec.training.textEncoderLearningRate",
        note="the default is learningRate; 5.0e-6 in dreambooth_lora_sdxl",
    ),
    "scale_lr": _none("multiply spec.training.learningRate by batchSize, gradientAccumulation and the ranks"),
    "lr_scheduler": ScriptFlag("spec.training.lrScheduler"),
    "lr_warmup_steps": ScriptFlag("spec.training.lrWarmupSteps", note="the default is 0; in the scripts it is 500"),
    "lr_num_cycles": ScriptFlag("spec.training.lrNumCycles"),
    "lr_power": ScriptFlag("spec.training.lrPower"),
    "optimizer": ScriptFlag("spec.training.optimizer", note="the values are lower case: adamw, prodigy"),
    "use_8bit_adam": ScriptFlag("spec.training.optimizer", "optimizer: adamw8bit"),
    "adam_beta1": ScriptFlag("spec.training.adamBeta1"),
    "adam_beta2": ScriptFlag("spec.training.adamBeta2"),
    "adam_epsilon": ScriptFlag("spec.training.adamEpsilon"),
    "adam_weight_decay": ScriptFlag(
        "spec.training.adamWeightDecay", note="the default is 0.01; in dreambooth_lora_sdxl it is 0.0001"
    ),
    "adam_weight_decay_text_encoder": _none("spec.training.adamWeightDecay applies to all trained weights"),
    "prodigy_beta3": _none("it is the square root of spec.training.adamBeta2"),
    "prodigy_decouple": _none("the weight decay of Prodigy is always decoupled"),
    "prodigy_use_bias_correction": _none("Prodigy follows the paper, without bias correction"),
    "prodigy_safeguard_warmup": _none("Prodigy follows the paper, without this safeguard"),
    "max_grad_norm": ScriptFlag("spec.training.maxGradNorm", note="textual_inversion does not clip: write 0"),
    "set_grads_to_none": _none("gradients have memory of their own, which is cleared in one pass"),
}
_LOSS: Mapping[str, ScriptFlag] = {
    "snr_gamma": ScriptFlag("spec.training.snrGamma"),
    "noise_offset": ScriptFlag("spec.training.noiseOffset"),
    "offset_noise": ScriptFlag("spec.training.noiseOffset", "noiseOffset: 0.1"),
    "input_perturbation": ScriptFlag("spec.training.inputPerturbation"),
    "timestep_bias_strategy": ScriptFlag("spec.training.timestepBias.strategy"),
    "timestep_bias_multiplier": ScriptFlag("spec.training.timestepBias.multiplier", note="the default is 2; there 1"),
    "timestep_bias_begin": ScriptFlag("spec.training.timestepBias.begin"),
    "timestep_bias_end": ScriptFlag("spec.training.timestepBias.end"),
    "timestep_bias_portion": ScriptFlag("spec.training.timestepBias.portion"),
    "dream_training": _none("DREAM (https://arxiv.org/abs/2312.00210) is not supported"),
    "dream_detail_preservation": _none("DREAM (https://arxiv.org/abs/2312.00210) is not supported"),
    "do_edm_style_training": _none("bases of the EDM noise process are not supported"),
    "debug_loss": _none("trackers and validation show the loss by timestep"),
}
_MEMORY: Mapping[str, ScriptFlag] = {
    "mixed_precision": ScriptFlag("spec.training.precision", note="fp32 takes the place of no"),
    "gradient_checkpointing": ScriptFlag("spec.training.gradientCheckpointing"),
    "enable_xformers_memory_efficient_attention": ScriptFlag(
        "spec.training.attention", "attention: auto", note="torch has such kernels itself"
    ),
    "enable_npu_flash_attention": _none("NPUs are not supported"),
    "allow_tf32": _none("write spec.training.precision: bf16 for speed; fp32 is exact"),
    "use_ema": ScriptFlag("spec.training.ema"),
    "foreach_ema": _none("the average is always updated for all weights together"),
    "offload_ema": _none("write spec.training.memoryPreset, which offloads if nothing else fits"),
}
_METHODS: Mapping[str, ScriptFlag] = {
    "rank": ScriptFlag("spec.training.lora.rank"),
    "lora_dropout": ScriptFlag("spec.training.lora.dropout"),
    "use_dora": ScriptFlag("spec.training.lora.useDora"),
    "train_text_encoder": ScriptFlag(
        "spec.training.dreambooth.trainTextEncoder", note="of the LoRA methods: spec.training.lora.trainTextEncoder"
    ),
    "instance_prompt": ScriptFlag("spec.training.dreambooth.instancePrompt"),
    "class_prompt": ScriptFlag("spec.training.dreambooth.classPrompt"),
    "with_prior_preservation": ScriptFlag(
        "spec.training.dreambooth.classPrompt", "dreambooth.classPrompt, which enables prior preservation"
    ),
    "class_data_dir": ScriptFlag("spec.training.dreambooth.classImages"),
    "num_class_images": ScriptFlag("spec.training.dreambooth.numClassImages"),
    "prior_loss_weight": ScriptFlag("spec.training.dreambooth.priorLossWeight"),
    "prior_generation_precision": _none("class images are generated in spec.training.precision"),
    "sample_batch_size": _none("class images are generated one by one on each rank"),
    "skip_save_text_encoder": _none("an output is always a complete pipeline"),
    "placeholder_token": ScriptFlag("spec.training.textualInversion.placeholderToken"),
    "initializer_token": ScriptFlag("spec.training.textualInversion.initializerToken"),
    "learnable_property": ScriptFlag("spec.training.textualInversion.learnableProperty"),
    "num_vectors": ScriptFlag("spec.training.textualInversion.numVectors"),
}
_RESULTS: Mapping[str, ScriptFlag] = {
    "output_dir": ScriptFlag("spec.outputs", "outputs: [{format: diffusers, to: FOLDER}]"),
    "output_kohya_format": ScriptFlag("spec.outputs", "outputs: [{format: kohya, to: FOLDER}]"),
    "save_as_full_pipeline": _none("the embeddings are a file that pipelines load with load_textual_inversion"),
    "no_safe_serialization": _none("weights are always written as .safetensors"),
    "push_to_hub": ScriptFlag("spec.outputs", "outputs: [{format: diffusers, to: 'hub://OWNER/NAME'}]"),
    "hub_model_id": ScriptFlag("spec.outputs", "outputs: [{format: diffusers, to: 'hub://OWNER/NAME'}]"),
    "hub_token": _none("write the Secret with HF_TOKEN in outputs[].secret"),
    "validation_prompt": ScriptFlag("spec.training.validation.prompts", note="is a list"),
    "validation_prompts": ScriptFlag("spec.training.validation.prompts"),
    "validation_image": ScriptFlag("spec.training.validation.images", note="is a list"),
    "validation_images": _none("it is for bases that edit images, which are not supported"),
    "num_validation_images": _none("write a prompt several times in spec.training.validation.prompts"),
    "validation_steps": ScriptFlag("spec.training.validation.steps", note="the default is the start and the end only"),
    "validation_epochs": ScriptFlag("spec.training.validation.epochs"),
    "validation_scheduler": _none("pictures are sampled with DDIM"),
    "report_to": ScriptFlag("spec.training.trackers", note="is a list; nothing is reported by default"),
    "tracker_project_name": _none("the project is the name of the job"),
    "logging_dir": _none("the files of TensorBoard are in the folder of the job"),
    "local_rank": _none("spec.topology defines the ranks"),
}

TOPICS: Mapping[str, Mapping[str, ScriptFlag]] = {
    "Base model": _BASE,
    "Data": _DATA,
    "Length and checkpoints": _LENGTH,
    "Optimizer and learning rate": _OPTIMIZER,
    "Loss and timesteps": _LOSS,
    "Precision, speed and memory": _MEMORY,
    "Methods": _METHODS,
    "Results and validation": _RESULTS,
}
"""All flags by topic."""
_SHORT: Mapping[str, ScriptFlag] = {"lr": _OPTIMIZER["learning_rate"]}
"""Names that people write instead of a flag."""
FLAGS: Mapping[str, ScriptFlag] = {name: flag for part in (*TOPICS.values(), _SHORT) for name, flag in part.items()}
"""What replaces each flag, by its name without dashes."""
_BY_KEY = {name.replace("_", ""): flag for name, flag in FLAGS.items()}


def find_flag(name: str) -> ScriptFlag | None:
    """Return what replaces a flag that is written as a field, in snake case or in camel case; None for other names."""
    return _BY_KEY.get(name.replace("_", "").replace("-", "").lower())


def render_page() -> str:
    """Return the table of all flags in Markdown."""
    lines = [
        "<!-- Generated from operator/finetune_operator/api/flags.py by `make generate`. Do not edit. -->",
        "",
        "# Flags of the diffusers scripts",
        "",
        f"All flags of the example scripts of diffusers {VERSION} whose methods and base models are supported: "
        "`train_text_to_image`, `train_text_to_image_lora`, `train_dreambooth`, `train_dreambooth_lora`, "
        "`textual_inversion`, `train_controlnet` and their variants for SDXL. A manifest that contains a flag as a "
        "field is refused with the same advice. [Coming from other trainers](../coming-from.md) lists the "
        "differences.",
    ]
    for topic, flags in TOPICS.items():
        lines += ["", f"## {topic}", "", "| flag | field | remark |", "|-|-|-|"]
        lines += [f"| `--{name}` | {_field(flag)} | {_remark(flag)} |" for name, flag in flags.items()]
    return "\n".join(lines) + "\n"


def _field(flag: ScriptFlag) -> str:
    return "none" if flag.field is None else f"`{flag.field}`"


def _remark(flag: ScriptFlag) -> str:
    parts = [f"write `{flag.write}`"] if flag.write is not None and ": " in flag.write else []
    return "; ".join([*parts, *([flag.note] if flag.note else [])])
