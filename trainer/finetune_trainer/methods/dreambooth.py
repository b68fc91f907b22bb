"""DreamBooth (https://arxiv.org/abs/2208.12242): one prompt names the subject, class images keep the class alive.

The class images come with the data (`data.prior`); what is left is which weights are trained.
"""

from __future__ import annotations

from typing import ClassVar

from finetune_contract.spec import TrainingSpec
from finetune_trainer.data.captions import Captions, OnePrompt
from finetune_trainer.methods.full import Full
from finetune_trainer.methods.lora import Lora


class DreamBooth(Full):
    """All weights of the UNet, and of the text encoders where asked; see `Method`."""

    needs_captions: ClassVar = False

    @staticmethod
    def captions(training: TrainingSpec) -> Captions:
        """Every image is called by the prompt that names the subject."""
        return _instance_prompt(training)

    @staticmethod
    def encodes_text(training: TrainingSpec) -> bool:
        """Whether the text encoders are trained besides the UNet."""
        return _trains_text_encoder(training)


class DreamBoothLora(Lora):
    """LoRA on the UNet, and on the text encoders where asked; see `Method`."""

    needs_captions: ClassVar = False

    @staticmethod
    def captions(training: TrainingSpec) -> Captions:
        """Every image is called by the prompt that names the subject."""
        return _instance_prompt(training)

    @staticmethod
    def encodes_text(training: TrainingSpec) -> bool:
        """Either block may ask for it."""
        return _trains_text_encoder(training) or Lora.encodes_text(training)


def _instance_prompt(training: TrainingSpec) -> Captions:
    assert training.dreambooth is not None
    return OnePrompt(training.dreambooth.instance_prompt)


def _trains_text_encoder(training: TrainingSpec) -> bool:
    return training.dreambooth is not None and training.dreambooth.train_text_encoder
