"""Outputs in an object store, on a real S3 server: faults, kills at every point, and refusals before training."""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from finetune_contract import bucket, environment
from finetune_contract.bucket import Bucket, client_options
from finetune_contract.heartbeat import OutputState, UnfinishedOutput, WrittenOutput
from finetune_contract.outputs.spec import OutputSpec
from finetune_contract.spec import Method
from finetune_trainer.delivery.bucket_target import BucketTarget
from finetune_trainer.delivery.open import DeliveryPlace, open_target
from finetune_trainer.delivery.parts import s3
from finetune_trainer.delivery.parts.base import split
from finetune_trainer.delivery.staged import OutputRecord
from finetune_trainer.delivery.target import ExportStage
from finetune_trainer.errors import ConfigError, NetworkError
from finetune_trainer.export.outputs import Export, check_targets, deliver_outputs
from testing.controlplane.process import Guard, wait_for
from testing.hub import Fault
from testing.objectstore import faults, server
from testing.objectstore.faults import FaultyStore
from testing.objectstore.server import ObjectStore
from testing.trainer import killed_exports
from testing.trainer.killed_exports import FILES, PART_BYTES, contents, write_files

pytestmark = pytest.mark.trainer
MARKER = "job.diffusers.output.json"
NUM_PARTS = 3 + 1 + 1
"""Parts of the three files of the output."""


def output(url: str, **settings: Any) -> OutputSpec:
    return OutputSpec.model_validate({"format": "diffusers", "to": f"{url}/lora", **settings})


@pytest.fixture(name="folder")
def _folder(object_store: ObjectStore, bucket_url: str) -> Path:
    """The folder of the target on the server's disk: it contains what readers see."""
    return object_store.folder / bucket_url.removeprefix("s3://") / "lora"


