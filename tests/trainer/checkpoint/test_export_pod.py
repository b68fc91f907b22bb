"""The process of an export pod: what it writes, what it reports, and that it repeats nothing."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from finetune_contract import environment
from finetune_contract.bucket import Bucket
from finetune_contract.exit_codes import ExitCode
from finetune_contract.outputs.pictures import FOLDER
from finetune_contract.outputs.request import ExportResult
from finetune_contract.outputs.spec import OutputSpec
from finetune_contract.run_spec import RunSpec
from finetune_trainer import export_pod
from finetune_trainer.errors import StorageError
from finetune_trainer.export import outputs
from finetune_trainer.export.formats.write import write_format
from finetune_trainer.export.from_checkpoint import export_outputs
from finetune_trainer.script.outputs import ScriptRecord
from testing.objectstore import faults
from testing.objectstore.server import ObjectStore
from testing.trainer import killed_exports, tiny
from testing.trainer.methods import make_method
from tests.trainer.checkpoint.test_export import fill, save

pytestmark = pytest.mark.trainer


@pytest.fixture
def spec(base: Path, tmp_path: Path) -> RunSpec:
    """A run with checkpoints of the steps 5 and 6."""
    spec = tiny.make_spec(base, tmp_path, method="LoRA", steps=6, lora={"rank": 2})
    method = make_method(base, "LoRA", lora={"rank": 2})
    for step in (5, 6):
        fill(method, float(step))
        save(tmp_path / "job", spec, method, step)
    return spec


def start(spec: RunSpec, folder: Path, request: dict[str, Any]) -> tuple[int, ExportResult]:
    """Run the pod's process; return its exit code and its termination message."""
    (folder / "run.json").write_text(spec.to_json())
    message = folder / "termination"
    env = {
        environment.RUN_SPEC: str(folder / "run.json"),
        environment.EXPORT: json.dumps(request),
        environment.CHECKPOINT_DIR: str(folder / "job"),
        environment.CACHE_DIR: str(folder / "cache"),
        environment.TERMINATION_LOG: str(message),
    }
    code, result = export_pod.run(env)
    export_pod.write_result(str(message), result)
    return code, ExportResult.model_validate_json(message.read_text())


