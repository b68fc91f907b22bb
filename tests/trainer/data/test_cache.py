"""Tests of the content-addressed cache, and of the map phase that fills it."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import pytest
import torch

from finetune_trainer.data.cache.encode import fill
from finetune_trainer.data.cache.store import Item, TensorCache
from finetune_trainer.data.hashes import FileHashes, hash_text
from finetune_trainer.distributed.world import World
from finetune_trainer.errors import StorageError

T = TypeVar("T")
SINGLE_RANK = World(0, 1, 0, torch.device("cpu"))


def item(value: float) -> Item:
    return {"mean": torch.full((2,), value), "std": torch.zeros(2)}


def test_put_items_are_found_by_another_cache_object(tmp_path: Path) -> None:
    cache = TensorCache(tmp_path / "new")
    cache.refresh()
    assert cache.missing(["b", "a", "a"]) == ["a", "b"]
    cache.put({"a": item(1.0)})
    other = TensorCache(tmp_path / "new")
    other.refresh()
    assert other.missing(["b", "a"]) == ["b"]
    assert other.get("a")["mean"].tolist() == [1.0, 1.0]


def test_items_of_a_damaged_shard_are_computed_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    TensorCache(tmp_path).put({"a": item(1.0)})
    (shard,) = tmp_path.iterdir()
    shard.write_bytes(shard.read_bytes()[:-4])
    cache = TensorCache(tmp_path)
    cache.refresh()
    assert cache.missing(["a"]) == ["a"]
    assert shard.name in caplog.text
    fill(cache, {"a": 0}, lambda: lambda _: item(2.0), SINGLE_RANK, lambda *_: None)
    assert cache.get("a")["mean"].tolist() == [2.0, 2.0]


def test_sweep_removes_only_old_partial_files(tmp_path: Path) -> None:
    for name, age in ((".old.safetensors.1.writing", 7200), (".new.safetensors.2.writing", 60)):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (1e9 - age, 1e9 - age))
    TensorCache(tmp_path).put({"a": item(1.0)})
    TensorCache(tmp_path).sweep(now=1e9)
    assert not list(tmp_path.glob(".old*"))
    assert list(tmp_path.glob(".new*"))
    assert list(tmp_path.glob("*.safetensors"))


def test_unwritable_folder_raises_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="cache: cannot write"):
        TensorCache(tmp_path / "file").put({"a": item(1.0)})


def test_fill_computes_only_missing_items(tmp_path: Path) -> None:
    encoded: list[int] = []

    def encode(number: int) -> Item:
        encoded.append(number)
        return item(number)

    TensorCache(tmp_path).put({"b": item(7.0)})
    cache = TensorCache(tmp_path)
    fill(cache, {"a": 0, "b": 1, "c": 2}, lambda: encode, SINGLE_RANK, lambda *_: None)
    assert encoded == [0, 2]
    assert cache.get("b")["mean"].tolist() == [7.0, 7.0]
    fill(
        TensorCache(tmp_path),
        {"a": 0, "b": 1, "c": 2},
        lambda: pytest.fail("the encoder was loaded although no item is missing"),
        SINGLE_RANK,
        lambda *_: None,
    )


def test_interrupted_fill_continues_with_missing_items(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finetune_trainer.data.cache.encode.SHARD_ITEMS", 2)
    work = {f"k{number}": number for number in range(5)}

    def encode_until_interrupt(number: int) -> Item:
        if number == 3:
            raise KeyboardInterrupt
        return item(number)

    with pytest.raises(KeyboardInterrupt):
        fill(TensorCache(tmp_path), work, lambda: encode_until_interrupt, SINGLE_RANK, lambda *_: None)
    encoded: list[int] = []
    cache = TensorCache(tmp_path)

    def encode(number: int) -> Item:
        encoded.append(number)
        return item(number)

    fill(cache, work, lambda: encode, SINGLE_RANK, lambda *_: None)
    assert encoded == [2, 3, 4]
    assert [float(cache.get(key)["mean"][0]) for key in work] == [0.0, 1.0, 2.0, 3.0, 4.0]


class _ThreadWorld(World):
    """A world of two ranks that are threads of this process."""

    meeting = threading.Barrier(2)
    box: ClassVar[list[Any]] = [None]

    def barrier(self) -> None:
        self.meeting.wait(10)

    def share(self, value: T, source: int = 0) -> T:
        if self.rank == source:
            self.box[0] = value
        self.barrier()
        shared: T = self.box[0]
        self.barrier()
        return shared


@pytest.mark.parametrize("shared", [True, False])
def test_ranks_share_the_missing_items(tmp_path: Path, shared: bool) -> None:
    """Each item is computed once on a shared disk. On separate disks, each rank computes all items."""
    work = {f"k{number}": number for number in range(6)}
    encoded: list[list[int]] = [[], []]
    caches = [TensorCache(tmp_path / ("one" if shared else str(rank))) for rank in range(2)]

    def run(rank: int) -> None:
        def encode(number: int) -> Item:
            encoded[rank].append(number)
            return item(number)

        fill(caches[rank], work, lambda: encode, _ThreadWorld(rank, 2, rank, torch.device("cpu")), lambda *_: None)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(cache.missing(work) == [] for cache in caches)
    assert [len(numbers) for numbers in encoded] == ([3, 3] if shared else [6, 6])


def test_hashes_are_kept_until_the_file_changes(tmp_path: Path) -> None:
    file = tmp_path / "weights"
    file.write_bytes(b"one")
    hashes = FileHashes(tmp_path / "note.json")
    first = hashes.of_file(file)
    hashes.save()
    assert FileHashes(tmp_path / "note.json").of_file(file) == first
    file.write_bytes(b"other")
    assert FileHashes(tmp_path / "note.json").of_file(file) != first


def test_damaged_note_of_hashes_is_ignored(tmp_path: Path) -> None:
    (tmp_path / "note.json").write_text("[1, 2", encoding="utf-8")
    (tmp_path / "weights").write_bytes(b"one")
    assert len(FileHashes(tmp_path / "note.json").of_file(tmp_path / "weights")) == 64


def test_hash_text_separates_its_parts() -> None:
    assert hash_text("ab", "c") != hash_text("a", "bc")


@pytest.mark.parametrize(("mask", "expected"), [(0o002, 0o664), (0o077, 0o600)])
def test_shards_have_the_permissions_of_other_files(tmp_path: Path, mask: int, expected: int) -> None:
    """Pods that run as other users of the same group read the shared cache."""
    before = os.umask(mask)
    try:
        TensorCache(tmp_path / "cache").put({"a": item(1.0)})
    finally:
        os.umask(before)
    (shard,) = (tmp_path / "cache").iterdir()
    assert shard.stat().st_mode & 0o777 == expected
