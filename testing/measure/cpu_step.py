"""Training steps of a method on CPUs, at the SD 1.5 architecture with a smaller width. Called by `bench.cpu`."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from finetune_contract.spec import ExchangePrecision, Precision, TrainingSpec
from finetune_trainer.data.batches import Batch
from finetune_trainer.data.sampling.draws import Draws
from finetune_trainer.distributed.world import World
from finetune_trainer.intel.paths import ComputePath
from finetune_trainer.methods.method import MethodContext
from finetune_trainer.methods.registry import method_class
from finetune_trainer.models.family import IMAGE_SIZES
from finetune_trainer.train.passes.eager import PassWork
from finetune_trainer.train.storage import make_complete_gradients, make_complete_state
from testing.measure.architectures import NUM_TOKENS, UNETS, RandomFamily, make

CPU = torch.device("cpu")
DTYPES = {Precision.FP32: torch.float32, Precision.BF16: torch.bfloat16}
METHODS: dict[str, dict[str, Any]] = {
    "TextualInversion": {"textualInversion": {"placeholderToken": "<cat>", "initializerToken": "a"}},
    "Full": {},
    "LoRA": {"lora": {"rank": 4}},
}
_CAPTION = "a photo of <cat>"


class NarrowFamily(RandomFamily):
    """SD 1.5 with random weights and a smaller width.

    Args:
        channels: width of the first level; SD 1.5 has 320.
        folder: where the configuration of the UNet is written.
    """

    def __init__(self, channels: int, folder: Path) -> None:
        super().__init__("sd15")
        self._folder = folder
        widths = tuple(channels * factor for factor in (1, 2, 4, 4))
        self._config = {**UNETS["sd15"], "block_out_channels": widths}

    def load_denoiser(self, dtype: torch.dtype) -> Any:
        """Return the UNet."""
        return make(lambda: UNet2DConditionModel(**self._config), dtype)

    def denoiser_files(self) -> list[Path]:
        """Return the configuration of the UNet."""
        with torch.device("meta"):
            UNet2DConditionModel(**self._config).save_config(self._folder)
        return [self._folder / "config.json"]

    @cached_property
    def num_weights(self) -> int:
        """Number of weights of the UNet."""
        with torch.device("meta"):
            return sum(each.numel() for each in UNet2DConditionModel(**self._config).parameters())


@dataclass(frozen=True)
class StepSettings:
    """A measured configuration of a rank.

    Attributes:
        method: one of METHODS.
        path: number format and library.
        batch: samples of a rank in a step.
        size: side of the images in pixels.
        wire: number format of the exchanged gradients.
    """

    method: str
    path: ComputePath
    batch: int = 1
    size: int = 256
    wire: ExchangePrecision = ExchangePrecision.FP32

    @property
    def training(self) -> TrainingSpec:
        """The settings of the run."""
        return TrainingSpec.model_validate(
            {
                "method": self.method,
                "resolution": self.size,
                "batchSize": self.batch,
                "precision": self.path.precision,
                "exchangePrecision": self.wire,
                **METHODS[self.method],
            }
        )


class CpuStep:
    """One training step: forward and backward pass, exchange, optimizer.

    Args:
        family: the base.
        settings: the configuration.
        world: the ranks.
    """

    def __init__(self, family: NarrowFamily, settings: StepSettings, world: World) -> None:
        training = settings.training
        dtype = DTYPES[settings.path.precision]
        context = MethodContext(family, training, Draws(0), CPU, dtype, uses_ipex=settings.path.uses_ipex)
        self._method, self._world = method_class(training.method)(context), world
        self._state = make_complete_state(training, self._method, CPU)
        self._gradients = make_complete_gradients(training, self._method, self._state, world)
        self._work = PassWork(self._method, self._gradients, settings.batch * world.size, 1000)
        self._batch = self._method.prepare(_make_batch(settings, world.rank))

    def run(self) -> float:
        """Run a step, and return its seconds."""
        began = time.perf_counter()
        self._gradients.clear()
        with self._gradients.passes():
            self._gradients.expect_last_pass()
            self._work.run(self._batch, 1.0)
        self._gradients.reduce(self._world)
        self._state.optimizer.step()
        self._state.refresh()
        return time.perf_counter() - began


def _make_batch(settings: StepSettings, seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(settings.batch, *shape, generator=generator)

    side = settings.size // 8
    text = {"hidden": normal(NUM_TOKENS, 768), "pooled": normal(768), IMAGE_SIZES: torch.zeros(settings.batch, 6)}
    timesteps = torch.randint(1000, (settings.batch,), generator=generator)
    return Batch(normal(4, side, side), normal(4, side, side), timesteps, (_CAPTION,) * settings.batch, text)
