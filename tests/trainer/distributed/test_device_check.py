"""The check of all devices after an attempt that ended because of a faulty GPU."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from finetune_contract.exit_codes import ExitCode
from finetune_trainer.distributed import device_check
from finetune_trainer.distributed.device_check import CheckResult, check_devices, find_bad, multiply, within
from finetune_trainer.distributed.world import World
from finetune_trainer.errors import DeviceError

CPU = torch.device("cpu")


class ManyRanks(World):
    """Stand-in for a world of three ranks: this one and two others with given results."""

    others: tuple[int, int] = (1_000_000, 1_000_000)
    error: float = 0.0

    def gather_numbers(self, number: int) -> list[int]:
        """Return the numbers of all ranks."""
        numbers = list(self.others)
        numbers.insert(self.rank, number)
        return numbers

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the sum over the ranks, which is 6 if it is right."""
        return torch.full_like(tensor, 6.0 + self.error)


def world(rank: int = 0, others: tuple[int, int] = (1_000_000, 1_000_000), error: float = 0.0) -> World:
    made = ManyRanks(rank, 3, rank, CPU)
    object.__setattr__(made, "others", others)
    object.__setattr__(made, "error", error)
    return made


def takes(seconds: float | None) -> Callable[[torch.device], float | None]:
    return lambda _: seconds


def test_healthy_ranks_pass_without_a_message() -> None:
    warnings: list[str] = []
    check_devices(world(), warnings.append, takes(1.0))
    assert warnings == []


def test_slow_rank_is_named() -> None:
    warnings: list[str] = []
    check_devices(world(others=(1_000_000, 3_000_000)), warnings.append, takes(1.0))
    assert warnings == ["rank 2 is slow: its device needs 3.0 times the median of all ranks for the same work"]


def test_faulty_rank_ends_with_its_exit_code_and_is_named_by_the_others() -> None:
    with pytest.raises(DeviceError, match="the device of rank 1 does not respond or computes wrong results") as caught:
        check_devices(world(rank=1), print, takes(None))
    assert caught.value.code is ExitCode.DEVICE
    warnings: list[str] = []
    check_devices(world(others=(-1, 1_000_000)), warnings.append, takes(1.0))
    assert warnings == ["the device of rank 1 does not respond or computes wrong results"]


def test_wrong_sum_ends_the_rank() -> None:
    with pytest.raises(DeviceError):
        check_devices(world(error=1.0), print, takes(1.0))


def test_gpu_that_does_not_respond_ends_before_the_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_check, "START_SECONDS", 0.01)
    waits = threading.Event()
    made = World(0, 2, 0, torch.device("cuda"))
    with pytest.raises(DeviceError):
        check_devices(made, print, lambda _: float(waits.wait()))
    waits.set()


@pytest.mark.parametrize(
    ("microseconds", "faulty", "slow"),
    [
        ([100, 100, 100], (), ()),
        ([100, 149, 100], (), ()),
        ([100, 150, 100], (), ((1, 1.5),)),
        ([100, 300], (), ((1, 3.0),)),
        ([-1, 100, 100], (0,), ()),
        ([-1, -1], (0, 1), ()),
        ([100], (), ()),
    ],
)
def test_ranks_that_the_check_finds(
    microseconds: list[int], faulty: tuple[int, ...], slow: tuple[tuple[int, float], ...]
) -> None:
    assert find_bad(microseconds) == CheckResult(faulty, slow)


def test_products_are_exact_and_wrong_ones_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = multiply(CPU)
    assert seconds is not None
    assert seconds > 0
    once = device_check._multiply_once
    monkeypatch.setattr(device_check, "_multiply_once", lambda left, right: once(left, right) + 1)
    assert multiply(CPU) is None


def test_error_of_a_device_is_a_fault() -> None:
    def fail() -> float:
        raise RuntimeError("CUDA error: uncorrectable ECC error encountered")

    assert within(60, fail) is None
    assert within(60, lambda: 2.0) == 2.0
