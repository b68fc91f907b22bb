"""Sharded training (torch's FSDP2): each rank holds a slice of what is trained, of its gradients and of its optimizer.

With offload the slices lie in the host's memory and only the weights of the part that is at work are on the device. A
rank that is alone then holds one slice, the whole, by the same code.

A parameter's slice is also there as a plain tensor in the same memory: optimizer, average and checkpoints work on
those, and know nothing of the rest. Slices are cut along the first dimension, as `torch.chunk` cuts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy, fully_shard

from finetune_contract.spec import Offload
from finetune_trainer.distributed.gradients import NUM_TIMESTEP_BUCKETS, Signal
from finetune_trainer.distributed.world import World

_BLOCKS = ("down_blocks", "up_blocks", "resnets", "transformer_blocks", "layers")
"""Lists of modules whose weights are gathered and let go one by one, in UNets, ControlNets and text encoders. The small
ones inside the large blocks, too, for one of SDXL's large ones has half of its weights."""


@dataclass(frozen=True)
class _Place:
    """Where a parameter lives: it is another object after sharding, and while it is gathered."""

    module: nn.Module
    name: str

    @property
    def parameter(self) -> nn.Parameter:
        """What is there now."""
        found = self.module._parameters[self.name]
        assert found is not None
        return found


class Shards:
    """The slices of one rank.

    Args:
        modules: what is trained, whole on every rank and the same; they are sharded in place.
        parameters: their trained parameters, by the names under which checkpoints hold them.
        world: the ranks.
        offload: where the slices lie.
    """

    def __init__(
        self,
        modules: Sequence[nn.Module],
        parameters: Mapping[str, nn.Parameter],
        world: World,
        offload: Offload = Offload.NONE,
    ) -> None:
        self._world = world
        self._offloads = offload is Offload.CPU
        self._classes = {module: type(module) for module in modules}
        places = {
            id(parameter): _Place(owner, name)
            for module in modules
            for owner in module.modules()
            for name, parameter in owner.named_parameters(recurse=False)
        }
        self._places = {name: places[id(parameter)] for name, parameter in parameters.items()}
        world.as_group()
        mesh = init_device_mesh(world.device.type, (world.size,))
        policy = offload_policy(offload, world.device)
        for module in modules:
            for part in [*_blocks(module), module]:
                fully_shard(part, mesh=mesh, reshard_after_forward=True, offload_policy=policy)
        self._sharded = [part for module in modules for part in module.modules() if isinstance(part, FSDPModule)]
        for part in self._sharded:
            # Every loss is divided by the global batch already.
            part.set_gradient_divide_factor(1.0)
            part.set_force_sum_reduction_for_comms(True)
        self.parameters: dict[str, nn.Parameter] = {
            name: nn.Parameter(_local(place.parameter)) for name, place in self._places.items()
        }
        """This rank's slices, by name; for the optimizer."""
        self.offsets = {
            name: slice_offset(tuple(place.parameter.shape), world.rank, world.size)
            for name, place in self._places.items()
        }
        """Where each slice begins in the whole tensor."""
        self.shapes = {name: tuple(place.parameter.shape) for name, place in self._places.items()}
        """Shapes of the whole tensors."""

    def take_gradients(self) -> None:
        """Give the slices the gradients that the last backward pass has summed over the ranks."""
        for name, place in self._places.items():
            gradient = place.parameter.grad
            slice_ = self.parameters[name]
            slice_.grad = torch.zeros_like(slice_) if gradient is None else _local(gradient)

    def clear_gradients(self) -> None:
        """Drop them."""
        for name, place in self._places.items():
            place.parameter.grad = None
            self.parameters[name].grad = None

    @contextlib.contextmanager
    def gathered(self) -> Iterator[None]:
        """Within this block every rank holds all weights, and forward passes are no collectives. All ranks enter it.

        A rank that is alone waits for nobody, and there may be no room for all of them.
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
    def whole(self) -> Iterator[None]:
        """Within this block rank 0's modules are what they were before sharding, to be written. All ranks enter it."""
        kept = {name: place.parameter for name, place in self._places.items()}
        sharded_classes = {module: type(module) for module in self._classes}
        for name, parameter in kept.items():
            full = self._full(parameter)
            if self._world.is_first:
                self._places[name].module._parameters[self._places[name].name] = nn.Parameter(full)
        try:
            for module, plain in self._classes.items():
                module.__class__ = plain
            yield
        finally:
            for module, sharded in sharded_classes.items():
                module.__class__ = sharded
            for name, place in self._places.items():
                place.module._parameters[place.name] = kept[name]

    def _full(self, parameter: nn.Parameter) -> Tensor:
        """The whole of a parameter, where its slices lie. All ranks call it."""
        if self._offloads and self._world.size == 1:
            return _local(parameter)
        # The ranks' collectives are those of the device.
        on_device: Any = parameter.detach().to(self._world.device)
        full: Tensor = on_device.full_tensor()
        return full.cpu() if self._offloads else full

    def _finish_reading(self) -> None:
        """Slices in the host's memory may change behind this: the device has read them."""
        if self._offloads and self._world.device.type != "cpu":
            torch.accelerator.synchronize()


