"""Outages of an object store: waited for while a data set or a checkpoint is read, and then the attempt's cause."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from finetune_contract import bucket
from finetune_contract.bucket import Bucket
from finetune_contract.exit_codes import ExitCode
from finetune_contract.spec import CheckpointSource
from finetune_trainer import patience
from finetune_trainer.checkpoint.roles import READING, Role, choose_checkpoint, open_storage, read_shards
from finetune_trainer.checkpoint.snapshot import Snapshot
from finetune_trainer.checkpoint.store import base
from finetune_trainer.checkpoint.store.bucket import BucketStore
from finetune_trainer.checkpoint.store.folder import FolderStore
from finetune_trainer.checkpoint.store.retention import Retention
from finetune_trainer.checkpoint.store.select import JobFolders
from finetune_trainer.distributed.world import World
from finetune_trainer.errors import ConfigError, NetworkError
from finetune_trainer.fetched import fetch
from finetune_trainer.report import Reporter
from finetune_trainer.train.earlier_work import EarlierWork
from finetune_trainer.train.input_record import InputRecord
from finetune_trainer.train.pin_store import PinStore
from testing.hub import CUT, RESET, Fault
from testing.objectstore import faults
from testing.objectstore.faults import FAULTS, FaultyStore
from testing.objectstore.server import ObjectStore
from testing.trainer import streams, tiny

ALONE = World(0, 1, 0, torch.device("cpu"))
UID = "1f0c3a2b"
SNAPSHOT = Snapshot(4, {"model": {"w": torch.ones(300)}, "optimizer": {"w.exp_avg": torch.ones(3)}}, {"step": 4})
SAMPLES = {"a.txt": "one", "b.txt": "two" * 100}


@pytest.fixture(name="proxy")
def _proxy(object_store: ObjectStore, bucket_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyStore]:
    """Return a proxy that this process uses instead of the server. Its clients give up soon."""
    assert bucket_url
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setitem(bucket._OPTIONS, "s3", {"config_kwargs": {"connect_timeout": 1, "read_timeout": 0.2}})
    with faults.serve(object_store) as (proxy, environment):
        monkeypatch.setenv("AWS_ENDPOINT_URL", environment["AWS_ENDPOINT_URL"])
        yield proxy


@pytest.fixture(name="data_url")
def _data_url(tmp_path: Path, object_store: ObjectStore, bucket_url: str) -> str:
    """Return the URL of a folder with `SAMPLES`."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for name, text in SAMPLES.items():
        (folder / name).write_text(text, encoding="utf-8")
    return streams.upload(object_store, bucket_url, folder)


def wait_with(monkeypatch: pytest.MonkeyPatch, limit: float, on_pause: Callable[[], None] = lambda: None) -> list[str]:
    """Let the process wait without time, and call a function in each pause. Return the reported waits."""
    lines: list[str] = []

    def pause(_: float) -> bool:
        on_pause()
        return False

    quick = patience.Patience(lines.append, lambda: limit, lambda: 0.0, pause, lambda: 0.0)
    monkeypatch.setattr(patience, "_PROCESS", quick)
    return lines


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS.keys())
def test_an_outage_of_the_store_is_waited_for(
    proxy: FaultyStore, data_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Fault
) -> None:
    lines = wait_with(monkeypatch, 100, proxy.recover)
    proxy.fail(fault)
    folder = Path(fetch(data_url, "dataset.source", tmp_path / "cache", lambda _: None))
    assert {path.name: path.read_text(encoding="utf-8") for path in folder.iterdir()} == SAMPLES
    assert lines[0].startswith(f"dataset.source: fetching {data_url} failed (")
    assert lines[1:] == [""]


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS.keys())
def test_an_outage_that_lasts_is_a_network_error(
    proxy: FaultyStore, data_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Fault
) -> None:
    wait_with(monkeypatch, 0)
    proxy.fail(fault)
    with pytest.raises(NetworkError, match=r"dataset\.source: fetching s3://.* failed: .*tried once") as caught:
        fetch(data_url, "dataset.source", tmp_path / "cache", lambda _: None)
    assert caught.value.code is ExitCode.NETWORK


def open_store(bucket_url: str, folder: Path, attempt: int) -> BucketStore:
    store = BucketStore(Bucket(f"{bucket_url}/job"), folder, UID, attempt, Retention())
    store.open()
    return store


