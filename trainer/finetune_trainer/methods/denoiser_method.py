"""Common part of all methods on a denoiser: the base, the loss, the precision, and text encoders that are trained."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend

from finetune_contract.spec import Sharding, SwitchMode, TrainingSpec, WeightPrecision
from finetune_trainer.data.batches import Batch, Texts
from finetune_trainer.data.captions import Captions, OwnCaptions
from finetune_trainer.data.sampling.draws import Purpose
from finetune_trainer.data.sampling.order import SampleRef
from finetune_trainer.fused.blocks import use_fused_operations
from finetune_trainer.fused.mask_draws import MaskDraws
from finetune_trainer.intel.layers import TrainedLayers, align_group_norms, optimize_frozen
from finetune_trainer.methods.kernels import (
    attention_kernel,
    attention_order,
    checkpoint_activations,
    compile_blocks,
)
from finetune_trainer.methods.loss import diffusion_losses
from finetune_trainer.methods.method import MethodContext
from finetune_trainer.methods.packed_conv import pack_convolutions
from finetune_trainer.methods.rounded_weights import RoundedWeights
from finetune_trainer.methods.working_copy import WorkingCopy
from finetune_trainer.models.text import TOKENS, TextEncoder, TextPart


class DenoiserMethod:
    """Base class of the methods: a subclass selects the trained parameters in `__init__` and ends with `_finish`."""

    _trains_denoiser: ClassVar = False
    """Whether the denoiser's own weights are trained. They are then kept in fp32."""
    _copies_denoiser: ClassVar = False
    """Whether trained weights are initialized with a copy of the denoiser's. It is then loaded in fp32 first."""

    _uses_weights = False
    """Whether frozen weights are read outside of their own layers, so that their layout must not change."""

    def __init__(self, context: MethodContext) -> None:
        self._context = context
        self._family = context.family
        self._objective = context.family.objective.to(context.device)
        self._snr_gamma = context.training.snr_gamma
        self._dtype = context.dtype
        self._is_mixed = False
        self._layout = torch.channels_last
        self._masks = MaskDraws(context.device) if draws_own_masks(context.training, context.device) else None
        self._low: WorkingCopy | RoundedWeights | None = None
        """The low-precision weights of trained layers."""
        self._packed: TrainedLayers | None = None
        """The trained layers that IPEX computes."""
        self._attention = attention_kernel(context.training.attention, context.device, context.dtype)
        self._parameters: dict[str, nn.Parameter] = {}
        self._modules: list[Any] = []
        self.text: Texts | None = None
        self._live_text: _LiveText | None = None
        self._denoiser = context.load_denoiser(self.denoiser_place(context.dtype, context.device)[0])
        self._denoiser.requires_grad_(self._trains_denoiser)
        torch.manual_seed(context.draws.torch_seed(Purpose.INIT, SampleRef(0, 0)))

    @staticmethod
    def captions(training: TrainingSpec) -> Captions:
        """Return the captions of the data set."""
        del training
        return OwnCaptions()

    @classmethod
    def denoiser_place(cls, dtype: torch.dtype, device: torch.device) -> tuple[torch.dtype, torch.device]:
        """Return the number format and the device of the denoiser that the method starts from."""
        if cls._copies_denoiser:
            return torch.float32, torch.device("cpu")
        return torch.float32 if cls._trains_denoiser else dtype, device

    @classmethod
    def trains_denoiser(cls) -> bool:
        """Return whether the denoiser's own weights are trained."""
        return cls._trains_denoiser

    def parameters(self) -> Mapping[str, nn.Parameter]:
        """Return the trained parameters by name."""
        return self._parameters

    def leaves(self) -> Sequence[nn.Parameter]:
        """Return the tensors that the backward pass computes gradients of."""
        parameters = list(self._parameters.values())
        return parameters if self._low is None else [self._low.leaf(parameter) for parameter in parameters]

    def refresh(self) -> None:
        """Update the copies of the trained parameters."""
        if self._low is not None:
            self._low.refresh()
        if self._packed is not None:
            self._packed.refresh()

    def sharded_modules(self) -> Sequence[nn.Module]:
        """Return no modules; methods that can be sharded override this."""
        return ()

    def set_training(self, training: bool) -> None:
        """Switch dropout and gradient checkpointing on or off."""
        for module in self._modules:
            module.train(training)

    def prepare(self, batch: Batch) -> Batch:
        """Return the batch with the tokens of its captions if the method encodes them, else the same batch."""
        if self._live_text is None or any(name.startswith(TOKENS) for name in batch.text):
            return batch
        return dataclasses.replace(batch, text={**batch.text, **self._live_text.tokenize(batch.captions)})

    def use_attention(self, backends: Sequence[SDPBackend]) -> None:
        """Let the denoiser use these attention kernels, in this order."""
        self._attention = attention_order(backends)

    def modules(self) -> Sequence[nn.Module]:
        """Return the models that compute the losses."""
        return self._modules

    def use_layout(self, layout: torch.memory_format) -> None:
        """Let images, and the weights of convolutions that are not trained themselves, have this layout.

        Trained weights keep theirs, which optimizers and checkpoints expect. Their low-precision copies change.
        """
        self._layout = layout
        trained = {id(parameter) for parameter in self._parameters.values()}
        for module in self._modules:
            _set_layout(module, layout, trained)

    @contextlib.contextmanager
    def forward_context(self) -> Iterator[None]:
        """Return the context in which the models compute, which chooses number formats and kernels."""
        with self._autocast(), self._attention_context():
            yield

    def seed(self, seed: int) -> None:
        """Set the seed of the random numbers of the next pass, e.g. of dropout."""
        torch.manual_seed(seed)
        if self._masks is not None:
            self._masks.seed(seed)

    def generators(self) -> Sequence[torch.Generator]:
        """Return the generators of passes besides torch's own. A captured pass must know them."""
        return () if self._masks is None else self._masks.generators

    def losses(self, batch: Batch) -> Tensor:
        """Return the loss of each sample, float32 (n,)."""
        if self._masks is not None:
            self._masks.restart()
        text = batch.text
        if self._live_text is not None:
            batch = self.prepare(batch)
            text = {**batch.text, **self._live_text.encode(batch.text)}

        def predict(noisy: Tensor, timesteps: Tensor) -> Tensor:
            return self.predict(noisy, timesteps, text, batch.conditioning)

        return diffusion_losses(batch, self._objective, predict, self._snr_gamma)

    def predict(
        self, noisy: Tensor, timesteps: Tensor, text: Mapping[str, Tensor], conditioning: Tensor | None = None
    ) -> Tensor:
        """Return the denoiser's output for noisy latents (n, ...)."""
        with self.forward_context():
            return self._predict(
                self._to_input(noisy), timesteps, self._family.conditions(text, self._dtype), conditioning
            )

    def _predict(
        self, noisy: Tensor, timesteps: Tensor, conditions: dict[str, Any], conditioning: Tensor | None
    ) -> Tensor:
        del conditioning
        return self._family.predict(self._denoiser, noisy, timesteps, conditions)

    def _to_input(self, values: Tensor) -> Tensor:
        """Return latents or images in the dtype of the forward pass.

        Images, and latents of their form, become channels last: convolutions keep this layout and are faster with it.
        On GPUs a measurement decides (`train.tuning.layout`).
        """
        layout = self._layout if values.dim() == 4 else torch.contiguous_format
        return values.to(self._dtype).contiguous(memory_format=layout)

    def _autocast(self) -> contextlib.AbstractContextManager[object]:
        """Return the context of the forward pass: autocast if trained fp32 weights are used in a lower precision."""
        if self._is_low_precision:
            return torch.autocast(self._context.device.type, self._dtype)
        return contextlib.nullcontext()

    @property
    def _is_low_precision(self) -> bool:
        """Whether trained fp32 weights are used in a lower precision."""
        return self._is_mixed and self._dtype is not torch.float32

    def _fp32_weights(self) -> contextlib.AbstractContextManager[None]:
        """Return the block in which the modules hold the fp32 weights, for exports."""
        return contextlib.nullcontext() if self._low is None else self._low.fp32_weights()

    def _load_text(self, dtype: torch.dtype) -> TextEncoder:
        """Load the text encoders of a method that encodes captions in every step."""
        encoder = self._family.load_text_encoder(self._context.device, dtype)
        self.text = self._live_text = _LiveText(self, encoder)
        return encoder

    def _attention_context(self) -> contextlib.AbstractContextManager[None]:
        """Return the context in which torch uses the chosen attention kernels."""
        return self._attention()

    def _text_parts(self) -> Sequence[TextPart]:
        return [] if self._live_text is None else self._live_text.parts

    def _checkpoint_activations(self, module: Any) -> None:
        is_denoising = module not in [part.model for part in self._text_parts()]
        attention = self._attention_context if is_denoising else contextlib.nullcontext
        checkpoint_activations(module, draws_numbers(module, self._masks is None), attention, self._masks)

    def _finish(self, trained: Mapping[str, nn.Parameter]) -> None:
        """Register the trained parameters, move all modules to the device and prepare them for training."""
        device, training = self._context.device, self._context.training
        self._parameters = dict(trained)
        for parameter in self._parameters.values():
            parameter.data = parameter.data.float()
        self._modules = [self._denoiser, *self._modules]
        self._denoiser.to(device)
        if not self._trains_denoiser:
            _set_layout(self._denoiser, self._layout, set(map(id, self._parameters.values())))
            if not self._uses_weights and not self._context.uses_ipex:
                pack_convolutions(self._denoiser)
        if self._is_low_precision and training.sharding is Sharding.NONE:
            # Sharding gathers the fp32 weights, and autocast casts them.
            is_rounded = training.weight_precision is WeightPrecision.BF16
            low_precision = RoundedWeights if is_rounded else WorkingCopy
            self._low = low_precision(self._modules, self._parameters.values(), self._dtype)
        self._use_fast_layers(training.compile is SwitchMode.ON)
        if training.gradient_checkpointing:
            self._checkpoint_activations(self._denoiser)
        self.set_training(True)

    def _use_fast_layers(self, compiles: bool) -> None:
        """Let IPEX, the compiler and fused operations compute the layers that they are faster at."""
        for module in self._modules:
            if self._context.uses_ipex:
                optimize_frozen(module)
                align_group_norms(module)
            if compiles:
                compile_blocks(module, self._family.compiled_blocks)
            use_fused_operations(module, compiles)
        if self._context.uses_ipex:
            self._packed = TrainedLayers(self._modules)


