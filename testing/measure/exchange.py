"""Training steps whose gradient exchange is measured: of a real model, or a replay of its backward pass.

A rank that computes on its cores shares them with the exchange. A rank with an accelerator does not: its cores are idle
while the accelerator computes. `ReplayedPass` stands in for such a rank on a machine without one: it delivers the
gradients of a recorded pass at the recorded times, and its thread sleeps in between. Called by `bench.exchange`.
"""

from __future__ import annotations

import functools
import resource
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from torch import Tensor, nn

from finetune_contract.spec import ExchangePrecision
from finetune_trainer.distributed import buckets
from finetune_trainer.distributed.buckets import GradientBuckets, assign_buckets
from finetune_trainer.distributed.world import World
from testing.measure.architectures import UNETS

NUM_TOKENS = 77
FULL_SIZE = 320
"""Width of the first level of SD 1.5."""


@dataclass(frozen=True)
class Timeline:
    """When a pass delivers its gradients.

    Attributes:
        order: indices of the parameters in the order of their gradients.
        seconds: time of each gradient since the start of the pass, in this order.
        total: time at which the pass ends.
    """

    order: tuple[int, ...]
    seconds: tuple[float, ...]
    total: float

    @property
    def backward(self) -> float:
        """Seconds from the first gradient to the end."""
        return self.total - self.seconds[0]

    def scaled(self, backward: float) -> Timeline:
        """Return the same pass at another speed: its backward part takes `backward` seconds, the forward part none."""
        factor, first = backward / self.backward, self.seconds[0]
        seconds = tuple(factor * (each - first) for each in self.seconds)
        return replace(self, seconds=seconds, total=factor * (self.total - first))


def hidden_bound(ready: Sequence[float], exchanges: Sequence[float], end: float) -> float:
    """Return the largest share of an exchange that a pass can hide.

    Args:
        ready: seconds at which each bucket is complete, in the order of the sums.
        exchanges: seconds of the sum of each bucket.
        end: seconds at which the pass ends.
    """
    finished = 0.0
    for complete, seconds in zip(ready, exchanges, strict=True):
        finished = max(finished, complete) + seconds
    return 1 - max(0.0, finished - end) / sum(exchanges)


class ModelPass:
    """A forward and a backward pass of a method on the SD 1.5 architecture with random weights.

    Args:
        method: "full" or "controlnet".
        rank: number that the inputs depend on.
        channels: width of the first level.
        latent: side of the latents; SD 1.5 has 64.
        batch: samples of a rank.
    """

    def __init__(self, method: str, rank: int, channels: int, latent: int, batch: int) -> None:
        torch.manual_seed(0)
        widths = tuple(channels * factor for factor in (1, 2, 4, 4))
        unet = UNet2DConditionModel(**{**UNETS["sd15"], "block_out_channels": widths})
        self._unet = unet
        self._controlnet = ControlNetModel.from_unet(unet) if method == "controlnet" else None
        if self._controlnet is not None:
            unet.requires_grad_(False)
        trained: nn.Module = self._controlnet or unet
        self.parameters = [parameter for parameter in trained.parameters() if parameter.requires_grad]
        torch.manual_seed(1 + rank)
        self._noisy = torch.randn(batch, 4, latent, latent)
        self._hidden = torch.randn(batch, NUM_TOKENS, 768)
        self._image = torch.rand(batch, 3, 8 * latent, 8 * latent)
        self._timesteps = torch.randint(1000, (batch,))

    def run(self) -> None:
        """Compute the gradients."""
        torch.autograd.backward(self._predict().square().mean())

    def record(self) -> tuple[Timeline, list[Tensor]]:
        """Run the pass, and return when it delivers its gradients, and the gradients by parameter."""
        order: list[int] = []
        times: list[float] = []

        def note(index: int, _: Tensor) -> None:
            order.append(index)
            times.append(time.monotonic() - began)

        hooks = [
            parameter.register_post_accumulate_grad_hook(functools.partial(note, index))  # type: ignore[no-untyped-call]
            for index, parameter in enumerate(self.parameters)
        ]
        began = time.monotonic()
        self.run()
        timeline = Timeline(tuple(order), tuple(times), time.monotonic() - began)
        gradients = [torch.zeros_like(each) if each.grad is None else each.grad for each in self.parameters]
        for hook, parameter in zip(hooks, self.parameters, strict=True):
            hook.remove()
            parameter.grad = None
        return timeline, gradients

    def _predict(self) -> Tensor:
        if self._controlnet is None:
            prediction: Tensor = self._unet(self._noisy, self._timesteps, self._hidden).sample
            return prediction
        down, middle = self._controlnet(
            self._noisy, self._timesteps, self._hidden, controlnet_cond=self._image, return_dict=False
        )
        controlled: Tensor = self._unet(
            self._noisy,
            self._timesteps,
            self._hidden,
            down_block_additional_residuals=down,
            mid_block_additional_residual=middle,
        ).sample
        return controlled


