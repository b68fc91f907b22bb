"""Sharded training (torch's FSDP2): each rank holds a slice of the trained weights, gradients and optimizer state.

With offload the slices are in host memory, and the device holds only the weights of the module that computes. A single
rank then holds one slice, which is the complete tensor, with the same code.

A parameter's slice is also available as a plain tensor in the same memory. The optimizer, the weight average and the
checkpoints use these tensors only. Slices are cut along the first dimension, like those of `torch.chunk`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from finetune_contract.spec import ExchangePrecision, Offload
from finetune_trainer.distributed.exchange import scatter_sum
from finetune_trainer.distributed.gradients import NUM_TIMESTEP_BUCKETS, Signal
from finetune_trainer.distributed.world import World

_BLOCKS = ("down_blocks", "up_blocks", "resnets", "transformer_blocks", "layers")
"""Lists of modules whose weights are gathered and released one by one, in UNets, ControlNets and text encoders. They
include the small modules inside the large blocks, because one of SDXL's large blocks has half of its weights."""


@dataclass(frozen=True)
class _ParameterSlot:
    """The attribute that holds a parameter: sharding and gathering replace the parameter object in it."""

    module: nn.Module
    name: str

    @property
    def parameter(self) -> nn.Parameter:
        """The current parameter object."""
        found = self.module._parameters[self.name]
        assert found is not None
        return found


class Shards:
    """The slices of one rank.

    Args:
        modules: the trained modules, complete and equal on every rank; they are sharded in place.
        parameters: their trained parameters, by their names in checkpoints.
        world: the ranks.
        offload: where the slices are stored.
        precision: format of the gradients that the ranks send; the slices' gradients are fp32.
    """

    def __init__(
        self,
        modules: Sequence[nn.Module],
        parameters: Mapping[str, nn.Parameter],
        world: World,
        offload: Offload = Offload.NONE,
        precision: ExchangePrecision = ExchangePrecision.FP32,
    ) -> None:
        self._world = world
        self._offloads = offload is Offload.CPU
        self._classes = {module: type(module) for module in modules}
        slots = {
            id(parameter): _ParameterSlot(owner, name)
            for module in modules
            for owner in module.modules()
            for name, parameter in owner.named_parameters(recurse=False)
        }
        self._slots = {name: slots[id(parameter)] for name, parameter in parameters.items()}
        world.as_group()
        mesh = init_device_mesh(world.device.type, (world.size,))
        policy = offload_policy(offload, world.device)
        is_rounded = precision is ExchangePrecision.BF16 and world.size > 1
        numbers = MixedPrecisionPolicy(reduce_dtype=torch.bfloat16) if is_rounded else MixedPrecisionPolicy()
        for module in modules:
            for part in [*_blocks(module), module]:
                fully_shard(part, mesh=mesh, reshard_after_forward=True, mp_policy=numbers, offload_policy=policy)
        self._sharded = [part for module in modules for part in module.modules() if isinstance(part, FSDPModule)]
        for part in self._sharded:
            # Every loss is already divided by the global batch.
            part.set_gradient_divide_factor(1.0)
            part.set_force_sum_reduction_for_comms(True)
            # Releases of torch before this method add the rounded numbers in bf16.
            if is_rounded and world.device.type == "cpu" and hasattr(part, "set_custom_reduce_scatter"):
                reduce_scatter: Any = OrderedReduceScatter(world.size)
                part.set_custom_reduce_scatter(reduce_scatter)
        self.parameters: dict[str, nn.Parameter] = {
            name: nn.Parameter(_local(slot.parameter)) for name, slot in self._slots.items()
        }
        """This rank's slices by name, for the optimizer."""
        self.offsets = {
            name: slice_offset(tuple(slot.parameter.shape), world.rank, world.size)
            for name, slot in self._slots.items()
        }
        """Offset of each slice in the complete tensor."""
        self.shapes = {name: tuple(slot.parameter.shape) for name, slot in self._slots.items()}
        """Shapes of the complete tensors."""

    def take_gradients(self) -> None:
        """Set the slices' gradients to those that the last backward pass has summed over the ranks."""
        for name, slot in self._slots.items():
            gradient = slot.parameter.grad
            slice_ = self.parameters[name]
            slice_.grad = torch.zeros_like(slice_) if gradient is None else _local(gradient)

    def clear_gradients(self) -> None:
        """Drop all gradients."""
        for name, slot in self._slots.items():
            slot.parameter.grad = None
            self.parameters[name].grad = None

    @contextlib.contextmanager
    def gathered(self) -> Iterator[None]:
        """Within this block every rank holds all weights, and forward passes are not collectives. All ranks enter it.

        A single rank gathers nothing: its passes need no other rank, and the device may have no room for all weights.
        """
        if self._world.size == 1:
            yield
            self._finish_reading()
            return
        for part in self._sharded:
            part.set_reshard_after_forward(False, recurse=False)
            part.unshard()
        try:
            yield
        finally:
            for part in self._sharded:
                part.set_reshard_after_forward(True, recurse=False)
                part.reshard()
            self._finish_reading()

    @contextlib.contextmanager
    def unsharded(self) -> Iterator[None]:
        """Within this block rank 0's modules are as before sharding, for the export. All ranks enter it."""
        kept = {name: slot.parameter for name, slot in self._slots.items()}
        sharded_classes = {module: type(module) for module in self._classes}
        for name, parameter in kept.items():
            full = self._full(parameter)
            if self._world.is_first:
                self._slots[name].module._parameters[self._slots[name].name] = nn.Parameter(full)
        try:
            for module, plain in self._classes.items():
                module.__class__ = plain
            yield
        finally:
            for module, sharded in sharded_classes.items():
                module.__class__ = sharded
            for name, slot in self._slots.items():
                slot.module._parameters[slot.name] = kept[name]

    def _full(self, parameter: nn.Parameter) -> Tensor:
        """Return the complete parameter, in the memory where its slices are stored. All ranks call it."""
        if self._offloads and self._world.size == 1:
            return _local(parameter)
        # The collectives of the ranks run on the device.
        on_device: Any = parameter.detach().to(self._world.device)
        full: Tensor = on_device.full_tensor()
        return full.cpu() if self._offloads else full

    def _finish_reading(self) -> None:
        """Wait until the device has read the slices in host memory: after this they may change."""
        if self._offloads and self._world.device.type != "cpu":
            torch.accelerator.synchronize()


