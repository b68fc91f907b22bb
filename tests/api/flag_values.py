"""A value for each flag that a field replaces; `test_advice` writes it as the flag and as the field."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tests.api.advice import Edit, T
from tests.api.manifests import REMOVED


@dataclass(frozen=True)
class FlagValue:
    """A value of a flag, and of the field that replaces it."""

    flag_value: Any
    value: Any = None
    """Value of the field; None: that of the flag."""
    base: str = "smallest"
    also: Edit = field(default_factory=dict)
    """Further edits that the field needs."""

    @property
    def field_value(self) -> Any:
        return self.flag_value if self.value is None else self.value


_BIAS = {f"{T}.timestepBias.strategy": "range"}
_PROMPTS = {f"{T}.validation.prompts": ["a dog"]}
_LINEAR = {f"{T}.lrScheduler": "linear"}
_HUB = [{"format": "diffusers", "to": "hub://OWNER/NAME"}]
FLAG_VALUES: dict[str, FlagValue] = {
    "push_to_hub": FlagValue(True, _HUB),
    "hub_model_id": FlagValue("OWNER/NAME", _HUB),
    "pretrained_model_name_or_path": FlagValue("a/b"),
    "pretrained_vae_model_name_or_path": FlagValue("a/b"),
    "controlnet_model_name_or_path": FlagValue("a/b", base="controlnet"),
    "revision": FlagValue("main"),
    "variant": FlagValue("fp16"),
    "dataset_name": FlagValue("a/b"),
    "train_data_dir": FlagValue("/data/circles"),
    "instance_data_dir": FlagValue("/data/dog"),
    "image_column": FlagValue("picture"),
    "caption_column": FlagValue("words"),
    "conditioning_image_column": FlagValue("edges", base="controlnet"),
    "max_train_samples": FlagValue(100),
    "repeats": FlagValue(10),
    "resolution": FlagValue(1024),
    "center_crop": FlagValue(True),
    "random_flip": FlagValue(True),
    "proportion_empty_prompts": FlagValue(0.1),
    "max_train_steps": FlagValue(100),
    "num_train_epochs": FlagValue(3, also={f"{T}.steps": REMOVED}),
    "train_batch_size": FlagValue(2),
    "gradient_accumulation_steps": FlagValue(2),
    "seed": FlagValue(1),
    "resume_from_checkpoint": FlagValue("latest", {"path": "/checkpoints/old"}),
    "checkpointing_steps": FlagValue(50),
    "checkpoints_total_limit": FlagValue(2),
    "save_steps": FlagValue(50),
    "learning_rate": FlagValue(0.001),
    "lr": FlagValue(0.001),
    "text_encoder_lr": FlagValue(5e-6, also={f"{T}.lora": {"trainTextEncoder": True}}),
    "lr_scheduler": FlagValue("cosine"),
    "lr_warmup_steps": FlagValue(10, also=_LINEAR),
    "lr_num_cycles": FlagValue(2, also={f"{T}.lrScheduler": "cosine_with_restarts"}),
    "lr_power": FlagValue(2.0, also={f"{T}.lrScheduler": "polynomial"}),
    "optimizer": FlagValue("prodigy"),
    "use_8bit_adam": FlagValue(True, "adamw8bit", also={"spec.topology.accelerator": "gpu"}),
    "adam_beta1": FlagValue(0.8),
    "adam_beta2": FlagValue(0.99),
    "adam_epsilon": FlagValue(1e-7),
    "adam_weight_decay": FlagValue(0.1),
    "max_grad_norm": FlagValue(0.5),
    "snr_gamma": FlagValue(5.0),
    "noise_offset": FlagValue(0.05),
    "offset_noise": FlagValue(True, 0.1),
    "input_perturbation": FlagValue(0.1),
    "timestep_bias_strategy": FlagValue("later"),
    "timestep_bias_multiplier": FlagValue(3.0, also=_BIAS),
    "timestep_bias_begin": FlagValue(100, also=_BIAS),
    "timestep_bias_end": FlagValue(500, also=_BIAS),
    "timestep_bias_portion": FlagValue(0.5, also={f"{T}.timestepBias.strategy": "later"}),
    "mixed_precision": FlagValue("bf16"),
    "gradient_checkpointing": FlagValue(True),
    "enable_xformers_memory_efficient_attention": FlagValue(True, "auto"),
    "use_ema": FlagValue(True),
    "rank": FlagValue(8),
    "lora_dropout": FlagValue(0.1),
    "use_dora": FlagValue(True),
    "train_text_encoder": FlagValue(True, base="dreambooth"),
    "instance_prompt": FlagValue("a photo of sks dog", base="dreambooth"),
    "class_prompt": FlagValue("a photo of a dog", base="dreambooth"),
    "with_prior_preservation": FlagValue(True, "a photo of a dog", base="dreambooth"),
    "class_data_dir": FlagValue("/data/class", base="dreambooth", also={f"{T}.dreambooth.classPrompt": "a dog"}),
    "num_class_images": FlagValue(50, base="dreambooth", also={f"{T}.dreambooth.classPrompt": "a dog"}),
    "prior_loss_weight": FlagValue(0.5, base="dreambooth", also={f"{T}.dreambooth.classPrompt": "a dog"}),
    "placeholder_token": FlagValue("<toy>", base="textual-inversion"),
    "initializer_token": FlagValue("cat", base="textual-inversion"),
    "learnable_property": FlagValue("style", base="textual-inversion"),
    "num_vectors": FlagValue(2, base="textual-inversion"),
    "output_dir": FlagValue("out", [{"format": "diffusers", "to": "out"}]),
    "output_kohya_format": FlagValue(True, [{"format": "kohya", "to": "out"}]),
    "validation_prompt": FlagValue("a dog", ["a dog"]),
    "validation_prompts": FlagValue(["a dog"]),
    "validation_image": FlagValue(
        "/data/edges.png", ["/data/edges.png"], base="controlnet", also={f"{T}.validation.prompts": ["a dog"]}
    ),
    "validation_steps": FlagValue(10, also=_PROMPTS),
    "validation_epochs": FlagValue(1, also={**_PROMPTS, f"{T}.steps": REMOVED, f"{T}.epochs": 3}),
    "report_to": FlagValue("tensorboard", ["tensorboard"]),
}
"""For each flag with a replacement in `flags.FLAGS` a value, and the manifest that it belongs to."""
