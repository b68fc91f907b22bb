"""Modules that the fork server of `ranks` imports once for all ranks."""

import diffusers.optimization
import peft.utils
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

import finetune_trainer.train.run

torch.set_num_threads(1)

__all__ = [
    "AutoencoderKL",
    "CLIPTextModel",
    "CLIPTokenizer",
    "UNet2DConditionModel",
    "diffusers",
    "finetune_trainer",
    "peft",
]
