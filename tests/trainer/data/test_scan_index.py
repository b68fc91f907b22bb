"""The index of a data set's files: a later attempt reads it instead of the images, and a change is still found."""

from __future__ import annotations

import os
from pathlib import Path
from typing import IO, Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from finetune_contract.identity import DATASET
from finetune_trainer.data import prepare
from finetune_trainer.data.cache import scan_index, store
from finetune_trainer.data.cache.image_scan import ImageScan, scan_images
from finetune_trainer.data.cache.scan_index import FileChecks, ScanIndex
from finetune_trainer.data.cache.store import TensorCache
from finetune_trainer.data.cache.store_index import INDEX_NAME, ShardItems, pack_index, unpack_index
from finetune_trainer.data.hashes import FileHashes, noted_number
from finetune_trainer.distributed.world import World
from finetune_trainer.errors import DataError, StorageError
from finetune_trainer.report import Reporter
from finetune_trainer.train.input_record import InputRecord
from finetune_trainer.train.pin_store import PinStore
from testing.trainer import streams, tiny

pytestmark = pytest.mark.trainer

WORLD = World(0, 1, 0, torch.device("cpu"))


@pytest.fixture(name="files")
def _files(tmp_path: Path) -> list[Path]:
    (tmp_path / "data").mkdir()
    files = [tmp_path / "data" / f"{number}.png" for number in range(3)]
    for number, path in enumerate(files):
        Image.new("RGB", (4, 4), (number, 0, 0)).save(path)
    return files


def scan(files: list[Path], cache: Path, checks: FileChecks | None = None) -> tuple[ImageScan, int]:
    """Scan files as a new attempt. Return the scan, and the number of images that were opened."""
    opened = []

    def opener(index: int) -> IO[bytes]:
        opened.append(index)
        return files[index].open("rb")

    found = scan_images(
        len(files), opener, cache, FileHashes(cache / "hashes.json"), WORLD, lambda *_: None, files, checks
    )
    return found, len(opened)


def replace_content(path: Path) -> None:
    """Write another image of the same size, and restore the file's mtime, as a copying tool does."""
    before = path.stat()
    Image.new("RGB", (4, 4), (200, 0, 0)).save(path)
    assert path.stat().st_size == before.st_size
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_a_later_attempt_opens_no_image(files: list[Path], tmp_path: Path) -> None:
    (tmp_path / "data" / "1.png").write_bytes(b"")
    missing = [*files, tmp_path / "data" / "no.png"]
    first, num_opened = scan(missing, tmp_path / "cache")
    assert num_opened > 0
    assert first.broken == [1, 3]
    again, num_opened = scan(missing, tmp_path / "cache")
    assert num_opened == 0
    assert again.ids == first.ids
    assert np.array_equal(again.sizes, first.sizes)


def test_a_changed_file_is_scanned_again(files: list[Path], tmp_path: Path) -> None:
    first, _ = scan(files, tmp_path / "cache")
    replace_content(files[1])
    second, _ = scan(files, tmp_path / "cache")
    assert [a == b for a, b in zip(first.ids, second.ids, strict=True)] == [True, False, True]
    assert scan(files, tmp_path / "cache")[1] == 0, "the new state is not in the index"


def test_checks_in_the_background_find_what_has_changed(files: list[Path], tmp_path: Path) -> None:
    first, _ = scan(files, tmp_path / "cache")
    checks = FileChecks()
    assert scan(files, tmp_path / "cache", checks)[1] == 0
    assert checks.first_changed() is None

    os.utime(files[0])
    assert scan(files, tmp_path / "cache", checks)[0].ids == first.ids
    assert checks.first_changed() is None, "the content is the same"
    assert scan(files, tmp_path / "cache")[1] > 0, "the index has an outdated state"

    replace_content(files[2])
    assert scan(files, tmp_path / "cache", checks)[0].ids == first.ids
    assert checks.first_changed() == str(files[2])

    scan(files, tmp_path / "cache")
    files[1].unlink()
    scan(files, tmp_path / "cache", checks)
    assert checks.first_changed() == str(files[1])


def test_a_file_that_changed_ends_the_attempt_before_its_first_step(tmp_path: Path) -> None:
    record = InputRecord.open("job", WORLD, PinStore(tmp_path, None), Reporter(0, None))
    record.confirm_files(DATASET, "/data", None)
    with pytest.raises(
        DataError, match=r"/data has changed since the job began: contents differ; first difference: /data/1\.png; re"
    ):
        record.confirm_files(DATASET, "/data", "/data/1.png")


@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: data[:40] + b"x" + data[41:], lambda _: b""])
def test_a_damaged_index_is_ignored(files: list[Path], tmp_path: Path, damage: Any) -> None:
    first, _ = scan(files, tmp_path / "cache")
    (index,) = (tmp_path / "cache" / "scans").iterdir()
    index.write_bytes(damage(index.read_bytes()))
    again, num_opened = scan(files, tmp_path / "cache")
    assert num_opened > 0
    assert again.ids == first.ids


