"""Bytes of weight files, however they are produced: copied by the system, read, or computed ahead of the writing."""

from __future__ import annotations

import errno
import hashlib
import os
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from finetune_trainer.export.formats import merge
from finetune_trainer.models.layouts.trained import LowRank
from finetune_trainer.weights import append, lazy
from finetune_trainer.weights.append import Appender
from finetune_trainer.weights.files import VALUES_HASH, write_ckpt, write_safetensors
from finetune_trainer.weights.lazy import LazyTensor, in_memory, read_file, read_header

pytestmark = pytest.mark.trainer
NUM_BUFFERED = 5
"""Blocks of a copy: more than there are buffers."""


@pytest.fixture(name="tensors")
def _tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, LazyTensor]:
    """Tensors of a file, which are copied, next to computed ones. Blocks are small."""
    monkeypatch.setattr(append, "COPY_BYTES", 64)
    monkeypatch.setattr(lazy, "BLOCK_BYTES", 64)
    numbers = torch.arange(64 * NUM_BUFFERED // 4 + 3, dtype=torch.float32)
    save_file({"a": numbers, "c": numbers.flip(0).contiguous(), "e": torch.empty(0, 4)}, tmp_path / "source")
    stored = read_file(tmp_path / "source")
    return {**stored, "b": stored["a"].times(2.0), "d": in_memory(torch.tensor(3.0)), "f": stored["c"].times(0.5)}


def expected(tensors: dict[str, LazyTensor]) -> dict[str, Tensor]:
    return {name: tensor.read().reshape(tensor.shape) for name, tensor in tensors.items()}


def assert_equal(found: dict[str, Tensor], tensors: dict[str, LazyTensor]) -> None:
    values = expected(tensors)
    assert found.keys() == values.keys()
    assert all(torch.equal(found[name], value) for name, value in values.items())


@pytest.mark.parametrize("refusal", [None, errno.EINVAL, errno.ENOSYS])
def test_copied_and_computed_tensors_have_their_values(
    tensors: dict[str, LazyTensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refusal: int | None
) -> None:
    """The copy of the system may be refused: of some file systems, and on other systems than Linux."""
    copies, copy = [], os.sendfile

    def sendfile(target: int, source: int, offset: int, size: int) -> int:
        copies.append(size)
        if refusal is not None:
            raise OSError(refusal, "refused")
        # The system may copy less than it is asked for.
        return copy(target, source, offset, min(size, 100))

    monkeypatch.setattr(os, "sendfile", sendfile)
    write_safetensors(tmp_path / "plain", tensors, {})
    assert copies
    assert_equal(load_file(tmp_path / "plain"), tensors)


def test_the_hash_is_that_of_the_values(tensors: dict[str, LazyTensor], tmp_path: Path) -> None:
    write_safetensors(tmp_path / "hashed", tensors, {"hash": VALUES_HASH})
    _, metadata, offset = read_header(tmp_path / "hashed")
    assert metadata["hash"] == f"0x{hashlib.sha256((tmp_path / 'hashed').read_bytes()[offset:]).hexdigest()}"
    assert_equal(load_file(tmp_path / "hashed"), tensors)


def test_ckpt_files_have_the_same_values(tensors: dict[str, LazyTensor], tmp_path: Path) -> None:
    write_ckpt(tmp_path / "model.ckpt", tensors)
    assert_equal(torch.load(tmp_path / "model.ckpt", weights_only=True)["state_dict"], tensors)


def test_the_next_block_is_computed_while_one_is_written() -> None:
    computed = threading.Event()

    def rows(start: int, stop: int) -> Tensor:
        if start:
            computed.set()
        return torch.ones(stop - start)

    class Slow:
        """Its first write ends when the second block is computed."""

        num_writes = 0

        def write(self, content: memoryview) -> None:
            self.num_writes += 1
            assert computed.wait(60)

    tensor = LazyTensor(torch.float32, (2 * lazy.BLOCK_BYTES // 4,), rows)
    output = Slow()
    with Appender([tensor]) as appender:
        appender.append(output, tensor)
    assert output.num_writes == 2


def test_failures_of_sources_end_the_writing(tensors: dict[str, LazyTensor], tmp_path: Path) -> None:
    def fail(start: int, stop: int) -> Tensor:
        raise OSError(errno.EIO, "cannot be read")

    with pytest.raises(OSError, match="cannot be read"):
        write_safetensors(tmp_path / "out", {**tensors, "g": LazyTensor(torch.float32, (4,), fail)}, {})
    os.truncate(tmp_path / "source", (tmp_path / "source").stat().st_size - 1)
    for metadata in ({}, {"hash": VALUES_HASH}):
        with pytest.raises(OSError, match="source is incomplete"):
            write_safetensors(tmp_path / "out", {name: tensors[name] for name in "ac"}, metadata)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("dora", [False, True])
def test_merged_weights_do_not_depend_on_the_tiles(
    dtype: torch.dtype, dora: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(50, 24, generator=generator).to(dtype)
    unchanged = weight.clone()
    up, down = torch.randn(50, 4, generator=generator), torch.randn(4, 24, generator=generator)
    norms = torch.rand(50, generator=generator) + 0.5
    sums = weight.double() + 0.5 * (1.0 if dora else 0.3) * up.double() @ down.double()
    if dora:
        sums = weight.double() + 0.3 * (sums * (norms / sums.norm(dim=1))[:, None] - weight.double())
    layer = LowRank(in_memory(down), in_memory(up), alpha=2.0, magnitude=norms if dora else None)
    for tile_bytes in (1, 700, 1 << 20):
        monkeypatch.setattr(merge, "_TILE_BYTES", tile_bytes)
        found = merge.merged_weight(in_memory(weight), layer, 0.3).rows(3, 50)
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), sums[3:], atol=1e-5, rtol=1e-3 if dtype == torch.float16 else 1e-6)
    assert torch.equal(weight, unchanged)
