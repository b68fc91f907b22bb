"""DreamBooth (https://arxiv.org/abs/2208.12242): one prompt names the subject, and class images preserve its class.

The class images are part of the data preparation (`data.images.class_images`). The two classes here select the
trained weights and the captions.
"""

from __future__ import annotations

from finetune_contract.spec import TrainingSpec
from finetune_trainer.data.captions import Captions, OnePrompt
from finetune_trainer.methods.full import Full
from finetune_trainer.methods.lora import Lora


class DreamBooth(Full):
    """All weights of the denoiser, and optionally of the text encoders; see `Method`."""

    @staticmethod
    def captions(training: TrainingSpec) -> Captions:
        """Return the instance prompt as the caption of every image."""
        return _instance_prompt(training)


class DreamBoothLora(Lora):
    """LoRA on the denoiser, and optionally on the text encoders; see `Method`."""

    @staticmethod
    def captions(training: TrainingSpec) -> Captions:
        """Return the instance prompt as the caption of every image."""
        return _instance_prompt(training)


def _instance_prompt(training: TrainingSpec) -> Captions:
    assert training.dreambooth is not None
    return OnePrompt(training.dreambooth.instance_prompt)
