"""Checkpoints in an object store, on a real S3 server; the tests inspect the server's folder."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from finetune_contract import environment
from finetune_contract.bucket import Bucket, BucketError, is_bucket_url
from finetune_contract.exit_codes import ExitCode
from finetune_contract.manifest import FORMAT_VERSION, Manifest
from finetune_trainer.checkpoint.snapshot import Committed, Snapshot
from finetune_trainer.checkpoint.split import take_part
from finetune_trainer.checkpoint.store.bucket import BucketStore
from finetune_trainer.checkpoint.store.retention import Retention
from finetune_trainer.errors import StorageError, SupersededError
from testing.objectstore.server import ObjectStore
from testing.trainer import tiny
from testing.trainer.ranks import Ranks

JOB = "default/tiny-1f0c3a2b"
UID = "1f0c3a2b-0000-0000-0000-000000000000"


class BucketHarness:
    """A job's folder in a bucket, and a machine's local folder for fetched checkpoints."""

    def __init__(self, url: str, store: ObjectStore, local: Path) -> None:
        self.url = f"{url}/{JOB}"
        self.folder = store.folder / url.removeprefix("s3://") / JOB
        self.local = local

    def open(self, attempt: int = 1, keep: int = 3) -> BucketStore:
        store = BucketStore(Bucket(self.url), self.local, UID, attempt, Retention(keep))
        store.open()
        return store

    def choose(self, attempt: int = 9) -> tuple[Committed | None, list[str]]:
        warnings: list[str] = []
        return self.open(attempt).choose(warnings.append), warnings

    def names(self) -> list[str]:
        """Return the names of the checkpoints that have a manifest."""
        return sorted(path.parent.name for path in self.folder.glob("checkpoints/*/manifest.json"))

    def file(self, name: str, step: int = 2) -> Path:
        """Return the file that stores an object of a checkpoint."""
        return next((self.folder / "checkpoints" / f"step-{step:08d}-a1").rglob(name))


@pytest.fixture
def harness(object_store: ObjectStore, bucket_url: str, tmp_path: Path) -> BucketHarness:
    return BucketHarness(bucket_url, object_store, tmp_path / "fetched")


def snapshot(step: int) -> Snapshot:
    tensors = {"model": {"w": torch.full((3,), float(step))}, "optimizer": {"w.exp_avg": torch.ones(3)}}
    return Snapshot(step, tensors, {"losses": [0.5], "step": step})


def test_saved_checkpoint_is_restored_on_another_machine(harness: BucketHarness) -> None:
    harness.open().save(snapshot(40), 12.5)
    store = harness.open(attempt=2)
    chosen = store.choose(pytest.fail)
    assert chosen is not None
    assert chosen.folder.is_relative_to(harness.local)
    loaded = store.load(chosen)
    assert (loaded.step, loaded.values) == (40, {"losses": [0.5], "step": 40})
    assert loaded.tensors["model"]["w"].tolist() == [40.0] * 3
    assert loaded.tensors["optimizer"]["w.exp_avg"].tolist() == [1.0] * 3


def test_empty_bucket_has_no_checkpoint(harness: BucketHarness) -> None:
    assert harness.choose() == (None, [])


class KilledError(Exception):
    pass


@pytest.mark.parametrize(
    ("stage", "num_written"),
    [
        ("write model", 0),
        ("write optimizer", 1),
        ("read back", 2),
        ("write state", 2),
        ("check the fence", 2),
        ("write manifest", 2),
    ],
)
def test_checkpoint_without_manifest_does_not_count(harness: BucketHarness, stage: str, num_written: int) -> None:
    """The process is killed before the manifest. The next attempt removes the objects."""
    store = harness.open()
    store.save(snapshot(1), 0)

    def kill(now: str) -> None:
        if now == stage:
            assert not list(harness.folder.glob("checkpoints/step-00000002-a1/manifest.json"))
            raise KilledError

    store.on_stage = kill
    with pytest.raises(KilledError):
        store.save(snapshot(2), 0)
    objects = "checkpoints/step-00000002-a1/**/*.safetensors"
    assert len(list(harness.folder.glob(objects))) == num_written
    chosen, warnings = harness.choose()
    assert chosen is not None
    assert (chosen.manifest.step, warnings) == (1, [])
    assert list(harness.folder.glob(objects)) == []


@pytest.mark.parametrize("stage", ["check the fence again", "prune", "remove", "delete"])
def test_checkpoint_with_manifest_counts(harness: BucketHarness, stage: str) -> None:
    store = harness.open(keep=1)
    store.save(snapshot(1), 0)

    def kill(now: str) -> None:
        if now.startswith(stage):
            raise KilledError

    store.on_stage = kill
    with pytest.raises(KilledError):
        store.save(snapshot(2), 0)
    chosen, warnings = harness.choose()
    assert chosen is not None
    assert (chosen.manifest.step, warnings) == (2, [])


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def edit(**changes: object) -> Callable[[str], str]:
    def change(text: str) -> str:
        changed = json.dumps({**json.loads(text), **changes})
        return Manifest.model_validate_json(changed).sealed().model_dump_json()

    return change


def point_upwards(text: str) -> str:
    return text.replace('"name": "', '"name": "../../')


DAMAGES = [
    ("model.safetensors", flip, "SHA-256"),
    ("state.json", flip, "SHA-256"),
    ("model.safetensors", lambda file: file.write_bytes(b""), "has 0 bytes instead of"),
    ("model.safetensors", lambda file: file.write_bytes(file.read_bytes()[:-1]), "bytes instead of"),
    ("optimizer.safetensors", lambda file: file.unlink(), "is missing"),
    ("manifest.json", lambda file: file.write_bytes(b"{"), "manifest.json is damaged"),
    ("manifest.json", lambda file: file.write_bytes(b""), "manifest.json is damaged"),
]


@pytest.mark.parametrize(("name", "damage", "message"), DAMAGES)
def test_damaged_checkpoint_is_marked_with_the_reason(
    harness: BucketHarness, name: str, damage: Callable[[Path], object], message: str
) -> None:
    store = harness.open()
    for step in (1, 2):
        store.save(snapshot(step), 0)
    damage(harness.file(name))
    chosen, (warning,) = harness.choose()
    assert chosen is not None
    assert chosen.manifest.step == 1
    assert message in warning
    reason = harness.folder / "corrupt" / "step-00000002-a1" / "reason.txt"
    assert reason.read_text().strip() in warning
    # It no longer counts, is not read again, and none of its objects is deleted.
    again = harness.open(attempt=9, keep=1)
    assert (again.num_corrupt(), again.holds(2)) == (1, False)
    again.save(snapshot(3), 0)
    assert harness.names() == ["step-00000002-a1", "step-00000003-a9"]
    assert harness.choose()[1] == []


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (edit(job_uid="other"), "belongs to another job"),
        (edit(format_version=FORMAT_VERSION + 1), "this trainer reads formats up to"),
        (point_upwards, "is damaged"),
    ],
)
def test_foreign_checkpoint_is_skipped(harness: BucketHarness, damage: Callable[[str], str], message: str) -> None:
    """The manifest was replaced by another one."""
    store = harness.open()
    for step in (1, 2):
        store.save(snapshot(step), 0)
    text = damage(harness.file("manifest.json").read_text())
    Bucket(harness.url).put("checkpoints/step-00000002-a1/manifest.json", text.encode())
    chosen, (warning,) = harness.choose()
    assert chosen is not None
    assert chosen.manifest.step == 1
    assert message in warning


def test_checkpoints_beyond_keep_are_removed(harness: BucketHarness) -> None:
    store = harness.open(keep=2)
    for step in (1, 2, 3):
        store.save(snapshot(step), 0)
    assert harness.names() == ["step-00000002-a1", "step-00000003-a1"]
    folders = {path.relative_to(harness.folder).parts[1] for path in harness.folder.glob("checkpoints/*/**/*.*")}
    assert folders == {"step-00000002-a1", "step-00000003-a1"}


def test_two_survivors_write_the_same_step(harness: BucketHarness) -> None:
    """The first manifest counts; the second writer finds a valid checkpoint and keeps it."""
    store = harness.open()
    first = store.save(snapshot(1), 0, "-r1")
    assert store.save(snapshot(1), 1, "-r2").manifest == first.manifest
    chosen, warnings = harness.choose()
    assert chosen is not None
    assert (chosen.manifest, warnings) == (first.manifest, [])


def test_step_can_be_claimed_once(harness: BucketHarness) -> None:
    store = harness.open()
    assert (store.claim(4), store.claim(4), store.claim(5)) == (True, False, True)


def test_parts_of_several_writers_make_one_checkpoint(harness: BucketHarness) -> None:
    store, state = harness.open(), snapshot(3)
    parts = [store.write_part(Snapshot(3, take_part(state.tensors, part, 2), {}), part, 2) for part in (1, 0)]
    files = [entry for part in parts for entry in part]
    store.commit(state, files, 0)
    loaded, warnings = harness.choose(attempt=1)
    assert loaded is not None
    assert warnings == []
    assert sorted(store.load(loaded).tensors) == ["model", "optimizer"]
    lost = [entry.model_copy(update={"name": f"{entry.name}.lost"}) for entry in files]
    with pytest.raises(StorageError, match="lost is missing"):
        store.commit(snapshot(4), lost, 0)


def test_superseded_attempt_writes_nothing(harness: BucketHarness) -> None:
    old = harness.open(attempt=1)
    old.save(snapshot(1), 0)
    harness.open(attempt=2)
    with pytest.raises(SupersededError, match="attempt 2 has begun"):
        old.save(snapshot(2), 0)
    assert harness.names() == ["step-00000001-a1"]
    with pytest.raises(SupersededError):
        harness.open(attempt=1)


@pytest.fixture
def stopped(object_store: ObjectStore) -> Iterator[Callable[[], None]]:
    """Return a function that stops the server until the end of the test."""
    yield object_store.program.stop
    if not object_store.program.running:
        object_store.program.start()


def test_unreachable_server_fails_one_save(
    harness: BucketHarness, stopped: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    store = harness.open()
    stopped()
    with pytest.raises(StorageError, match=r"checkpoint storage: s3://.* cannot be written: Could not connect"):
        store.save(snapshot(1), 0)


def test_missing_bucket_is_reported(object_store: ObjectStore, bucket_url: str, tmp_path: Path) -> None:
    del object_store
    store = BucketStore(Bucket(f"{bucket_url}-not/x"), tmp_path, UID, 1, Retention())
    with pytest.raises(StorageError, match=r"checkpoint storage: .*bucket does not exist"):
        store.open()


def test_missing_package_or_unknown_scheme_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(BucketError, match="gs:// needs the Python package gcsfs, which is not installed"):
        Bucket("gs://models/x")
    with pytest.raises(BucketError, match=r"write s3://, gs://, az:// followed by the bucket's name"):
        Bucket("ftp://models/x")
    assert [is_bucket_url(text) for text in ("s3://a/b", "gs://a", "/a", "s3", "hub://a/b")] == [True, True] + 3 * [
        False
    ]


@pytest.mark.trainer
def test_ranks_without_shared_storage_resume_from_the_bucket(
    base: Path, data: Path, tmp_path: Path, harness: BucketHarness, object_store: ObjectStore
) -> None:
    """Two machines are killed during training and replaced by two with empty disks.

    The weights are those of the uninterrupted run, and validation results and outputs are in the bucket.
    """
    spec = tiny.make_spec(base, data, lora={"rank": 2, "dropout": 0.1}, validation={"split": "test", "steps": 2})
    expected = Ranks(spec, tmp_path / "expected", world_size=2)
    assert expected.run() == [ExitCode.DONE] * 2
    extra = {**object_store.environment, environment.BUCKET: harness.url, environment.MIN_PART_BYTES: "1"}
    first = Ranks(spec, tmp_path / "first", 1, 2, ("write model", 1), extra=extra, own_disks=True)
    assert -signal.SIGKILL in first.run()
    (newest,) = harness.names()[-1:]
    again = Ranks(spec, tmp_path / "again", 2, 2, extra=extra, own_disks=True)
    assert again.run() == [ExitCode.DONE] * 2, again.stderr()
    began = next(report["restoredStep"] for report in again.reports() if "restoredStep" in report)
    assert began == int(newest.split("-")[1]) > 0
    stored = harness.folder / "outputs" / "pytorch_lora_weights.safetensors"
    assert stored.read_bytes() == expected.weights()
    assert again.reports()[-1]["outputs"][0]["to"] == f"{harness.url}/outputs"
    losses = [
        json.loads((folder / "validation/losses.json").read_text()) for folder in (harness.folder, expected.job_dir)
    ]
    assert losses[0] == losses[1]