class ReplayedPass:
    """A recorded pass: autograd delivers the same gradients at the recorded times, and computes nothing.

    Args:
        parameters: as in the recorded pass.
        timeline: when it delivers its gradients.
        gradients: its gradients, by parameter.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], timeline: Timeline, gradients: Sequence[Tensor]) -> None:
        self.parameters = list(parameters)
        self._timeline, self._gradients = timeline, gradients
        self._began = 0.0

    def run(self) -> None:
        """Deliver the gradients."""
        self._began = time.monotonic()
        # Backward visits the links of the chain from the last to the first.
        chain = torch.zeros(1, requires_grad=True)
        for index, seconds in zip(reversed(self._timeline.order), reversed(self._timeline.seconds), strict=True):
            chain = _Link.apply(chain, self.parameters[index], (self, index, seconds))
        torch.autograd.backward(chain)
        self.wait_until(self._timeline.total)

    def wait_until(self, seconds: float) -> None:
        """Sleep until this time after the start of the pass."""
        time.sleep(max(0.0, self._began + seconds - time.monotonic()))

    def gradient(self, index: int) -> Tensor:
        """Return the gradient of a parameter."""
        return self._gradients[index]


Pass = ModelPass | ReplayedPass


class _Link(torch.autograd.Function):
    """One parameter of a replayed pass."""

    @staticmethod
    def forward(ctx: Any, chain: Tensor, parameter: Tensor, what: tuple[ReplayedPass, int, float]) -> Tensor:
        ctx.what = what
        return chain.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        replayed, index, seconds = ctx.what
        replayed.wait_until(seconds)
        return gradient, replayed.gradient(index), None


@dataclass(frozen=True)
class StepTimes:
    """Seconds of one rank in a round, and the processor time of the exchange."""

    without: float
    during: float
    after: float
    exchange: float
    processor: float


class ExchangedStep:
    """Steps of a pass with and without the exchange of its gradients.

    Args:
        parameters: parameters of the passes.
        world: the ranks.
        precision: format of the numbers on the network.
        bucket_numel: elements of a bucket.
    """

    def __init__(
        self, parameters: Sequence[nn.Parameter], world: World, precision: ExchangePrecision, bucket_numel: int
    ) -> None:
        self._parameters, self._world = list(parameters), world
        with mock.patch.object(buckets, "BUCKET_NUMEL", bucket_numel):
            self._gradients = GradientBuckets(self._parameters, world, precision)

    def measure_exchange(self, work: Pass) -> float:
        """Run one step, in which the buckets find their order, and return the seconds of an exchange after a pass."""
        self._run(work, overlap=True, reduce=True)
        return self._run_after(work).exchange

    def measure(self, work: Pass) -> tuple[StepTimes, int]:
        """Run a round: a step without the exchange, one with it during the backward pass, and one with it after it.

        Args:
            work: the pass.

        Returns:
            The times, and the number of parameters whose gradients of the last two steps have different bits.
        """
        without = self._run(work, overlap=False, reduce=False)
        during = self._run(work, overlap=True, reduce=True)
        expected = self._copy_gradients()
        times = replace(self._run_after(work), without=without, during=during)
        found = self._copy_gradients()
        return times, sum(not torch.equal(one, other) for one, other in zip(expected, found, strict=True))

    def _run_after(self, work: Pass) -> StepTimes:
        after = self._run(work, overlap=False, reduce=False)
        self._world.barrier()
        busy, began = _processor_seconds(), time.monotonic()
        self._gradients.reduce(self._world)
        exchange, processor = time.monotonic() - began, _processor_seconds() - busy
        return StepTimes(0.0, 0.0, after + exchange, exchange, processor)

    def _run(self, work: Pass, overlap: bool, reduce: bool) -> float:
        self._gradients.clear()
        self._world.barrier()
        began = time.monotonic()
        if overlap:
            self._gradients.expect_last_pass()
        work.run()
        if reduce:
            self._gradients.reduce(self._world)
        return time.monotonic() - began

    def _copy_gradients(self) -> list[Tensor]:
        return [each.grad.clone() for each in self._parameters if each.grad is not None]


def bound_of(timeline: Timeline, parameters: Sequence[nn.Parameter], bucket_numel: int, exchange: float) -> float:
    """Return the largest share of an exchange of so many seconds that a pass can hide, in the order of its buckets."""
    sizes = [parameter.numel() for parameter in parameters]
    times = dict(zip(timeline.order, timeline.seconds, strict=True))
    groups = [
        (max(times.get(index, timeline.total) for index in group), sum(sizes[index] for index in group))
        for group in assign_buckets(sizes, bucket_numel)
    ]
    groups.sort()
    exchanges = [exchange * numel / sum(sizes) for _, numel in groups]
    return hidden_bound([ready for ready, _ in groups], exchanges, timeline.total)


def scaled_bucket_numel(channels: int) -> int:
    """Return the size of buckets of which a narrower model has as many as the model of full width."""
    return round(buckets.BUCKET_NUMEL * (channels / FULL_SIZE) ** 2)


def _processor_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime
