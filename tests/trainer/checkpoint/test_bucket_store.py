"""Checkpoints in an object store, on a real S3 server; the bucket is a folder that the tests look into."""

from __future__ import annotations

import json
import signal
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


class Bed:
    """A job's folder in a bucket, and the machine that looks at it."""

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
        """Checkpoints that have a manifest."""
        return sorted(path.parent.name for path in self.folder.glob("checkpoints/*/manifest.json"))

    def file(self, name: str, step: int = 2) -> Path:
        """Where an object of a checkpoint is stored."""
        return next((self.folder / "checkpoints" / f"step-{step:08d}-a1").rglob(name))


@pytest.fixture
def bed(object_store: ObjectStore, bucket_url: str, tmp_path: Path) -> Bed:
    return Bed(bucket_url, object_store, tmp_path / "fetched")


def snapshot(step: int) -> Snapshot:
    tensors = {"model": {"w": torch.full((3,), float(step))}, "optimizer": {"w.exp_avg": torch.ones(3)}}
    return Snapshot(step, tensors, {"losses": [0.5], "step": step})


def test_what_was_saved_comes_back_on_another_machine(bed: Bed) -> None:
    bed.open().save(snapshot(40), 12.5)
    store = bed.open(attempt=2)
    chosen = store.choose(pytest.fail)
    assert chosen is not None
    assert chosen.folder.is_relative_to(bed.local)
    loaded = store.load(chosen)
    assert (loaded.step, loaded.values) == (40, {"losses": [0.5], "step": 40})
    assert loaded.tensors["model"]["w"].tolist() == [40.0] * 3
    assert loaded.tensors["optimizer"]["w.exp_avg"].tolist() == [1.0] * 3


def test_nothing_to_choose(bed: Bed) -> None:
    assert bed.choose() == (None, [])


class KilledError(Exception):
    pass


STAGES = ("write model", "write optimizer", "read back", "write state", "check the fence", "write manifest")


@pytest.mark.parametrize("stage", STAGES)
def test_killed_before_the_manifest_nothing_counts(bed: Bed, stage: str) -> None:
    """And the next attempt sweeps what was written."""
    store = bed.open()
    store.save(snapshot(1), 0)

    def die(now: str) -> None:
        if now == stage:
            assert not list(bed.folder.glob("checkpoints/step-00000002-a1/manifest.json"))
            raise KilledError

    store.on_stage = die
    with pytest.raises(KilledError):
        store.save(snapshot(2), 0)
    chosen, warnings = bed.choose()
    assert chosen is not None
    assert (chosen.manifest.step, warnings) == (1, [])
    assert not list((bed.folder / "checkpoints").glob("step-00000002-a1/**/*.safetensors"))


@pytest.mark.parametrize("stage", ["check the fence again", "prune", "remove", "delete"])
def test_killed_behind_the_manifest_it_counts(bed: Bed, stage: str) -> None:
    store = bed.open(keep=1)
    store.save(snapshot(1), 0)

    def die(now: str) -> None:
        if now.startswith(stage):
            raise KilledError

    store.on_stage = die
    with pytest.raises(KilledError):
        store.save(snapshot(2), 0)
    chosen, warnings = bed.choose()
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
    ("model.safetensors", flip, "has other contents than its SHA-256 says"),
    ("state.json", flip, "has other contents than its SHA-256 says"),
    ("model.safetensors", lambda file: file.write_bytes(b""), "has 0 bytes in place of"),
    ("model.safetensors", lambda file: file.write_bytes(file.read_bytes()[:-1]), "bytes in place of"),
    ("optimizer.safetensors", lambda file: file.unlink(), "is missing"),
    ("manifest.json", lambda file: file.write_bytes(b"{"), "manifest.json is damaged"),
    ("manifest.json", lambda file: file.write_bytes(b""), "manifest.json is damaged"),
]


@pytest.mark.parametrize(("name", "damage", "sentence"), DAMAGES)
def test_a_damaged_one_is_set_aside_with_the_reason(
    bed: Bed, name: str, damage: Callable[[Path], object], sentence: str
) -> None:
    store = bed.open()
    for step in (1, 2):
        store.save(snapshot(step), 0)
    damage(bed.file(name))
    chosen, (warning,) = bed.choose()
    assert chosen is not None
    assert chosen.manifest.step == 1
    assert sentence in warning
    reason = bed.folder / "corrupt" / "step-00000002-a1" / "reason.txt"
    assert reason.read_text().strip() in warning
    # It counts no more, is not looked at again, and nothing of it is deleted.
    again = bed.open(attempt=9, keep=1)
    assert (again.num_corrupt(), again.holds(2)) == (1, False)
    again.save(snapshot(3), 0)
    assert bed.names() == ["step-00000002-a1", "step-00000003-a9"]
    assert bed.choose()[1] == []


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (edit(job_uid="other"), "belongs to another job"),
        (edit(format_version=FORMAT_VERSION + 1), "this trainer reads up to"),
        (point_upwards, "is damaged"),
    ],
)
def test_one_that_is_not_for_us_is_left_out(bed: Bed, damage: Callable[[str], str], sentence: str) -> None:
    """Somebody has put another manifest."""
    store = bed.open()
    for step in (1, 2):
        store.save(snapshot(step), 0)
    text = damage(bed.file("manifest.json").read_text())
    Bucket(bed.url).put("checkpoints/step-00000002-a1/manifest.json", text.encode())
    chosen, (warning,) = bed.choose()
    assert chosen is not None
    assert chosen.manifest.step == 1
    assert sentence in warning


