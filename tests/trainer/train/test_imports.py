"""The modules that a rank imports: each one that it does not need delays its first step."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

pytestmark = pytest.mark.trainer

HEAVY = (
    "bitsandbytes",
    "datasets",
    "diffusers.models.autoencoders.autoencoder_kl_cogvideox",
    "diffusers.models.transformers.transformer_flux",
    "diffusers.models.unets.unet_3d_condition",
    "diffusers.pipelines.stable_diffusion",
    "matplotlib",
    "mlflow",
    "pandas",
    "pyarrow",
    "scipy",
    "sklearn",
    "tensorboard",
    "torch.utils.tensorboard",
    "torchvision",
    "wandb",
)
SOURCE = f"""
import json, sys
from finetune_trainer import libraries
libraries.prepare({{}})
libraries.preload()
from finetune_trainer.methods import controlnet, dreambooth, full, lora, textual_inversion
from peft import LoraConfig
print(json.dumps([name for name in {HEAVY!r} if name in sys.modules]))

# Deferred packages behave like others when they are used as a whole, or by the library itself.
import diffusers.models.unets
from diffusers import StableDiffusionXLPipeline
from diffusers.models.transformers import FluxTransformer2DModel
assert diffusers.models.unets.UNet3DConditionModel.__name__ == "UNet3DConditionModel"
assert not hasattr(diffusers.models.unets, "no_such_name")
assert not hasattr(diffusers.models.unets, "__wrapped__")
assert diffusers.models.unets.__loader__.is_package("diffusers.models.unets")
controlnet = diffusers.ControlNetModel
assert controlnet is diffusers.models.controlnets.ControlNetModel
"""


def test_a_rank_imports_no_heavy_module_that_it_does_not_need() -> None:
    done = subprocess.run([sys.executable, "-c", SOURCE], check=True, capture_output=True, text=True)
    assert json.loads(done.stdout) == []
