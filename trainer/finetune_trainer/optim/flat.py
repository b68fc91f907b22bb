"""Trained parameters as views of few flat tensors, so that an update of all of them takes few launches.

A model has thousands of parameters, most of them small. An optimizer that handles them one by one keeps the host busy
for longer than a GPU needs for the work. All operations here are elementwise, so the results are the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

import torch
from torch import Tensor, nn

from finetune_trainer.distributed.buckets import BUCKET_NUMEL, assign_buckets


@dataclass(frozen=True)
class FlatTensor:
    """Neighbouring parameters of one group of the optimizer, in one tensor.

    Attributes:
        parameter: all values (n,); what the optimizer updates.
        members: the parameters, in order.
        group: index of the optimizer's group.
    """

    parameter: nn.Parameter
    members: tuple[nn.Parameter, ...]
    group: int

    def split(self, flat: Tensor) -> list[Tensor]:
        """Return the part of each member in a tensor of this layout, in the member's shape."""
        parts = torch.split(flat, [member.numel() for member in self.members])
        return [part.view(member.shape) for part, member in zip(parts, self.members, strict=True)]


def storage_order(parameters: Sequence[nn.Parameter]) -> list[int]:
    """Return the order in which parameters that are views of one tensor are neighbours, as in its memory.

    Parameters with their own memory keep their order.

    Returns:
        Indices of the parameters.
    """
    storages = [_storage(parameter) for parameter in parameters]
    first: dict[int, int] = {}
    for index, storage in enumerate(storages):
        first.setdefault(storage, index)
    places = [(first[storage], each.storage_offset()) for storage, each in zip(storages, parameters, strict=True)]
    return sorted(range(len(parameters)), key=places.__getitem__)


def flat_groups(parameters: Sequence[nn.Parameter], groups: Sequence[int]) -> Iterator[tuple[int, list[nn.Parameter]]]:
    """Yield the group and the members of each flat tensor, in the order of the parameters.

    No flat tensor crosses the border of a bucket of gradients (`GradientBuckets`), so that its gradients are one
    tensor, too.

    Args:
        parameters: all parameters, in the order of their gradients.
        groups: index of the optimizer's group of each parameter.
    """
    for bucket in assign_buckets([parameter.numel() for parameter in parameters], BUCKET_NUMEL):
        for group, indices in groupby(bucket, lambda index: groups[index]):
            yield group, [parameters[index] for index in indices]


@torch.no_grad()
def flatten(parameters: Sequence[nn.Parameter], groups: Sequence[int]) -> list[FlatTensor]:
    """Move fp32 parameters into flat tensors. Those that already are neighbours in a tensor stay where they are.

    Args:
        parameters: see `flat_groups`; they then are views.
        groups: see `flat_groups`.
    """
    return [
        FlatTensor(nn.Parameter(_merge(run)), tuple(run), group)
        for group, members in flat_groups(parameters, groups)
        for run in _runs(members)
    ]


def gradient_of(flat: FlatTensor, gradients: Sequence[Tensor]) -> Tensor:
    """Return the gradient of a flat tensor.

    Args:
        flat: the flat tensor.
        gradients: gradients of its members, neighbours in one buffer.
    """
    first, expected = gradients[0], gradients[0].storage_offset()
    for gradient in gradients:
        if _storage(gradient) != _storage(first) or gradient.storage_offset() != expected:
            raise ValueError("the gradients of a flat tensor are not neighbours")
        expected += gradient.numel()
    return first.as_strided((flat.parameter.numel(),), (1,), first.storage_offset())


def _runs(members: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Split parameters into runs of neighbours in one tensor, and of parameters with their own memory."""
    run = [members[0]]
    for before, member in pairwise(members):
        if _follows(before, member) or not (_is_view(before) or _is_view(member)):
            run.append(member)
        else:
            yield run
            run = [member]
    yield run


def _merge(run: Sequence[nn.Parameter]) -> Tensor:
    """Return all values of a run as a flat tensor (n,) of which its parameters are views."""
    numel = sum(member.numel() for member in run)
    if all(_follows(before, member) for before, member in pairwise(run)):
        return run[0].detach().as_strided((numel,), (1,), run[0].storage_offset())
    flat = torch.cat([member.detach().flatten() for member in run])
    for member, part in zip(run, torch.split(flat, [member.numel() for member in run]), strict=True):
        member.data = part.view(member.shape)
    return flat


def _is_view(tensor: Tensor) -> bool:
    """Return whether a tensor shares its memory with others."""
    return bool(tensor.untyped_storage().nbytes() != tensor.numel() * tensor.element_size())


def _follows(before: Tensor, tensor: Tensor) -> bool:
    """Return whether a tensor begins where another one ends."""
    return bool(
        _storage(before) == _storage(tensor)
        and tensor.storage_offset() == before.storage_offset() + before.numel()
        and before.is_contiguous()
        and tensor.is_contiguous()
    )


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
