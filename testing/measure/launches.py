"""Number of operations that one training step dispatches to the device, counted without data (meta tensors).

Called by `bench.launches` and by tests.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from finetune_contract.spec import TrainingSpec
from finetune_trainer.data.batches import Batch
from finetune_trainer.data.sampling.draws import Draws
from finetune_trainer.distributed.local import LocalGradients
from finetune_trainer.methods.denoiser_method import DenoiserMethod
from finetune_trainer.methods.method import Method, MethodContext
from finetune_trainer.methods.registry import method_class
from finetune_trainer.models.family import IMAGE_SIZES
from finetune_trainer.optim.flat import storage_order
from testing.measure.architectures import NUM_TOKENS, UNETS, RandomFamily

META = torch.device("meta")
DTYPE = torch.bfloat16
_NO_KERNEL = ("empty", "detach", "_unsafe_view", "_reshape_alias", "lift_fresh", "new_empty", "_local_scalar")
"""Operations that launch nothing although they return no view."""


@dataclass(frozen=True)
class LaunchCase:
    """One counted configuration.

    Attributes:
        family: a family of `UNETS`.
        method: name of the method.
        resolution: pixels along each side of the images.
        batch: images of the step, in one pass.
        settings: further fields of the manifest's training.
    """

    family: str
    method: str
    resolution: int
    batch: int
    settings: Mapping[str, Any] = field(default_factory=dict)


SDXL_LORA = LaunchCase("sdxl", "LoRA", 1024, 4, {"lora": {"rank": 4}})
SD15_LORA = LaunchCase("sd15", "LoRA", 512, 8, {"lora": {"rank": 4}})


class OperationCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts operations that are neither views nor allocations."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Count one operation, and run it."""
        name = func.overloadpacket.__name__
        if not func.is_view and not name.startswith(_NO_KERNEL):
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


class MetaFamily(RandomFamily):
    """A base without data."""

    def load_denoiser(self, dtype: torch.dtype) -> Any:
        """Return the UNet."""
        with META:
            return UNet2DConditionModel(**UNETS[self.name]).to(dtype)

    def load_controlnet(self, denoiser: Any, folder: Path | None) -> Any:
        """Return a ControlNet without data."""
        with META:
            return super().load_controlnet(denoiser, folder)


class MetaAutocast(TorchFunctionMode):
    """Casts the arguments of functions as autocast does on a GPU; torch has no autocast for tensors without data."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run a function with arguments of the format that autocast chooses for it."""
        del types
        name, kwargs = getattr(func, "__name__", ""), dict(kwargs or {})
        dtype = DTYPE if name in _IN_LOW_PRECISION else torch.float32 if name in _IN_FP32 else None
        if dtype is not None:
            args = tuple(_cast(value, dtype) for value in args)
            kwargs = {key: _cast(value, dtype) for key, value in kwargs.items()}
        return func(*args, **kwargs)


_IN_LOW_PRECISION = {"linear", "conv2d", "matmul", "bmm", "baddbmm", "addmm", "mm", "scaled_dot_product_attention"}
_IN_FP32 = {"layer_norm", "group_norm", "softmax", "mse_loss", "pow", "exp", "sum"}


def _cast(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def make_batch(case: LaunchCase) -> Batch:
    """Return a batch of one micro-batch without data."""
    side, count = case.resolution // 8, case.batch
    text: dict[str, Tensor] = {
        "hidden": torch.empty(count, NUM_TOKENS, 2048 if case.family == "sdxl" else 768, device=META)
    }
    if case.family == "sdxl":
        text |= {"pooled": torch.empty(count, 1280, device=META), IMAGE_SIZES: torch.empty(count, 6, device=META)}
    latents, noise = torch.empty(2, count, 4, side, side, device=META)
    conditioning = torch.empty(count, 3, case.resolution, case.resolution, device=META)
    timesteps = torch.zeros(count, dtype=torch.int64, device=META)
    is_conditioned = case.method == "ControlNet"
    return Batch(latents, noise, timesteps, ("",) * count, text, conditioning=conditioning if is_conditioned else None)


def make_method(case: LaunchCase) -> Method:
    """Return the method with a base without data."""
    training = TrainingSpec.model_validate(
        {"method": case.method, "steps": 1, "precision": "bf16", "resolution": case.resolution, **case.settings}
    )
    context = MethodContext(MetaFamily(case.family), training, Draws(0), META, DTYPE)
    method = method_class(training.method)(context)
    if isinstance(method, DenoiserMethod) and method._is_low_precision:
        method._autocast = MetaAutocast  # type: ignore[method-assign]
    return method


def _hold_gradients(method: Method) -> LocalGradients:
    """Return the gradients as training on one GPU holds them, in one fp32 buffer."""
    parameters, leaves = list(method.parameters().values()), list(method.leaves())
    order = storage_order(parameters)
    ordered = [parameters[index] for index in order]
    gradients = LocalGradients(ordered, META, [leaves[index] for index in order])
    gradients.hold()
    return gradients


def count_operations(case: LaunchCase, steps: int = 2) -> Counter[str]:
    """Return the operations of the last of some steps, by name: the first one may prepare something."""
    method, batch = make_method(case), make_batch(case)
    gradients = _hold_gradients(method)
    for _ in range(steps):
        gradients.clear()
        counter = OperationCounter()
        with counter:
            torch.autograd.backward(method.losses(method.prepare(batch)).sum() / case.batch)
    return counter.counts