def visible(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def pending(url: str) -> int:
    """Return the number of multipart uploads of a bucket that are not finished."""
    bucket = Bucket(f"{url}/lora")
    return len(bucket.client.call_s3("list_multipart_uploads", Bucket=url.removeprefix("s3://")).get("Uploads") or [])


def is_part(request: str, number: int) -> bool:
    """Return whether a request of the proxy uploads this part of the largest file."""
    return re.search(rf"PUT .*weights\.safetensors\?(.*&)?partNumber={number}(&|$)", request) is not None


def is_end(request: str) -> bool:
    """Return whether a request of the proxy completes the multipart upload of the largest file."""
    return re.search(r"POST .*weights\.safetensors\?(.*&)?uploadId=", request) is not None


def assert_complete(url: str, folder: Path) -> None:
    assert visible(folder) == sorted([*FILES, MARKER])
    for name in FILES:
        assert (folder / name).read_bytes() == contents(name)
    record = OutputRecord.model_validate_json((folder / MARKER).read_bytes())
    assert [(file.name, file.size_bytes) for file in record.files] == sorted(FILES.items())
    assert pending(url) == 0


def deliver(url: str, job_dir: Path, source: str = "step-1-a1", **export: Any) -> tuple[WrittenOutput, ...]:
    place = DeliveryPlace(job_dir, min_part_bytes=PART_BYTES)
    return deliver_outputs(lambda _, folder: write_files(folder), [output(url)], Export(place, "u", source, **export))


@pytest.fixture(name="proxy")
def _proxy(object_store: ObjectStore, bucket_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyStore]:
    """A proxy in front of the server, which clients of this process use."""
    del bucket_url
    with faults.serve(object_store) as (proxy, variables):
        for key, value in variables.items():
            monkeypatch.setenv(key, value)
        yield proxy


def test_uploads_survive_failing_requests(
    proxy: FaultyStore, bucket_url: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("finetune_trainer.patience._PROCESS.pause", lambda _: False)
    # Every third request fails. With the last one, the server has carried the request out, and its answer is lost.
    kinds = itertools.cycle([faults.SLOW_DOWN, Fault(500), faults.FAULTS["reset"], faults.FAULTS["cut"]])
    numbers = itertools.count(1)
    proxy.before_request = lambda _: proxy.fail(next(kinds), times=1) if next(numbers) % 3 == 0 else None
    (written,) = deliver(bucket_url, tmp_path / "job")
    proxy.before_request = lambda _: None
    proxy.recover()
    assert proxy.num_failed > 5
    assert (written.to, written.size_bytes) == (f"{bucket_url}/lora", sum(FILES.values()))
    assert_complete(bucket_url, folder)


@pytest.mark.parametrize("is_signed", [True, False])
def test_a_damaged_part_is_refused_and_sent_again(
    proxy: FaultyStore,
    bucket_url: str,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    *,
    is_signed: bool,
) -> None:
    """Without a hash in the signature, as over TLS, the Content-MD5 protects a part."""
    config = tmp_path / "aws-config"
    config.write_text(f"[default]\ns3 =\n  payload_signing_enabled = {str(is_signed).lower()}\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(config))
    monkeypatch.setattr("finetune_trainer.patience._PROCESS.pause", lambda _: False)
    damaged: list[str] = []

    def damage(request: str, body: bytes) -> bytes:
        if not is_part(request, 1) or damaged:
            return body
        damaged.append(request)
        return bytes([body[0] ^ 1]) + body[1:]

    proxy.change_body = damage
    deliver(bucket_url, tmp_path / "job")
    assert len(damaged) == 1
    assert proxy.num_parts == NUM_PARTS, "the damaged part was not stored"
    assert_complete(bucket_url, folder)


def test_each_part_is_hashed_once() -> None:
    def meta(url: str, version: str = "s3v4", **settings: object) -> SimpleNamespace:
        return SimpleNamespace(endpoint_url=url, config=SimpleNamespace(signature_version=version, s3=settings or None))

    assert s3.signs_contents(meta("http://store:9000"))
    assert s3.signs_contents(meta("http://store:9000", payload_signing_enabled=True))
    assert not s3.signs_contents(meta("http://store:9000", payload_signing_enabled=False))
    assert not s3.signs_contents(meta("http://store:9000", version="unsigned"))
    assert not s3.signs_contents(meta("https://s3.amazonaws.com"))


def test_the_client_adds_no_checksum_to_the_hash_of_a_part(bucket_url: str, tmp_path: Path) -> None:
    assert Bucket(bucket_url).client.s3.meta.config.request_checksum_calculation == "when_supported"
    target = open_target(0, output(bucket_url), DeliveryPlace(tmp_path))
    assert isinstance(target, BucketTarget)
    assert target._bucket.client.s3.meta.config.request_checksum_calculation == "when_required"


def test_silent_connections_are_given_up_and_their_requests_repeated(
    proxy: FaultyStore, bucket_url: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody answers one part and the end of an upload. Another part reaches the store after its repetition."""
    monkeypatch.setitem(bucket._OPTIONS, "s3", {"config_kwargs": {"connect_timeout": 4, "read_timeout": 4}})
    monkeypatch.setattr("finetune_trainer.patience._PROCESS.pause", lambda _: False)
    silenced: list[str] = []
    late: list[str] = []

    def hold(request: str) -> None:
        if is_part(request, 2):
            late.append(request)
            if len(late) == 1:
                wait_for("the part is repeated", lambda: len(late) > 1)
        elif (is_part(request, 1) or is_end(request)) and request not in silenced:
            silenced.append(request)
            proxy.fail(faults.FAULTS["silence"], times=1, only=request)

    proxy.before_request = hold
    deliver(bucket_url, tmp_path / "job")
    assert len(silenced) == proxy.num_failed == 2
    assert len(late) > 1
    assert_complete(bucket_url, folder)


def test_slow_parts_hold_up_no_other_parts_and_not_the_result(
    proxy: FaultyStore, bucket_url: str, folder: Path, tmp_path: Path
) -> None:
    """The first part reaches the store after all others."""
    held: list[str] = []

    def hold(request: str) -> None:
        if is_part(request, 1):
            held.append(request)
            wait_for("the other parts are stored", lambda: proxy.num_parts == NUM_PARTS - 1)

    proxy.before_request = hold
    deliver(bucket_url, tmp_path / "job")
    assert len(held) == 1
    assert proxy.num_parts == NUM_PARTS
    assert_complete(bucket_url, folder)


def test_a_kill_at_every_point_repeats_nothing(
    object_store: ObjectStore, bucket_url: str, folder: Path, tmp_path: Path
) -> None:
    job_dir = tmp_path / "job"
    outputs = [{"format": "diffusers", "to": f"{bucket_url}/lora"}, {"format": "diffusers", "to": "copy"}]
    with (
        faults.serve(object_store) as (proxy, variables),
        killed_exports.start(job_dir, outputs, variables) as exports,
    ):
        kills = [
            (ExportStage.WRITE, 1),
            (ExportStage.WRITTEN, 1),
            (ExportStage.RECORDED, 1),
            (ExportStage.UPLOAD, 2),
            (ExportStage.UPLOAD, 1),
            (ExportStage.UPLOADED, 1),
            (ExportStage.PUBLISH, 1),
            (ExportStage.PUBLISH, 2),
            (ExportStage.PUBLISHED, 1),
            (ExportStage.UPLOADED, 1),
            (ExportStage.PUBLISHED, 1),
        ]
        for number, (stage, nth) in enumerate(kills):
            assert exports.run(stage, nth) == -signal.SIGKILL, (number, stage)
            seen = visible(folder)
            if number <= kills.index((ExportStage.UPLOADED, 1)):
                assert seen == []
            for name in seen:
                assert name == MARKER or (folder / name).read_bytes() == contents(name)
        assert exports.run() == 0
        assert exports.num_writes == 2, "once before the record existed, and once more after it was lost"
        assert proxy.num_parts == NUM_PARTS
        before = proxy.num_parts
        assert exports.run() == 0
        assert (proxy.num_parts, exports.num_writes) == (before, 2), "a finished export is not repeated"
    assert_complete(bucket_url, folder)
    for name in FILES:
        assert (job_dir / "outputs" / "copy" / name).read_bytes() == contents(name)
    assert sorted(path.name for path in (job_dir / "outputs").iterdir()) == ["copy"]


def test_a_kill_within_a_request_leaves_no_partial_object(
    object_store: ObjectStore, bucket_url: str, folder: Path, tmp_path: Path
) -> None:
    outputs = [{"format": "diffusers", "to": f"{bucket_url}/lora"}]
    running = 0

    def started(pid: int) -> None:
        nonlocal running
        running = pid

    with (
        faults.serve(object_store) as (proxy, variables),
        killed_exports.start(tmp_path / "job", outputs, variables) as exports,
    ):
        exports.on_start = started
        victim = "PUT"

        def kill(request: str) -> None:
            if victim in request and running:
                os.kill(running, signal.SIGKILL)

        proxy.before_request = kill
        for victim in ("partNumber=2", "uploadId=", MARKER):
            running = 0
            assert exports.run() == -signal.SIGKILL, victim
            assert MARKER not in visible(folder)
        proxy.before_request = lambda _: None
        assert exports.run() == 0
        assert exports.num_writes == 1
    assert_complete(bucket_url, folder)


def test_an_upload_of_other_weights_is_not_continued(bucket_url: str, folder: Path, tmp_path: Path) -> None:
    def stop(stage: ExportStage) -> None:
        if stage is ExportStage.UPLOADED:
            raise KeyboardInterrupt

    def other(_: OutputSpec, folder: Path) -> Iterator[Path]:
        for path in write_files(folder):
            path.write_bytes(path.read_bytes()[::-1])
            yield path

    place = DeliveryPlace(tmp_path / "first", min_part_bytes=PART_BYTES)
    with pytest.raises(KeyboardInterrupt):
        deliver_outputs(other, [output(bucket_url)], Export(place, "u", "step-1-a1", on_stage=stop))
    assert pending(bucket_url) == len(FILES)
    deliver(bucket_url, tmp_path / "second")
    assert_complete(bucket_url, folder)


def test_a_newer_output_replaces_the_earlier_one(bucket_url: str, folder: Path, tmp_path: Path) -> None:
    def earlier(_: OutputSpec, folder: Path) -> list[Path]:
        (folder / "old.bin").write_bytes(b"old")
        return [folder / "old.bin"]

    deliver_outputs(earlier, [output(bucket_url)], Export(DeliveryPlace(tmp_path), "u", "step-1-a1"))
    assert visible(folder) == [MARKER, "old.bin"]
    deliver(bucket_url, tmp_path, "step-2-a1")
    assert_complete(bucket_url, folder)


def test_states_and_hashes_are_reported(bucket_url: str, tmp_path: Path) -> None:
    seen: list[tuple[tuple[WrittenOutput, ...], tuple[UnfinishedOutput, ...]]] = []
    (written,) = deliver(bucket_url, tmp_path / "job", report=lambda *board: seen.append(board))
    states = [unfinished[0].state for finished, unfinished in seen if not finished]
    assert list(dict.fromkeys(states)) == [OutputState.WRITING, OutputState.UPLOADING]
    done = [unfinished[0].done_bytes for finished, unfinished in seen if unfinished]
    assert done == sorted(done) and done[-1] == written.size_bytes
    assert seen[-1] == ((written,), ())
    assert written.sha256 is not None and len(written.sha256) == 64


@pytest.fixture(scope="module")
def read_only(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectStore]:
    """An S3 server that refuses all writes."""
    guard = Guard()
    try:
        yield server.start(tmp_path_factory.mktemp("read-only"), guard, read_only=True)
    finally:
        guard.close()


def refusal(url: str, tmp_path: Path, **settings: Any) -> str:
    place = DeliveryPlace(tmp_path / "job", secrets=tmp_path / "secrets")
    with pytest.raises(ConfigError, match=r"^outputs\[0\]\.") as caught:
        check_targets([output(url, **settings)], place)
    return str(caught.value)


def test_a_bucket_without_permission_is_refused_before_training(
    read_only: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in read_only.environment.items():
        monkeypatch.setenv(name, value)
    message = refusal(read_only.make_bucket("models"), tmp_path)
    assert "outputs[0].to: s3://models/lora cannot be written: " in message
    assert "Access Denied" in message
    assert message.endswith("give the credentials of the target in outputs[].secret or spec.secrets")


def test_other_refusals_before_training(bucket_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "The specified bucket does not exist" in refusal("s3://not-a-bucket", tmp_path)
    Bucket(bucket_url).put("lora", b"a file")
    assert refusal(bucket_url, tmp_path) == (
        f"outputs[0].to: {bucket_url}/lora is the name of an object; write a folder, e.g. {bucket_url}/lora-outputs"
    )
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    assert "outputs[].secret" in refusal(bucket_url, tmp_path)


def test_credentials_of_a_secret_replace_those_of_the_environment(
    object_store: ObjectStore, bucket_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = tmp_path / "secrets" / "models-writer"
    (secret / "..data").mkdir(parents=True)
    assert "contains no keys" in refusal(bucket_url, tmp_path, secret={"name": "models-writer"})
    for name, value in object_store.environment.items():
        monkeypatch.delenv(name, raising=False)
        (secret / name).write_text(f"{value}\n")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    check_targets(
        [output(bucket_url, secret={"name": "models-writer"})],
        DeliveryPlace(tmp_path / "job", secrets=tmp_path / "secrets"),
    )


def test_an_output_of_another_job_is_not_replaced(bucket_url: str, tmp_path: Path) -> None:
    other = DeliveryPlace(tmp_path / "other", job="other", min_part_bytes=PART_BYTES)
    deliver_outputs(lambda _, folder: write_files(folder), [output(bucket_url)], Export(other, "o", "step-1-a1"))
    message = refusal(bucket_url, tmp_path)
    assert message == (
        f"outputs[0].to: {bucket_url}/lora holds an output of another job, default/other, whose files would be "
        "replaced; write another folder, or delete that output"
    )
    with pytest.raises(ConfigError, match="holds an output of another job, default/other"):
        deliver(bucket_url, tmp_path / "job")
    # Another format with the same files.
    with pytest.raises(ConfigError, match="holds an output of another job, default/other"):
        check_targets([output(bucket_url, format="merged")], DeliveryPlace(tmp_path), Method.LORA)
    # The same job, created again, replaces its output.
    deliver_outputs(lambda _, folder: write_files(folder), [output(bucket_url)], Export(other, "o2", "step-9-a1"))


def test_files_named_after_their_jobs_share_a_folder_of_a_bucket(bucket_url: str, tmp_path: Path) -> None:
    def write(_: OutputSpec, folder: Path) -> list[Path]:
        (folder / "one.safetensors").write_bytes(b"one")
        return [folder / "one.safetensors"]

    kohya = output(bucket_url, format="kohya")
    deliver_outputs(write, [kohya], Export(DeliveryPlace(tmp_path / "one", job="one"), "o", "step-1-a1"))
    check_targets([kohya], DeliveryPlace(tmp_path, job="two"), Method.LORA)
    check_targets([output(bucket_url)], DeliveryPlace(tmp_path, job="two"), Method.LORA)
    # A job of another namespace can have the same name, and then its file has the same name.
    with pytest.raises(ConfigError, match="holds an output of another job, default/one"):
        check_targets([kohya], DeliveryPlace(tmp_path, "team-b", "one"), Method.LORA)


def test_an_outage_is_waited_out_by_the_check(
    proxy: FaultyStore, bucket_url: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(environment.RETRY_SECONDS, "0")
    # The library's own retries take seconds.
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setattr("s3fs.core.S3FileSystem.retries", 1)
    proxy.fail(faults.SLOW_DOWN)
    with pytest.raises(NetworkError, match=r"^outputs\[0\]\.to: checking s3://.*reduce your request"):
        check_targets([output(bucket_url)], DeliveryPlace(tmp_path))
    proxy.recover()
    check_targets([output(bucket_url)], DeliveryPlace(tmp_path))
    assert visible(folder) == []
    assert pending(bucket_url) == 0


def test_parts_cover_a_file() -> None:
    for size, max_parts in ((0, 32), (1, 32), (100, 32), (101, 4), (10_000, 7)):
        parts = split(size, max_parts, min_part_bytes=10)
        assert len(parts) <= max_parts
        assert [part.number for part in parts] == list(range(1, len(parts) + 1))
        ends = [part.start + part.size_bytes for part in parts]
        assert [part.start for part in parts] == [0, *ends[:-1]]
        assert ends[-1] == size


def test_secrets_have_the_variables_of_the_stores_own_tools() -> None:
    aws = {"AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "s", "AWS_ENDPOINT_URL": "http://h", "AWS_REGION": "r"}
    assert client_options("s3", aws) == {
        "key": "k",
        "secret": "s",
        "endpoint_url": "http://h",
        "client_kwargs": {"region_name": "r"},
    }
    account = {"type": "service_account", "project_id": "p"}
    assert client_options("gs", {"key.json": json.dumps(account)}) == {"token": account}
    azure = {"AZURE_STORAGE_ACCOUNT_NAME": "a", "AZURE_STORAGE_ACCOUNT_KEY": "k", "AZURE_CLIENT_ID": "c", "OTHER": "x"}
    assert client_options("az", azure) == {"account_name": "a", "account_key": "k", "client_id": "c"}
