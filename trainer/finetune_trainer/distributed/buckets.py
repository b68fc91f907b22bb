"""Gradients in flat buffers of a fixed layout, summed over the ranks while the backward pass computes the rest.

The layout depends only on the order and the sizes of the parameters. It is the same in every attempt, so the order in
which floats are added does not depend on the step at which a run began (torch's DDP rebuilds its buckets after the
first step).
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from finetune_contract.spec import ExchangePrecision
from finetune_trainer.distributed.exchange import Exchange, PendingSum, open_exchange
from finetune_trainer.distributed.gradients import NUM_TIMESTEP_BUCKETS, Signal, receives_fp32
from finetune_trainer.distributed.world import World

BUCKET_NUMEL = 16 * 1024 * 1024
"""Elements of a bucket (64 MiB): large enough that the latency of a collective is negligible."""
_NUM_SIGNALS = len(Signal) + 2 * NUM_TIMESTEP_BUCKETS


class GradientBucket:
    """The gradients of some neighbouring parameters as views into one flat fp32 buffer.

    Args:
        parameters: its parameters, in order.
        device: device of the buffer.
        padding: unused elements at the end of the buffer.
        leaves: see `GradientBuckets`.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        device: torch.device,
        padding: int = 0,
        leaves: Sequence[nn.Parameter] | None = None,
    ) -> None:
        numel = sum(parameter.numel() for parameter in parameters)
        self.buffer = torch.zeros(numel + padding, dtype=torch.float32, device=device)
        self.gradients = self.buffer[:numel]
        """All gradients, without the padding."""
        self._views: dict[Tensor, Tensor] = {}
        """Gradients by leaf."""
        self._parameters = list(parameters)
        offset = 0
        for parameter, leaf in zip(parameters, parameters if leaves is None else leaves, strict=True):
            self._views[leaf] = self.buffer[offset : offset + parameter.numel()].view_as(parameter)
            offset += parameter.numel()
        self._direct = {leaf for leaf, own in zip(self._views, parameters, strict=True) if receives_fp32(own, leaf)}
        """The leaves whose gradients backward can add to the buffer."""
        self._filled: set[Tensor] = set()
        self._is_held = False
        self._complete: set[Tensor] = set()
        self.pending: PendingSum | None = None
        """The sum over the ranks, from its start in a step until the next step."""

    @property
    def is_complete(self) -> bool:
        """Return whether the last pass of the step has reached all parameters."""
        return len(self._complete) == len(self._views)

    def clear(self) -> None:
        """Drop all gradients."""
        self._filled.clear()
        self._complete.clear()
        self.pending = None
        if self._is_held:
            self.buffer.zero_()
        self._attach()

    def hold(self) -> None:
        """Let backward add to the buffer directly, from the next pass on."""
        if not self._is_held:
            self._is_held = True
            for parameter, view in self._views.items():
                if parameter not in self._filled:
                    view.zero_()
            self._attach()

    def detach(self) -> None:
        """Drop what backward computes from now on: the sum of the buffer has started."""
        for parameter in self._views:
            parameter.grad = None

    def _attach(self) -> None:
        for parameter, view in self._views.items():
            parameter.grad = view if self._is_held and parameter in self._direct else None
        if self._is_held:
            self._filled.update(self._views)

    def move(self, parameter: Tensor, is_last_pass: bool) -> None:
        """Move a gradient that backward has computed into the buffer. The first one of a step needs no zeros there."""
        assert parameter.grad is not None
        view = self._views[parameter]
        if parameter.grad is view:
            pass
        elif parameter in self._filled:
            view.add_(parameter.grad)
        else:
            view.copy_(parameter.grad)
            self._filled.add(parameter)
        parameter.grad = view if self._is_held and parameter in self._direct else None
        if is_last_pass:
            self._complete.add(parameter)

    def start_sum(self, exchange: Exchange) -> None:
        """Start to sum the buffer over the ranks. Gradients that backward did not compute are zero."""
        for parameter, view in self._views.items():
            if parameter not in self._filled:
                view.zero_()
        self.pending = exchange.start(self.buffer)

    def finish_sum(self) -> None:
        """Wait for the sum, and hand the gradients to the parameters."""
        assert self.pending is not None
        self.pending.wait()
        for parameter, view in zip(self._parameters, self._views.values(), strict=True):
            if parameter.dtype is view.dtype:
                parameter.grad = view

    def views(self) -> list[Tensor]:
        """Return the gradients of the parameters, in their order."""
        return list(self._views.values())