class ShardedGradients:
    """Gradients in slices; see `Gradients`."""

    forward_is_collective: ClassVar[bool] = True

    def __init__(self, shards: Shards, world: World) -> None:
        self._shards = shards
        self._world = world
        # The squared norm is summed together with the signals.
        size = 2 * NUM_TIMESTEP_BUCKETS + len(Signal) + 1
        self._numbers = torch.zeros(size, dtype=torch.float32, device=world.device)
        self.by_timestep = self._numbers[: 2 * NUM_TIMESTEP_BUCKETS].view(2, NUM_TIMESTEP_BUCKETS)
        self.signals = self._numbers[2 * NUM_TIMESTEP_BUCKETS : -1]

    def clear(self) -> None:
        """Drop the gradients of the last step, and set the signals to zero."""
        self._shards.clear_gradients()
        self._numbers.zero_()

    def hold(self) -> None:
        """Do nothing. Slices of gradients move, so passes on shards are not captured."""

    def passes(self) -> contextlib.AbstractContextManager[None]:
        """Return the block in which weights are gathered and gradients are summed."""
        return self._world.watch_collectives("gathering weights")

    def drop_passes(self) -> None:
        """Drop the passes of this step, to repeat them."""
        self.clear()

    def expect_last_pass(self) -> None:
        """Do nothing. Every backward pass exchanges its gradients."""

    def reduce(self, world: World) -> None:
        """Sum the signals and the norm over the ranks. The backward pass has summed the gradients."""
        self._shards.take_gradients()
        squares = [gradient.square().sum() for gradient in self._gradients()]
        self._numbers[-1] = torch.stack(squares).sum().to(self._numbers.device)
        world.sum(self._numbers)

    def norm(self) -> Tensor:
        """Return the 2-norm of all gradients, from its square that the ranks have summed."""
        return self._numbers[-1].sqrt()

    def scale(self, factor: float) -> None:
        """Multiply the gradients of this rank's slices."""
        for gradient in self._gradients():
            gradient.mul_(factor)

    def _gradients(self) -> list[Tensor]:
        gradients = [parameter.grad for parameter in self._shards.parameters.values()]
        return [gradient for gradient in gradients if gradient is not None]


class OrderedReduceScatter:
    """FSDP2's reduction of bf16 gradients on CPUs, which adds in fp32 in the order of the ranks.

    It has the interface of torch's ReduceScatter, which is not a public name.
    """

    def __init__(self, size: int) -> None:
        self._size = size

    def allocate(self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return new memory."""
        return torch.empty(size, dtype=dtype, device=device)

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: object,
        async_op: bool = False,
    ) -> None:
        """Write the rounded sum of this rank's part of the input. It is complete on return."""
        assert op == dist.ReduceOp.SUM and not async_op
        output_tensor.copy_(scatter_sum(input_tensor, self._size, group))


def offload_policy(offload: Offload, device: torch.device) -> OffloadPolicy:
    """Return FSDP2's policy. Memory that a GPU reads is pinned, so that the copies overlap with computation."""
    if offload is Offload.NONE:
        return OffloadPolicy()
    return CPUOffloadPolicy(pin_memory=device.type != "cpu")


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules that are gathered one by one, inner modules before those that contain them."""
    for name, part in reversed(list(module.named_modules())):
        if isinstance(part, nn.ModuleList) and name.rpartition(".")[2] in _BLOCKS:
            yield from part


def _local(tensor: Any) -> Tensor:
    """Return this rank's slice, in the same memory."""
    local: Tensor = tensor.detach().to_local()
    return local


def slice_offset(shape: tuple[int, ...], rank: int, size: int) -> tuple[int, ...]:
    """Return the offset of a rank's slice, as `torch.chunk` cuts."""
    rows = -(-shape[0] // size)
    return (min(rank * rows, shape[0]), *(0 for _ in shape[1:]))