def test_it_writes_the_requested_step_and_repeats_nothing(
    spec: RunSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, newest = tmp_path / "out", tmp_path / "newest"
    files = {"format": "diffusers", "to": str(target)}
    request = {"id": "r1", "step": 5, "outputs": [files, {"format": "kohya", "to": "kohya"}]}
    code, result = start(spec, tmp_path, request)
    assert (code, result.step, result.message) == (ExitCode.DONE, 5, None)
    assert [each.index for each in result.outputs] == [0, 1]
    sizes = [sum(path.stat().st_size for path in folder.rglob("*.safetensors")) for folder in _folders(tmp_path)]
    assert all(each.size_bytes >= size > 0 for each, size in zip(result.outputs, sizes, strict=True))
    before = {path: path.stat().st_mtime_ns for folder in _folders(tmp_path) for path in folder.rglob("*")}

    def write_nothing(*_: Any) -> Any:
        raise AssertionError("the outputs are complete")

    monkeypatch.setattr(outputs, "write_format", write_nothing)
    assert start(spec, tmp_path, request) == (code, result)
    assert {path: path.stat().st_mtime_ns for folder in _folders(tmp_path) for path in folder.rglob("*")} == before
    monkeypatch.undo()
    assert start(spec, tmp_path, {"outputs": [files | {"to": str(newest)}]})[1].step == 6
    (first,), (second,) = (list(folder.glob("*.safetensors")) for folder in (target, newest))
    assert first.read_bytes() != second.read_bytes()


def _folders(folder: Path) -> list[Path]:
    return [folder / "out", folder / "job" / "outputs" / "kohya"]


def test_a_missing_step_names_those_that_are_kept(spec: RunSpec, tmp_path: Path) -> None:
    code, result = start(spec, tmp_path, {"step": 7, "outputs": [{"format": "kohya", "to": "kohya"}]})
    assert code == ExitCode.CONFIG
    assert result.message == "step: the job has no checkpoint of step 7; write one of the kept ones: 5, 6"


def test_a_failed_output_does_not_hide_a_complete_one(
    spec: RunSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = write_format

    def fail_kohya(trained: Any, output: Any, *rest: Any) -> Any:
        if output.format == "kohya":
            raise StorageError("outputs: no space left on device")
        return real(trained, output, *rest)

    monkeypatch.setattr(outputs, "write_format", fail_kohya)
    wanted = [{"format": "diffusers", "to": "diffusers"}, {"format": "kohya", "to": "kohya"}]
    code, result = start(spec, tmp_path, {"outputs": wanted})
    assert code == ExitCode.STORAGE
    assert result.message == "outputs: no space left on device"
    complete, failed = result.outputs
    assert (complete.error, failed.error) == (None, "outputs: no space left on device")
    assert complete.size_bytes > 0


def test_a_job_without_checkpoints_and_a_script_without_result_are_refused(base: Path, tmp_path: Path) -> None:
    spec = tiny.make_spec(base, tmp_path, method="LoRA", steps=6)
    request = {"outputs": [{"format": "diffusers", "to": "out"}]}
    assert start(spec, tmp_path, request)[1].message == "the job has no complete checkpoint that could be exported"
    training = {"script": {"path": "train.py"}}
    script = RunSpec.model_validate(spec.model_dump(by_alias=True) | {"training": training})
    code, result = start(script, tmp_path, request)
    assert code == ExitCode.CONFIG
    assert result.message == "the script of the job has not ended yet: nothing can be exported"


def test_files_of_a_script_are_written(base: Path, tmp_path: Path) -> None:
    plain = tiny.make_spec(base, tmp_path, method="LoRA", steps=6)
    training = {"script": {"path": "train.py"}}
    spec = RunSpec.model_validate(plain.model_dump(by_alias=True) | {"training": training})
    result_folder = tmp_path / "result"
    result_folder.mkdir()
    (result_folder / "weights.bin").write_bytes(b"12345")
    ScriptRecord(str(result_folder), {"base": str(base)}, 3, "script-3-ab").write(tmp_path / "job")
    code, result = start(spec, tmp_path, {"outputs": [{"format": "asWritten", "to": "copy"}]})
    assert (code, result.step) == (ExitCode.DONE, 3)
    assert (tmp_path / "job/outputs/copy/weights.bin").read_bytes() == b"12345"


def test_a_long_result_fits_into_a_termination_message(tmp_path: Path) -> None:
    entry = {"error": "e" * 1000}
    result = ExportResult.model_validate({"outputs": [entry | {"index": i} for i in range(8)], "message": "m" * 1000})
    export_pod.write_result(str(tmp_path / "log"), result)
    text = (tmp_path / "log").read_bytes()
    assert len(text) <= 4096
    assert [each.index for each in ExportResult.model_validate_json(text).outputs] == list(range(8))


def test_pods_that_are_killed_while_they_fetch_and_deliver_repeat_no_upload(
    base: Path, object_store: ObjectStore, bucket_url: str, tmp_path: Path
) -> None:
    """Checkpoints and outputs are in a bucket. Each pod starts with an empty disk, as on another node."""
    spec = tiny.make_spec(base, tmp_path, method="LoRA", steps=6, lora={"rank": 2})
    (tmp_path / "run.json").write_text(spec.to_json())
    of_job = f"{bucket_url}/default/tiny-1f0c3a2b"
    method = make_method(base, "LoRA", lora={"rank": 2})
    for step in (5, 6):
        fill(method, float(step))
        save(tmp_path / "fetched", spec, method, step, bucket=Bucket(of_job))
        save(tmp_path / "local", spec, method, step)
    pictures = tmp_path / "cache" / FOLDER
    pictures.mkdir(parents=True)
    for step in (0, 5, 6):
        Image.new("RGB", (16, 16), (step, 0, 0)).save(pictures / f"step-{step:08}-00.png")
        Bucket(of_job).below(FOLDER).upload(f"step-{step:08}-00.png", pictures / f"step-{step:08}-00.png")
    # One output below the folder of the job, one elsewhere.
    wanted = [{"format": "kohya", "to": "kohya"}, {"format": "diffusers", "to": f"{bucket_url}/lora"}]
    with faults.serve(object_store) as (proxy, variables):
        env = {
            **variables,
            environment.RUN_SPEC: str(tmp_path / "run.json"),
            environment.EXPORT: json.dumps({"id": "r1", "step": 5, "outputs": wanted}),
            environment.CACHE_DIR: str(tmp_path / "cache"),
            environment.BUCKET: of_job,
            environment.TERMINATION_LOG: str(tmp_path / "termination"),
        }
        with killed_exports.start_pods(env) as pods:
            running, victim, uploaded = 0, "", list[str]()

            def begin(pid: int) -> None:
                nonlocal running
                running = pid

            def watch(request: str) -> None:
                if victim and running and re.search(victim, request):
                    os.kill(running, signal.SIGKILL)
                elif "partNumber=" in request and ".probe-" not in request:
                    uploaded.append(request.partition("?")[0])

            pods.on_start, proxy.before_request = begin, watch
            for number, victim in enumerate(
                (
                    r"GET .*step-00000005-a1/.*model.*safetensors",
                    r"PUT .*kohya/tiny\.safetensors\?.*partNumber",
                    r"POST .*lora/README\.md\?.*uploadId=",
                    r"PUT .*lora/tiny\.diffusers\.output\.json",
                )
            ):
                running = 0
                assert pods.run_pod(tmp_path / f"pod-{number}") == -signal.SIGKILL, victim
            victim = ""
            assert pods.run_pod(tmp_path / "pod-last") == ExitCode.DONE
    result = ExportResult.model_validate_json((tmp_path / "termination").read_text())
    assert (result.step, [each.index for each in result.outputs]) == (5, [0, 1])
    # -- each file was sent once, and is that of the same export from a folder
    assert sorted(uploaded) == sorted(set(uploaded))
    bucket = object_store.folder / bucket_url.removeprefix("s3://")
    (checkpoint,) = (tmp_path / "local" / "checkpoints").glob("step-00000005-*")
    expected = [OutputSpec.model_validate({**each, "to": str(tmp_path / each["format"])}) for each in wanted]
    export_outputs(spec, checkpoint, expected, tmp_path / "cache")
    for each, folder in ((wanted[0], bucket / "default/tiny-1f0c3a2b/outputs/kohya"), (wanted[1], bucket / "lora")):
        found = {path.name: path.read_bytes() for path in folder.rglob("*") if not path.name.endswith(".output.json")}
        local = tmp_path / each["format"]
        assert ("samples.png" in found) == (each["format"] == "diffusers")
        assert found == {path.name: path.read_bytes() for path in local.rglob("*") if not path.name.startswith(".")}
    uploads = Bucket(bucket_url + "/x").client.call_s3("list_multipart_uploads", Bucket=bucket.name).get("Uploads")
    assert not uploads