def test_older_ones_go_only_beyond_keep(bed: Bed) -> None:
    store = bed.open(keep=2)
    for step in (1, 2, 3):
        store.save(snapshot(step), 0)
    assert bed.names() == ["step-00000002-a1", "step-00000003-a1"]
    assert not list((bed.folder / "checkpoints").glob("step-00000001-a1/**/*.*"))


def test_two_survivors_write_the_same_step(bed: Bed) -> None:
    """The first manifest counts; the other finds a whole one, and is content."""
    store = bed.open()
    first = store.save(snapshot(1), 0, "-r1")
    assert store.save(snapshot(1), 1, "-r2").manifest == first.manifest
    chosen, warnings = bed.choose()
    assert chosen is not None
    assert (chosen.manifest, warnings) == (first.manifest, [])


def test_a_step_is_claimed_once(bed: Bed) -> None:
    store = bed.open()
    assert (store.claim(4), store.claim(4), store.claim(5)) == (True, False, True)


def test_parts_of_several_writers_make_one_checkpoint(bed: Bed) -> None:
    store, state = bed.open(), snapshot(3)
    parts = [store.write_part(Snapshot(3, take_part(state.tensors, part, 2), {}), part, 2) for part in (1, 0)]
    files = [entry for part in parts for entry in part]
    store.commit(state, files, 0)
    loaded, warnings = bed.choose(attempt=1)
    assert loaded is not None
    assert warnings == []
    assert sorted(store.load(loaded).tensors) == ["model", "optimizer"]
    lost = [entry.model_copy(update={"name": f"{entry.name}.lost"}) for entry in files]
    with pytest.raises(StorageError, match="lost is missing"):
        store.commit(snapshot(4), lost, 0)


def test_a_superseded_attempt_writes_nothing_more(bed: Bed) -> None:
    old = bed.open(attempt=1)
    old.save(snapshot(1), 0)
    bed.open(attempt=2)
    with pytest.raises(SupersededError, match="attempt 2 has begun"):
        old.save(snapshot(2), 0)
    assert bed.names() == ["step-00000001-a1"]
    with pytest.raises(SupersededError):
        bed.open(attempt=1)


@pytest.fixture
def stopped(object_store: ObjectStore) -> Iterator[Callable[[], None]]:
    """Stops the server until the test is over."""
    yield object_store.program.stop
    if not object_store.program.running:
        object_store.program.start()


def test_a_server_that_is_gone_is_one_failed_save(
    bed: Bed, stopped: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    store = bed.open()
    stopped()
    with pytest.raises(StorageError, match=r"checkpoint storage: s3://.* cannot be written: Could not connect"):
        store.save(snapshot(1), 0)


def test_a_bucket_that_is_not_there(object_store: ObjectStore, bucket_url: str, tmp_path: Path) -> None:
    del object_store
    store = BucketStore(Bucket(f"{bucket_url}-not/x"), tmp_path, UID, 1, Retention())
    with pytest.raises(StorageError, match=r"checkpoint storage: .*bucket does not exist"):
        store.open()


def test_a_package_that_is_missing() -> None:
    with pytest.raises(BucketError, match="gs:// needs the Python package gcsfs, which is not installed here"):
        Bucket("gs://models/x")
    with pytest.raises(BucketError, match=r"write s3://, gs://, az:// with the bucket's name"):
        Bucket("ftp://models/x")
    assert [is_bucket_url(text) for text in ("s3://a/b", "gs://a", "/a", "s3", "hub://a/b")] == [True, True] + 3 * [
        False
    ]


@pytest.mark.trainer
def test_ranks_without_a_common_disk_resume_from_the_bucket(
    base: Path, data: Path, tmp_path: Path, bed: Bed, object_store: ObjectStore
) -> None:
    """Two machines, killed in mid-training and replaced by two with empty disks: the undisturbed model, and its
    validation and outputs in the bucket."""
    spec = tiny.make_spec(base, data, lora={"rank": 2, "dropout": 0.1}, validation={"split": "test", "steps": 2})
    truth = Ranks(spec, tmp_path / "truth", world_size=2)
    assert truth.run() == [ExitCode.DONE] * 2
    extra = {**object_store.environment, environment.BUCKET: bed.url, environment.MIN_PART_BYTES: "1"}
    first = Ranks(spec, tmp_path / "first", 1, 2, ("write model", 1), extra=extra, own_disks=True)
    assert -signal.SIGKILL in first.run()
    (newest,) = bed.names()[-1:]
    again = Ranks(spec, tmp_path / "again", 2, 2, extra=extra, own_disks=True)
    assert again.run() == [ExitCode.DONE] * 2, again.stderr()
    began = next(report["restoredStep"] for report in again.reports() if "restoredStep" in report)
    assert began == int(newest.split("-")[1]) > 0
    stored = bed.folder / "outputs" / "pytorch_lora_weights.safetensors"
    assert stored.read_bytes() == truth.weights()
    assert again.reports()[-1]["outputs"][0]["to"] == f"{bed.url}/outputs"
    looks = [json.loads((folder / "validation/losses.json").read_text()) for folder in (bed.folder, truth.job_dir)]
    assert looks[0] == looks[1]