def draws_own_masks(training: TrainingSpec, device: torch.device) -> bool:
    """Return whether recomputed blocks repeat the dropout of adapters without saved random state, as graphs need it."""
    has_adapters = training.lora is not None and training.lora.dropout > 0
    is_repeated = training.gradient_checkpointing and training.compile is not SwitchMode.ON
    return has_adapters and is_repeated and device.type == "cuda"


def draws_numbers(module: nn.Module, with_adapters: bool = True) -> bool:
    """Return whether a model of diffusers or transformers draws random numbers of torch's own generator in training.

    Args:
        module: the model.
        with_adapters: whether its adapters do, if they have dropout.
    """
    parts = [part for name, part in module.named_modules() if with_adapters or _ADAPTER_DROPOUT not in name]
    rates = [getattr(part, "p", 0.0) for part in parts if isinstance(part, nn.modules.dropout._DropoutNd)]
    # transformers drops weights of the attention without a module.
    return any(rates) or float(getattr(getattr(module, "config", None), "attention_dropout", 0.0)) > 0


_ADAPTER_DROPOUT = "lora_dropout"
"""Part of the names of peft's modules."""


class _LiveText:
    """Embeddings of the method's own text encoders; see `Texts`."""

    def __init__(self, method: DenoiserMethod, encoder: TextEncoder) -> None:
        self._method = method
        self._encoder = encoder

    def get(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """Return the embeddings of captions by name, with their graph."""
        return self.encode(self.tokenize(captions))

    @property
    def parts(self) -> Sequence[TextPart]:
        """The single encoders."""
        return self._encoder.parts

    def tokenize(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """Return the tokens of captions by name."""
        return self._encoder.tokenize(captions)

    def encode(self, tokens: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the embeddings of tokens by name, with their graph."""
        with self._method._autocast():
            return self._encoder.encode_tokens(tokens)


def _set_layout(module: nn.Module, layout: torch.memory_format, trained: Collection[int]) -> None:
    for parameter in module.parameters():
        if parameter.dim() == 4 and id(parameter) not in trained:
            parameter.data = parameter.data.contiguous(memory_format=layout)