class ShardedGradients:
    """Gradients in slices; see `Gradients`."""

    in_step: ClassVar[bool] = True

    def __init__(self, shards: Shards, world: World) -> None:
        self._shards = shards
        self._world = world
        # The square of the norm travels with the signals.
        size = 2 * NUM_TIMESTEP_BUCKETS + len(Signal) + 1
        self._numbers = torch.zeros(size, dtype=torch.float32, device=world.device)
        self.by_timestep = self._numbers[: 2 * NUM_TIMESTEP_BUCKETS].view(2, NUM_TIMESTEP_BUCKETS)
        self.signals = self._numbers[2 * NUM_TIMESTEP_BUCKETS : -1]

    def clear(self) -> None:
        """Drop the last step's."""
        self._shards.clear_gradients()
        self._numbers.zero_()

    def passes(self) -> contextlib.AbstractContextManager[None]:
        """Weights are gathered and gradients are summed in it."""
        return self._world.peers("gathering weights")

    def reduce(self, world: World) -> None:
        """Gradients are summed already: the signals, and the norm."""
        self._shards.take_gradients()
        squares = [gradient.square().sum() for gradient in self._gradients()]
        self._numbers[-1] = torch.stack(squares).sum().to(self._numbers.device)
        world.sum(self._numbers)

    def norm(self) -> Tensor:
        """The norm, whose square the ranks have summed."""
        return self._numbers[-1].sqrt()

    def scale(self, factor: float) -> None:
        """Multiply this rank's slices."""
        for gradient in self._gradients():
            gradient.mul_(factor)

    def _gradients(self) -> list[Tensor]:
        gradients = [parameter.grad for parameter in self._shards.parameters.values()]
        return [gradient for gradient in gradients if gradient is not None]


def offload_policy(offload: Offload, device: torch.device) -> OffloadPolicy:
    """FSDP2's policy; memory that a GPU reads is pinned, so that it reads beside its work."""
    if offload is Offload.NONE:
        return OffloadPolicy()
    return CPUOffloadPolicy(pin_memory=device.type != "cpu")


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    """What is gathered one by one: what is inside another comes before it."""
    for name, part in reversed(list(module.named_modules())):
        if isinstance(part, nn.ModuleList) and name.rpartition(".")[2] in _BLOCKS:
            yield from part


def _local(tensor: Any) -> Tensor:
    """This rank's slice, in the same memory."""
    local: Tensor = tensor.detach().to_local()
    return local


def slice_offset(shape: tuple[int, ...], rank: int, size: int) -> tuple[int, ...]:
    """Where a rank's slice begins, as `torch.chunk` cuts."""
    rows = -(-shape[0] // size)
    return (min(rank * rows, shape[0]), *(0 for _ in shape[1:]))
