"""What methods on a UNet share: the base, the loss, the precision, and the text where its encoders are trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from finetune_contract.spec import TrainingSpec
from finetune_trainer.data.batches import Batch, Texts
from finetune_trainer.data.captions import Captions, OwnCaptions
from finetune_trainer.data.sampling.draws import Purpose
from finetune_trainer.data.sampling.order import SampleRef
from finetune_trainer.methods.kernels import attention_kernel, compile_blocks
from finetune_trainer.methods.loss import diffusion_losses
from finetune_trainer.methods.method import MethodContext
from finetune_trainer.methods.packed_conv import pack_convolutions
from finetune_trainer.models.text import TextEncoder


class UNetMethod:
    """The common part; a method says in `__init__` what of it is trained, by `_train`, and then calls `_finish`."""

    needs_captions: ClassVar = True
    needs_conditioning: ClassVar = False
    _trains_unet: ClassVar = False
    """Whether the UNet's own weights are trained, and so kept in fp32."""
    _copies_unet: ClassVar = False
    """Whether something that is trained begins as a copy of it, and so wants it in fp32 at first."""

    _uses_weights = False
    """Whether something reads the frozen weights besides their own layers, so that they must stay as they are."""

    def __init__(self, context: MethodContext) -> None:
        self._context = context
        self._family = context.family
        self._schedule = context.family.schedule.to(context.device)
        self._snr_gamma = context.training.snr_gamma
        self._dtype = context.dtype
        self._is_mixed = False
        self._attention = attention_kernel(context.training.attention, context.device, context.dtype)
        self._parameters: dict[str, nn.Parameter] = {}
        self._modules: list[Any] = []
        self.text: Texts | None = None
        is_exact = self._trains_unet or self._copies_unet
        self._unet = context.family.load_unet(torch.float32 if is_exact else context.dtype)
        self._unet.requires_grad_(self._trains_unet)
        torch.manual_seed(context.draws.torch_seed(Purpose.INIT, SampleRef(0, 0)))

    @staticmethod
    def captions(training: TrainingSpec) -> Captions:
        """The data set's own."""
        del training
        return OwnCaptions()

    @staticmethod
    def encodes_text(training: TrainingSpec) -> bool:
        """Unless a method says otherwise, text encoders are frozen."""
        del training
        return False

    def parameters(self) -> Mapping[str, nn.Parameter]:
        """What is trained, by name."""
        return self._parameters

    def sharded_modules(self) -> Sequence[nn.Module]:
        """None, unless a method says otherwise."""
        return ()

    def set_training(self, training: bool) -> None:
        """Switch dropout and gradient checkpointing on or off."""
        for module in self._modules:
            module.train(training)

    def losses(self, batch: Batch) -> Tensor:
        """Loss of each sample, float32 (n,)."""
        text = batch.text if self.text is None else {**batch.text, **self.text.get(batch.captions)}

        def predict(noisy: Tensor, timesteps: Tensor) -> Tensor:
            return self.predict(noisy, timesteps, text, batch.conditioning)

        return diffusion_losses(batch, self._schedule, predict, self._snr_gamma)

    def predict(
        self, noisy: Tensor, timesteps: Tensor, text: Mapping[str, Tensor], conditioning: Tensor | None = None
    ) -> Tensor:
        """The model's answer to noisy latents."""
        with self._autocast(), self._attention():
            return self._answer(
                self._to_input(noisy), timesteps, self._family.conditions(text, self._dtype), conditioning
            )

    def _answer(
        self, noisy: Tensor, timesteps: Tensor, conditions: dict[str, Any], conditioning: Tensor | None
    ) -> Tensor:
        del conditioning
        answer: Tensor = self._unet(noisy, timesteps, **conditions, return_dict=False)[0]
        return answer

    def _to_input(self, images: Tensor) -> Tensor:
        """In the dtype of the forward pass, channels last: convolutions keep that form, and are faster in it."""
        return images.to(self._dtype).contiguous(memory_format=torch.channels_last)

    def _autocast(self) -> torch.autocast:
        """Where weights that are trained are used themselves, they are in fp32 and the arithmetic is not."""
        is_low = self._dtype is not torch.float32
        return torch.autocast(self._context.device.type, self._dtype, enabled=self._is_mixed and is_low)

    def _load_text(self, dtype: torch.dtype) -> TextEncoder:
        """Text encoders for captions that are encoded in every step."""
        encoder = self._family.load_text_encoder(self._context.device, dtype)
        self.text = _LiveText(self, encoder)
        return encoder

    def _finish(self, trained: Mapping[str, nn.Parameter]) -> None:
        """Take what is trained, move everything to the device, and begin."""
        device, training = self._context.device, self._context.training
        self._parameters = dict(trained)
        for parameter in self._parameters.values():
            parameter.data = parameter.data.float()
        self._modules = [self._unet, *self._modules]
        self._unet.to(device)
        if not self._trains_unet:
            # Not where weights are trained: optimizers and checkpoints want them as they come.
            _frozen_channels_last(self._unet)
            if not self._uses_weights:
                pack_convolutions(self._unet)
        if training.compile:
            for module in self._modules:
                compile_blocks(module)
        if training.gradient_checkpointing:
            self._unet.enable_gradient_checkpointing()
        self.set_training(True)


class _LiveText:
    """Embeddings of the method's own text encoders; see `Texts`."""

    def __init__(self, method: UNetMethod, encoder: TextEncoder) -> None:
        self._method = method
        self._encoder = encoder

    def get(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """Embeddings of captions by name, with their graph."""
        with self._method._autocast():
            return self._encoder.encode(captions)


def _frozen_channels_last(module: nn.Module) -> None:
    for parameter in module.parameters():
        if not parameter.requires_grad and parameter.dim() == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
