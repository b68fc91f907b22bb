"""A disk that fails or is full while the data is prepared: waited for, and never taken for broken data."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from finetune_contract.input_spec import DatasetSpec
from finetune_trainer import patience
from finetune_trainer.data.cache import store
from finetune_trainer.data.cache.image_scan import ImageScan, scan_images
from finetune_trainer.data.cache.store import TensorCache
from finetune_trainer.data.cache.stream_map import decode_row
from finetune_trainer.data.hashes import FileHashes
from finetune_trainer.data.images.decoding import decode_sample
from finetune_trainer.data.sources.base import SampleSource
from finetune_trainer.data.sources.open import open_source
from finetune_trainer.data.sources.stream import StreamedRow
from finetune_trainer.distributed.world import World
from finetune_trainer.errors import StorageOutageError
from testing.trainer import tiny

SINGLE_RANK = World(0, 1, 0, torch.device("cpu"))
FAILING_FILE = "/proc/self/mem"
"""A real file whose read fails with EIO."""


@pytest.fixture(name="waits", autouse=True)
def _waits(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Return the reported waits. Give up at the tenth pause, without waiting."""
    lines: list[str] = []
    seconds = iter(range(10**6))
    quick = patience.Patience(lines.append, lambda: 40.0, lambda: float(next(seconds)), lambda _: False, lambda: 0.0)
    monkeypatch.setattr(patience, "_PROCESS", quick)
    yield lines


def source_of(folder: Path) -> SampleSource:
    return open_source(DatasetSpec(source=str(folder)), "train")


def scan(source: SampleSource, folder: Path) -> ImageScan:
    hashes = FileHashes(folder / "hashes.json")
    return scan_images(len(source), source.open, folder, hashes, SINGLE_RANK, lambda *_: None)


def break_image(folder: Path) -> Path:
    image = folder / "train" / "1.png"
    image.rename(folder / "whole.png")
    image.symlink_to(FAILING_FILE)
    return image


def test_an_image_that_cannot_be_read_now_is_not_broken(tmp_path: Path) -> None:
    data = tiny.write_data(tmp_path / "data", 3)
    image = break_image(data)
    with pytest.raises(StorageOutageError, match="Input/output error"):
        scan(source_of(data), tmp_path / "cache")
    with pytest.raises(StorageOutageError, match="Input/output error"):
        decode_sample(source_of(data), 1)
    with pytest.raises(StorageOutageError, match="Input/output error"):
        decode_row(StreamedRow(1, ("a",), image.read_bytes, None), "key")
    # The disk works again: nothing in the cache says that the image is broken.
    image.unlink()
    (data / "whole.png").rename(image)
    assert scan(source_of(data), tmp_path / "cache").broken == []


def test_an_image_that_can_be_read_later_is_scanned(
    tmp_path: Path, waits: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tiny.write_data(tmp_path / "data", 3)
    image = break_image(data)

    def repair(_: float) -> bool:
        if image.is_symlink():
            image.unlink()
            (data / "whole.png").rename(image)
        return False

    monkeypatch.setattr(patience._PROCESS, "pause", repair)
    assert scan(source_of(data), tmp_path / "cache").broken == []
    assert "Input/output error" in waits[0]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
    ids=["OSError", "SafetensorError"],
)
@pytest.mark.parametrize("num_failures", [2, 1000])
def test_a_full_cache_disk_is_waited_for(
    tmp_path: Path, waits: list[str], monkeypatch: pytest.MonkeyPatch, error: Exception, num_failures: int
) -> None:
    left = num_failures

    def save(tensors: dict[str, Any], path: Path) -> None:
        nonlocal left
        left -= 1
        if left >= 0:
            raise error
        save_file(tensors, path)

    monkeypatch.setattr(store, "save_file", save)
    cache, items = TensorCache(tmp_path / "cache"), {"a": {"x": torch.ones(2)}}
    if num_failures > 2:
        with pytest.raises(StorageOutageError, match=r"cache: cannot write .*No space left on device"):
            cache.put(items)
        return
    cache.put(items)
    cache.refresh()
    assert cache.get("a")["x"].tolist() == [1, 1]
    assert len(waits) == 3