def test_an_outage_while_a_checkpoint_is_read(
    proxy: FaultyStore, bucket_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_store(bucket_url, tmp_path / "one", 1).save(SNAPSHOT, 0.0)
    store = open_store(bucket_url, tmp_path / "two", 2)
    wait_with(monkeypatch, 100, proxy.recover)
    for fault in (RESET, CUT):
        proxy.fail(fault)
        found, snapshot = choose_checkpoint(store, Role(0, (0,), own_disk=False), ALONE, lambda _: None)
        assert found is not None
        assert snapshot is not None
        assert snapshot.tensors["model"]["w"].tolist() == SNAPSHOT.tensors["model"]["w"].tolist()
    wait_with(monkeypatch, 0)
    proxy.fail(RESET)
    with pytest.raises(NetworkError, match=r"checkpoint storage: s3://.* cannot be listed") as caught:
        choose_checkpoint(store, Role(0, (0,), own_disk=False), ALONE, lambda _: None)
    assert caught.value.code is ExitCode.NETWORK
    # The outage has not marked the checkpoint as damaged.
    proxy.recover()
    assert store.num_corrupt() == 0


def test_an_outage_while_the_storage_is_opened(
    proxy: FaultyStore, bucket_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = BucketStore(Bucket(f"{bucket_url}/job"), tmp_path, UID, 1, Retention())
    lines = wait_with(monkeypatch, 100, proxy.recover)
    proxy.fail(RESET)
    assert open_storage(store, ALONE) == Role(0, (0,), own_disk=False)
    assert lines[0].startswith("checkpoint storage: opening failed (")
    assert store.save(SNAPSHOT, 0.0).manifest.step == SNAPSHOT.step


def test_a_file_system_that_fails_while_a_checkpoint_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No real disk fails once on demand, so a reader that fails once stands in for it."""
    store = FolderStore(tmp_path, UID, 1, Retention())
    store.open()
    found = store.save(SNAPSHOT, 0.0)
    lines = wait_with(monkeypatch, 100)
    read_text, failing = Path.read_text, {"state.json", "model.safetensors"}

    def fail_once(path: Path) -> None:
        if path.name in failing:
            failing.remove(path.name)
            raise OSError(errno.EIO, "Input/output error")

    def read_after_a_failure(path: Path, *args: Any, **options: Any) -> str:
        fail_once(path)
        return read_text(path, *args, **options)

    def load_after_a_failure(path: Path) -> dict[str, torch.Tensor]:
        fail_once(path)
        return load_file(path)

    monkeypatch.setattr(Path, "read_text", read_after_a_failure)
    monkeypatch.setattr(base, "load_file", load_after_a_failure)
    assert read_shards(found, store, READING)[1] == SNAPSHOT.values
    _, snapshot = choose_checkpoint(store, Role(0, (0,), own_disk=False), ALONE, lambda _: None)
    assert snapshot is not None
    assert snapshot.tensors["model"]["w"].tolist() == SNAPSHOT.tensors["model"]["w"].tolist()
    assert lines == ["checkpoint storage: reading failed ([Errno 5] Input/output error): try 2 in 0.5 s", ""] * 2


def test_pins_and_the_checkpoint_of_another_job_in_a_bucket(
    proxy: FaultyStore, bucket_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two attempts on separate machines pin a commit, and start from the other job's URL during an outage."""
    open_store(bucket_url, tmp_path / "one", 1).save(SNAPSHOT, 0.0)
    wait_with(monkeypatch, 100, proxy.recover)
    spec = tiny.make_spec(Path("base"), Path("data")).model_copy(update={"uid": "another"})
    source = CheckpointSource(url=f"{bucket_url}/job")
    own = Bucket(f"{bucket_url}/own")
    for number, commit in enumerate(("1" * 40, "2" * 40), start=1):
        machine = tmp_path / f"machine-{number}"
        proxy.fail(RESET)
        record = InputRecord.open("own", ALONE, PinStore(machine, own), Reporter(0, None))
        if number == 1:
            record.add_commit("model.base", "me/base", commit, ConfigError)
        assert record.revision("model.base", commit) == "1" * 40
        with pytest.raises(ConfigError, match=r"model\.base: me/base has changed since the job began"):
            record.add_commit("model.base", "me/base", "3" * 40, ConfigError)
        notes: list[str] = []
        earlier = EarlierWork(source, spec, JobFolders(machine, None, own), lambda: (), notes.append)
        earlier.check()
        found = earlier.find()
        assert found.manifest.step == SNAPSHOT.step
        (weights,) = found.folder.rglob("model.safetensors")
        assert load_file(weights)["w"].tolist() == SNAPSHOT.tensors["model"]["w"].tolist()
        assert notes == [
            f"checkpoint.from: training continues after step 4 of {source.url}/checkpoints/step-00000004-a1"
        ]
        earlier.release()
        assert not found.folder.exists()
    assert own.names() == ["inputs/model.base.commit.json"]