class GradientBuckets:
    """The gradients of all trained parameters, in buckets; see `Gradients`.

    Each gradient is moved into its bucket as soon as backward has computed it, so the memory never holds all of them
    twice. In the last pass of a step, a bucket that is complete is summed over the ranks while backward continues.
    All ranks must start their collectives in the same order, so a bucket that is complete early waits for those before
    it. In the first step this is the reverse order of the parameters. Then it is the order in which rank 0's backward
    pass completed the buckets, because a model does not compute its parameters in their order (the middle block of a
    UNet comes after its up blocks). The sum of a bucket does not depend on its place in this order.

    Args:
        parameters: the trained parameters; their order decides the layout.
        world: the ranks.
        precision: format of the numbers that are sent; the sums are stored in fp32.
        overlap: whether sums start during the last backward pass. The results have the same bits.
        leaves: the tensors that backward computes gradients of, one for each parameter; see `Method.leaves`.
    """

    forward_is_collective: ClassVar[bool] = False

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        world: World,
        precision: ExchangePrecision = ExchangePrecision.FP32,
        overlap: bool = True,
        leaves: Sequence[nn.Parameter] | None = None,
    ) -> None:
        self._overlap = overlap
        self._exchange = open_exchange(world, precision)
        groups = assign_buckets([parameter.numel() for parameter in parameters], BUCKET_NUMEL)
        self._buckets: list[GradientBucket] = []
        self._bucket_of: dict[Tensor, GradientBucket] = {}
        for group in groups:
            members = [parameters[index] for index in group]
            own = members if leaves is None else [leaves[index] for index in group]
            # Some backends cut a buffer in pieces by its length, and the piece decides the order of the additions. The
            # padding keeps the length that the last buffer has always had, so the sums keep their bits.
            bucket = GradientBucket(members, world.device, _NUM_SIGNALS if group is groups[-1] else 0, own)
            self._buckets.append(bucket)
            self._bucket_of |= dict.fromkeys(own, bucket)
        self._order = list(reversed(self._buckets))
        """The buckets in the order in which their sums start."""
        self._completed: list[GradientBucket] | None = [] if overlap and world.size > 1 else None
        """The buckets in the order in which backward completes them, until the end of the first step."""
        numbers = torch.zeros(_NUM_SIGNALS, dtype=torch.float32, device=world.device)
        self._numbers = numbers
        self.signals = numbers[-len(Signal) :]
        """Values that are summed over the ranks (len(Signal),): set before `reduce`, read after it."""
        self.by_timestep = numbers[: -len(Signal)].view(2, NUM_TIMESTEP_BUCKETS)
        """Sums and counts of the samples' losses by tenth of the schedule; used like the signals."""
        for parameter in self._bucket_of:
            parameter.register_post_accumulate_grad_hook(self._move_gradient)  # type: ignore[no-untyped-call]
        self.clear()

    def clear(self) -> None:
        """Drop the gradients of the last step, and set the signals to zero."""
        for bucket in self._buckets:
            bucket.clear()
        self._start_passes()

    def drop_passes(self) -> None:
        """Drop the passes of this step, to repeat them. A bucket whose sum has started contains all of them: keep it.

        The other ranks take part in its sum, so it cannot be summed again.
        """
        for bucket in self._buckets:
            if bucket.pending is None:
                bucket.clear()
            else:
                bucket.detach()
        self._start_passes()
        self._is_repeated = True

    def _start_passes(self) -> None:
        self._is_last_pass = self._is_repeated = False
        self._numbers.zero_()
        self._waiting = [bucket for bucket in self._order if bucket.pending is None]

    def hold(self) -> None:
        """Keep all gradients in the buckets. Call it before a sum has started."""
        for bucket in self._buckets:
            bucket.hold()

    def views(self) -> list[Tensor]:
        """Return the gradients of all parameters, in their order; see `Gradients`."""
        return [view for bucket in self._buckets for view in bucket.views()]

    def passes(self) -> contextlib.AbstractContextManager[None]:
        """Return a block without collectives that other code starts."""
        return contextlib.nullcontext()

    def expect_last_pass(self) -> None:
        """Sum buckets over the ranks during the next backward pass, because it is the last one of the step."""
        self._is_last_pass = self._overlap

    def _move_gradient(self, parameter: Tensor) -> None:
        """Move a gradient into its bucket, right after backward has computed it, and start the sums of full buckets."""
        bucket = self._bucket_of[parameter]
        if bucket.pending is not None:
            if not self._is_repeated:
                raise RuntimeError("backward computed a gradient twice in the last pass of a step")
            # The sum contains this gradient of the repeated pass.
            parameter.grad = None
            return
        bucket.move(parameter, self._is_last_pass)
        if bucket.is_complete and self._completed is not None and bucket not in self._completed:
            self._completed.append(bucket)
        while self._waiting and self._waiting[0].is_complete:
            self._waiting.pop(0).start_sum(self._exchange)

    def reduce(self, world: World) -> None:
        """Sum the remaining gradients, and the signals, over all ranks, and wait for all sums.

        Raises:
            FabricError: a peer was lost.
        """
        for bucket in self._waiting:
            bucket.start_sum(self._exchange)
        self._waiting = []
        numbers = world.start_sum(self._numbers)
        for bucket in self._order:
            bucket.finish_sum()
        numbers.wait()
        if self._completed is not None:
            self._set_order(world, self._completed)
            self._completed = None

    def _set_order(self, world: World, completed: Sequence[GradientBucket]) -> None:
        """Start the sums of the next steps in the order in which rank 0's buckets were complete. All ranks call it."""
        order = [*completed, *(bucket for bucket in self._order if bucket not in completed)]
        numbers = world.share([self._buckets.index(bucket) for bucket in order])
        self._order = [self._buckets[number] for number in numbers]

    def norm(self) -> Tensor:
        """Return the 2-norm of all gradients."""
        norms = [torch.linalg.vector_norm(bucket.gradients) for bucket in self._buckets]
        norm: Tensor = torch.linalg.vector_norm(torch.stack(norms))
        return norm

    def scale(self, factor: float) -> None:
        """Multiply all gradients."""
        for bucket in self._buckets:
            bucket.gradients.mul_(factor)


def assign_buckets(sizes: Sequence[int], bucket_numel: int) -> list[list[int]]:
    """Group parameters, in order, into buckets of at most `bucket_numel` elements; a larger parameter gets its own.

    Args:
        sizes: elements of each parameter; at least one parameter.
        bucket_numel: elements of a bucket.

    Returns:
        Indices of the parameters of each bucket.
    """
    groups: list[list[int]] = [[]]
    filled = 0
    for index, size in enumerate(sizes):
        if groups[-1] and filled + size > bucket_numel:
            groups.append([])
            filled = 0
        groups[-1].append(index)
        filled += size
    return groups