def test_the_index_of_another_number_of_images_is_ignored() -> None:
    index = ScanIndex(("ab" * 32, ""), np.ones((2, 2), dtype=np.int32), np.full((2, 3), 2**40, dtype=np.int64))
    same = ScanIndex.from_bytes(index.to_bytes(), 2)
    assert same is not None
    assert same.ids == index.ids
    assert np.array_equal(same.sizes, index.sizes)
    assert np.array_equal(same.states, index.states)
    assert ScanIndex.from_bytes(index.to_bytes(), 1) is None


def test_states_are_compared_in_every_thread(tmp_path: Path) -> None:
    files = [tmp_path / str(number) for number in range(3 * scan_index._NUM_READERS + 1)]
    for path in files:
        path.touch()
    states = np.array([scan_index.state_of(path) for path in files], dtype=np.int64)
    assert scan_index.find_changed(files, states) == []
    for number in (0, 20, len(files) - 1):
        files[number].write_text("changed")
    assert scan_index.find_changed(files, states) == [0, 20, len(files) - 1]


def fill_cache(folder: Path) -> None:
    """Write a cache of two shards and its index."""
    cache = TensorCache(folder)
    cache.put({"a": {"x": torch.ones(2)}, "b": {"x": torch.zeros(2)}})
    cache.put({"c": {"x": torch.ones(3), "y": torch.zeros(1)}})
    cache.refresh()
    cache.save_index()


def test_a_later_attempt_opens_a_shard_only_to_read_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill_cache(tmp_path)
    opened: list[str] = []

    def open_and_count(shard: Path, framework: str) -> Any:
        opened.append(shard.name)
        return safe_open(shard, framework)

    monkeypatch.setattr(store, "safe_open", open_and_count)
    later = TensorCache(tmp_path)
    later.refresh()
    assert later.missing(["a", "b", "c", "d"]) == ["d"]
    assert opened == []
    assert {name: value.tolist() for name, value in later.get("c").items()} == {"x": [1, 1, 1], "y": [0]}
    assert len(opened) == 1
    later.put({"d": {"x": torch.ones(1)}})
    later.refresh()
    assert later.missing(["a", "d"]) == []
    later.save_index()
    assert len(unpack_index((tmp_path / INDEX_NAME).read_bytes())) == 3


def test_a_shard_that_is_damaged_after_it_was_indexed_is_found(tmp_path: Path) -> None:
    fill_cache(tmp_path)
    first = TensorCache(tmp_path)
    first.refresh()
    shard = first._shards[first.shard("c")]
    content = shard.read_bytes()

    shard.write_bytes(content[:-1])
    later = TensorCache(tmp_path)
    later.refresh()
    assert later.missing(["a", "b", "c"]) == ["c"], "its size shows that it is not complete"

    shard.write_bytes(b"\xff" * len(content))
    later = TensorCache(tmp_path)
    later.refresh()
    assert later.missing(["c"]) == []
    with pytest.raises(StorageError, match=r"is damaged .*; the next attempt computes its items again"):
        later.get("c")
    last = TensorCache(tmp_path)
    last.refresh()
    assert last.missing(["a", "b", "c"]) == ["c"]


def test_a_damaged_index_of_shards_is_ignored(tmp_path: Path) -> None:
    listing = [ShardItems("a.safetensors", 8, ("x", "y"), [b"0" * 16, b"1" * 16]), ShardItems("b", 1, ("x",), [])]
    data = pack_index(listing)
    assert unpack_index(data) == listing
    assert unpack_index(data[:-1]) == unpack_index(b"") == unpack_index(data[:50] + b"?" + data[51:]) == []
    fill_cache(tmp_path)
    (tmp_path / INDEX_NAME).write_bytes(b"")
    cache = TensorCache(tmp_path)
    cache.refresh()
    assert cache.missing(["a", "b", "c"]) == []


def test_a_number_is_computed_once_per_note(tmp_path: Path) -> None:
    note = tmp_path / "captions" / "note"
    assert noted_number(note, lambda: 7) == 7
    assert noted_number(note, lambda: pytest.fail("computed again")) == 7
    note.write_text("?")
    assert noted_number(note, lambda: 0) == 0
    assert noted_number(note, lambda: 1) == 0
    (tmp_path / "file").touch()
    assert noted_number(tmp_path / "file" / "note", lambda: 3) == 3


def test_captions_are_tokenized_by_the_first_attempt_only(
    base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = tiny.make_spec(base, data, centerCrop=True)
    counts: list[int] = []

    def count(tokenizers: Any, captions: Any, settings: Any) -> int:
        counts.append(len(captions))
        return 2

    monkeypatch.setattr(prepare, "count_cut", count)
    for _ in range(2):
        reports: list[str] = []
        streams.prepare(spec, tmp_path / "cache", reports)
        assert any(line.startswith("2 of 7 captions are too long") for line in reports)
    assert counts == [7]
