"""Identities of inputs: what counts as a change, what fingerprints detect, and pins that are created once."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from finetune_contract.identity import InputIdentity, describe_change, merge
from finetune_trainer.data.cache.sample_identity import SampleHasher
from finetune_trainer.data.hashes import FileHashes
from finetune_trainer.distributed.world import World
from finetune_trainer.errors import ConfigError, StorageError
from finetune_trainer.models import fingerprint
from finetune_trainer.report import Reporter
from finetune_trainer.train.input_record import InputRecord
from finetune_trainer.train.pin_store import Pin, PinStore

pytestmark = pytest.mark.trainer

OLD, NEW = "a" * 40, "b" * 40


def identity(location: str = "me/data", **values: object) -> InputIdentity:
    return InputIdentity.model_validate({"field": "dataset.source", "location": location, **values})


@pytest.mark.parametrize(
    ("before", "now", "change"),
    [
        (identity(commit=OLD), identity(commit=OLD), None),
        (identity(commit=OLD), identity(commit=NEW), "commit aaaaaaaaaaaa -> bbbbbbbbbbbb"),
        (identity(commit=OLD), identity("you/data", commit=OLD), "me/data -> you/data, commit aaaaaaaaaaaa"),
        # A newer trainer may read more of the same commit.
        (identity(commit=OLD, content="1" * 64), identity(commit=OLD, content="2" * 64), None),
        (identity("/a", content="1" * 64), identity("/b", content="1" * 64), None),
        (identity("/a", content="1" * 64, samples=8), identity("/a", content="2" * 64, samples=5), "rows 8 -> 5"),
        (identity("/a", content="1" * 64), identity("/a", content="2" * 64), "contents 111111111111 -> 222222222222"),
        # The commit was unknown in one of the attempts.
        (identity(commit=OLD, content="1" * 64), identity(content="1" * 64), None),
        (identity(commit=OLD), identity(), None),
        (identity(commit=OLD), identity("/data"), "me/data -> /data"),
    ],
)
def test_change_is_described(before: InputIdentity, now: InputIdentity, change: str | None) -> None:
    found = describe_change(before, now)
    assert found == change or (change is not None and str(found).startswith(change))


def test_commit_and_content_of_a_field_are_merged() -> None:
    other = InputIdentity(field="model.base", location="/base", content="3" * 64)
    merged = merge([identity(commit=OLD), other, identity(content="1" * 64, samples=8)])
    assert merged == (identity(commit=OLD, content="1" * 64, samples=8), other)


def keep_times(path: Path, data: bytes) -> None:
    """Edit a file, but keep its size and modification time."""
    times = path.stat()
    assert len(data) == times.st_size
    path.write_bytes(data)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def test_edit_that_keeps_size_and_time_is_hashed_again(tmp_path: Path) -> None:
    path = tmp_path / "0.png"
    path.write_bytes(b"one")
    hashes = FileHashes(tmp_path / "note.json")
    before = hashes.of_file(path)
    hashes.save()
    keep_times(path, b"two")
    assert FileHashes(tmp_path / "note.json").of_file(path) != before


def test_note_of_an_older_release_is_computed_again(tmp_path: Path) -> None:
    path = tmp_path / "0.png"
    path.write_bytes(b"one")
    stat = path.stat()
    (tmp_path / "note.json").write_text(f'{{"{path}": [{stat.st_size}, {stat.st_mtime_ns}, "wrong"]}}', "utf-8")
    assert FileHashes(tmp_path / "note.json").of_file(path) != "wrong"


@pytest.fixture(name="weights")
def _weights(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    save_file({"large": torch.zeros(1000, 1000), "small": torch.zeros(10)}, path)
    return path


@pytest.mark.parametrize("name", ["large", "small"])
def test_fingerprint_finds_each_changed_tensor(weights: Path, name: str) -> None:
    before = fingerprint.fingerprint(weights)
    tensors = {"large": torch.zeros(1000, 1000), "small": torch.zeros(10)}
    save_file({**tensors, name: tensors[name] + 1e-6}, weights)
    assert fingerprint.fingerprint(weights) != before


def test_fingerprint_reads_a_small_part_of_large_weights(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    pread = os.pread

    def counting_pread(descriptor: int, length: int, offset: int) -> bytes:
        read.append(length)
        return pread(descriptor, length, offset)

    monkeypatch.setattr(os, "pread", counting_pread)
    fingerprint.fingerprint(weights)
    assert weights.stat().st_size > 4_000_000
    assert sum(read) < 10_000


@pytest.mark.parametrize("size", [0, 10, fingerprint.WHOLE_BYTES + 1, 9_000_000])
def test_fingerprint_of_other_files_depends_on_their_contents(tmp_path: Path, size: int) -> None:
    path = tmp_path / "model.ckpt"
    found = set()
    for byte in (0, 1):
        path.write_bytes(bytes([byte]) * size)
        found.add(fingerprint.fingerprint(path))
    assert len(found) == (2 if size else 1)


def test_first_different_sample_is_found() -> None:
    def of(*captions: str) -> SampleHasher:
        hasher = SampleHasher()
        for caption in captions:
            hasher.add("1" * 64, "", 1, (caption,))
        return hasher

    old = of("a", "b", "c").identity
    assert of("a", "b", "c").identity == old
    assert [of(*now).identity.first_difference(old.rows) for now in ("abc", "axc", "ab", "abcd")] == [None, 1, 2, 3]
    assert len({of(*now).identity.digest for now in ("abc", "acb", "ab")}) == 3


def record(store: PinStore) -> InputRecord:
    return InputRecord.open("circles", World(0, 1, 0, torch.device("cpu")), store, Reporter(0, None))


def test_pin_is_created_once(tmp_path: Path) -> None:
    store = PinStore(tmp_path, None)
    pin = Pin(identity(commit=OLD), {"unet/config.json": "1"}, b"\0\1\2\3")
    assert store.create("dataset.source.commit", pin)
    assert not store.create("dataset.source.commit", Pin(identity(commit=NEW)))
    assert store.read_all() == {"dataset.source.commit": pin}
    assert [path.name for path in (tmp_path / "inputs").iterdir()] == ["dataset.source.commit.json"]


def test_pinned_commit_is_the_revision_of_later_attempts(tmp_path: Path) -> None:
    store = PinStore(tmp_path, None)
    first = record(store)
    assert first.revision("model.base", "main") == "main"
    first.add_commit("model.base", "me/base", OLD, ConfigError)
    assert record(store).revision("model.base", "main") == OLD


def test_superseded_attempt_does_not_replace_a_pin(tmp_path: Path) -> None:
    """An attempt that reads no pins may be overtaken by another one."""
    slow, fast = record(PinStore(tmp_path, None)), record(PinStore(tmp_path, None))
    fast.add_commit("model.base", "me/base", NEW, ConfigError)
    with pytest.raises(StorageError, match=r"model\.base: another attempt has just recorded it differently"):
        slow.add_commit("model.base", "me/base", OLD, ConfigError)
    assert record(PinStore(tmp_path, None)).revision("model.base", None) == NEW


def test_other_commit_ends_the_attempt_with_a_remedy(tmp_path: Path) -> None:
    store = PinStore(tmp_path, None)
    record(store).add_commit("model.base", "me/base", OLD, ConfigError)
    with pytest.raises(ConfigError) as caught:
        record(store).add_commit("model.base", "me/base", NEW, ConfigError)
    assert str(caught.value) == (
        "model.base: me/base has changed since the job began: commit aaaaaaaaaaaa -> bbbbbbbbbbbb; restore what the "
        "job began with, or create another job with checkpoint.from: {job: circles}, which continues from the newest "
        "checkpoint with what is there now"
    )
