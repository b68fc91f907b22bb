"""Bad manifests are refused before anything starts: exit code 2, a message with the field, and no files."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from finetune_operator.cli.main import main
from tests.cli.harness import CliHarness

Change = Callable[[dict[str, Any], Path], object]


def put(path: str, value: Any) -> Change:
    """Set a field of spec."""

    def change(document: dict[str, Any], _: Path) -> None:
        parent = document["spec"]
        *names, last = path.split(".")
        for name in names:
            parent = parent.setdefault(name, {})
        parent[last] = value

    return change


def drop(path: str) -> Change:
    """Remove a field of spec."""

    def change(document: dict[str, Any], _: Path) -> None:
        parent = document["spec"]
        *names, last = path.split(".")
        for name in names:
            parent = parent[name]
        del parent[last]

    return change


def top(field: str, value: Any) -> Change:
    return lambda document, _: document.update({field: value})


def metadata(text: str) -> Change:
    """Write another metadata.jsonl."""
    return lambda _, folder: (folder / "data/train/metadata.jsonl").write_text(text)


def row(**columns: Any) -> Change:
    return metadata(json.dumps(columns) + "\n")


def make_pickle(document: dict[str, Any], folder: Path) -> None:
    (folder / "model.bin").write_bytes(b"x")
    document["spec"]["model"]["base"] = "model.bin"


def make_single_file(document: dict[str, Any], folder: Path) -> None:
    (folder / "model.gguf").write_bytes(b"x")
    document["spec"]["model"]["base"] = "model.gguf"


def make_output_file(document: dict[str, Any], folder: Path) -> None:
    (folder / "out").write_text("")
    document["spec"]["outputs"] = [{"format": "diffusers", "to": "out"}]


CASES: dict[str, tuple[Change, str, str]] = {
    # name: (change of a good manifest, field in the message, text in the message)
    "no kind": (lambda document, _: document.pop("kind"), "kind", "FineTuneJob"),
    "another kind": (top("kind", "PyTorchJob"), "kind", "FineTuneJob"),
    "another version": (top("apiVersion", "finetune-operator.io/v9"), "apiVersion", "v1alpha1"),
    "no spec": (lambda document, _: document.pop("spec"), "spec", ""),
    "no name": (top("metadata", {}), "metadata.name", ""),
    "bad name": (top("metadata", {"name": "My Job"}), "metadata.name", ""),
    "name with parent folders": (top("metadata", {"name": "../../x"}), "metadata.name", ""),
    "long name": (top("metadata", {"name": "x" * 60}), "metadata.name", ""),
    "no model": (drop("model"), "spec.model", ""),
    "no base": (put("model", {}), "spec.model.base", ""),
    "no dataset": (drop("dataset"), "spec.dataset", ""),
    "no training": (drop("training"), "spec.training", ""),
    "unknown field": (put("training.stepz", 5), "spec.training.stepz", "steps"),
    "unknown method": (put("training.method", "Magic"), "spec.training.method", "LoRA"),
    "no method": (drop("training.method"), "spec.training", "method"),
    "method and script": (put("training.script", {"path": "train.py"}), "spec.training", "script"),
    "a script": (put("training", {"script": {"path": "train.py"}}), "spec.training.script", "train.py does not exist"),
    "no length": (drop("training.steps"), "spec.training", "steps"),
    "two lengths": (put("training.epochs", 3), "spec.training", "epochs"),
    "no steps": (put("training.steps", 0), "spec.training.steps", "1"),
    "steps as text": (put("training.steps", "many"), "spec.training.steps", "integer"),
    "batch of zero": (put("training.batchSize", 0), "spec.training.batchSize", "1"),
    "half a batch": (put("training.batchSize", 1.5), "spec.training.batchSize", "integer"),
    "negative accumulation": (put("training.gradientAccumulation", -1), "spec.training.gradientAccumulation", "1"),
    "learning rate of zero": (put("training.learningRate", 0), "spec.training.learningRate", "0"),
    "learning rate not a number": (put("training.learningRate", float("nan")), "spec.training.learningRate", ""),
    "unknown schedule": (put("training.lrScheduler", "wavy"), "spec.training.lrScheduler", "cosine"),
    "unknown precision": (put("training.precision", "fp8"), "spec.training.precision", "bf16"),
    "precision for GPUs only": (put("training.precision", "fp16"), "spec.training.precision", "bf16"),
    "odd resolution": (put("training.resolution", 100), "spec.training.resolution", "8"),
    "optimizer for GPUs only": (put("training.optimizer", "adamw8bit"), "spec.training.optimizer", "adamw"),
    "settings of another method": (
        put("training.dreambooth", {"instancePrompt": "a dog"}),
        "spec.training.dreambooth",
        "",
    ),
    "rank of zero": (put("training.lora", {"rank": 0}), "spec.training.lora.rank", "1"),
    "more ranks than cores": (put("topology.nodes", 999), "spec.topology.nodes", "cores"),
    "more processes than cores": (put("topology.processesPerNode", 64), "spec.topology.processesPerNode", "cores"),
    "no GPU": (put("topology.accelerator", "gpu"), "spec.topology.accelerator", "accelerator: cpu"),
    "nodes and minNodes": (put("topology.minNodes", 1), "spec.topology", "minNodes"),
    "GPUs on CPUs": (put("topology.resources", {"nvidia.com/gpu": 1}), "spec.topology", "nvidia.com/gpu"),
    "two storages": (
        put("checkpoint.storage", {"hostPath": {"path": "/x"}, "persistentVolumeClaim": {"claimName": "x"}}),
        "spec.checkpoint.storage",
        "",
    ),
    "relative storage": (
        put("checkpoint.storage", {"hostPath": {"path": "here"}}),
        "spec.checkpoint.storage.hostPath.path",
        "absolute",
    ),
    "nfs": (
        put("checkpoint.storage", {"nfs": {"server": "nas", "path": "/x"}}),
        "spec.checkpoint.storage.nfs",
        "hostPath",
    ),
    "two intervals": (put("checkpoint.interval", {"steps": 5, "seconds": 5}), "spec.checkpoint.interval", ""),
    "keep none": (put("checkpoint.keep", 0), "spec.checkpoint.keep", "1"),
    "duration as text": (put("recovery.hangTimeout", "a while"), "spec.recovery.hangTimeout", "10m"),
    "negative failures": (put("recovery.maxFailures", -1), "spec.recovery.maxFailures", "0"),
    "queue": (put("queueName", "team"), "spec.queueName", "leave the queue out"),
    "image of the model": (
        put("model", {"base": "/finetune/model", "image": {"reference": "registry.example.com/sdxl:1.0"}}),
        "spec.model.image",
        "write their folder as base, and leave image out",
    ),
    "claim for GPUs": (
        put("topology", {"accelerator": "gpu", "gpuClaimTemplateName": "gpus"}),
        "spec.topology.gpuClaimTemplateName",
        "leave gpuClaimTemplateName out",
    ),
    "another manager": (put("managedBy", "example.org/other"), "spec.managedBy", "leave managedBy out"),
    "suspended": (put("suspend", True), "spec.suspend", "leave suspend out"),
    "unknown output": (put("outputs", [{"format": "gguf", "to": "out"}]), "spec.outputs[0].format", "diffusers"),
    "output without a target": (put("outputs", [{"format": "diffusers"}]), "spec.outputs[0].to", ""),
    "output over a file": (make_output_file, "spec.outputs[0].to", "folder"),
    "template": (put("podTemplate", {"spec": {"containers": [{"image": "x"}]}}), "spec.podTemplate", "name"),
    "missing base": (put("model.base", "nowhere"), "spec.model.base", "does not exist"),
    "missing base below a folder": (put("model.base", "data/nowhere"), "spec.model.base", "does not exist"),
    "base that is not a model": (put("model.base", "data"), "spec.model.base", "model_index.json"),
    "pickle": (make_pickle, "spec.model.base", "safetensors"),
    "single file": (make_single_file, "spec.model.base", "single file"),
    "missing vae": (put("model.vae", "./vae"), "spec.model.vae", "does not exist"),
    "missing data set": (put("dataset.source", "./nowhere"), "spec.dataset.source", "metadata.jsonl"),
    "data set without metadata": (put("dataset.source", "model"), "spec.dataset.source", "metadata.jsonl"),
    "data set that is a file": (put("dataset.source", "job.yaml"), "spec.dataset.source", "folder"),
    "wrong split": (put("dataset.split", "test"), "spec.dataset.split", "train"),
    "wrong validation split": (put("training.validation", {"split": "val"}), "spec.training.validation.split", "train"),
    "wrong caption column": (
        put("dataset.columns.caption", "label"),
        "spec.dataset.columns.caption",
        "file_name, text",
    ),
    "wrong image column": (row(picture="a.png", text="x"), "spec.dataset.columns.image", "picture, text"),
    "wrong conditioning column": (
        put("dataset.columns.conditioning", "edges"),
        "spec.dataset.columns.conditioning",
        "file_name, text",
    ),
    "empty caption": (row(file_name="0.png", text=" "), "spec.dataset.columns.caption", "empty"),
    "caption that is not text": (row(file_name="0.png", text=7), "spec.dataset.columns.caption", "texts"),
    "missing image": (row(file_name="gone.png", text="x"), "spec.dataset.source", "gone.png"),
    "line that is not JSON": (metadata("a.png, a circle\n"), "spec.dataset.source", "line 1"),
    "line that is not an object": (metadata("[1]\n"), "spec.dataset.source", "line 1"),
    "no samples": (metadata("\n\n"), "spec.dataset.source", "no samples"),
}


@dataclass(frozen=True)
class CommandResult:
    returncode: int
    stdout: str
    stderr: str


class InProcessCommand:
    """Calls the command in this process: the many refusals then take milliseconds each."""

    def __init__(self, harness: CliHarness, capture: pytest.CaptureFixture[str]) -> None:
        self._bed = harness
        self._capture = capture

    def __call__(self, command: str, *arguments: str) -> CommandResult:
        with pytest.raises(SystemExit) as end:
            main([command, *arguments, "--home", str(self._bed.home.path)])
        out, err = self._capture.readouterr()
        assert isinstance(end.value.code, int)
        return CommandResult(end.value.code, out, err)

    def run(self, *arguments: str) -> CommandResult:
        return self("run", str(self._bed.manifest), *arguments)


@pytest.fixture
def finetune(harness: CliHarness, capsys: pytest.CaptureFixture[str]) -> InProcessCommand:
    return InProcessCommand(harness, capsys)


@pytest.mark.parametrize(("change", "field", "text"), CASES.values(), ids=CASES.keys())
def test_a_bad_manifest_is_refused_with_a_message(
    harness: CliHarness, finetune: InProcessCommand, change: Change, field: str, text: str
) -> None:
    change(harness.document, harness.folder)
    harness.write()
    result = finetune.run()
    assert result.returncode == 2, result.stdout
    messages = [line for line in result.stderr.splitlines() if f": {field}" in line]
    assert messages, result.stderr
    assert text in messages[0]
    assert result.stderr.startswith(f"finetune: {harness.manifest}: ")
    assert "Traceback" not in result.stderr
    assert result.stdout == ""
    assert not harness.home.path.exists()


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "contains 0 documents"),
        (b"kind: FineTuneJob\n---\nkind: FineTuneJob\n", "contains 2 documents"),
        (b"kind: [", "is not valid YAML: line 1"),
        (b"kind: a\nkind: b\n", "duplicate key 'kind'"),
        (b"- 1\n", "contains a list, not an object with kind: FineTuneJob"),
        (b"\xff\xfe", "is not text"),
        (b"a: &a [*a]\n", "kind"),
        (b"x: !!python/object/apply:os.system [id]\n", "is not valid YAML"),
    ],
    ids=["empty", "two", "cut", "twice", "list", "bytes", "cycle", "code"],
)
def test_a_file_that_is_not_a_manifest_is_refused(
    harness: CliHarness, finetune: InProcessCommand, content: bytes, text: str
) -> None:
    harness.manifest.write_bytes(content)
    result = finetune.run()
    assert result.returncode == 2
    assert text in result.stderr
    assert "Traceback" not in result.stderr
    assert not harness.home.path.exists()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--preempt", "rank=1"], "at-step"),
        (["--preempt", "rank=x,at-step=4"], "whole number"),
        (["--preempt", "rank=2,at-step=4"], "rank 2 does not exist; the job's ranks are 0 to 1"),
        (["--kill", "node=1,at-step=4"], "unknown key 'node'"),
        (["--kill", "rank=0,at-state=Sleeping"], "Training"),
        (["--kill", "rank=0,at-step=4,at-state=Saving"], "one of"),
        (["--set", "training.steps"], "FIELD=VALUE"),
        (["--set", "training.steps=[1"], "--set"),
        (["--set", "training.steps.more=1"], "training.steps has no fields"),
        (["--set", "training.stepz=1"], "spec.training.stepz"),
    ],
)
def test_bad_arguments_are_refused(
    harness: CliHarness, finetune: InProcessCommand, arguments: list[str], text: str
) -> None:
    result = finetune.run(*arguments)
    assert result.returncode == 2
    assert text in result.stderr
    assert not harness.home.path.exists()


def test_a_missing_file_is_refused(harness: CliHarness) -> None:
    result = harness.call("run", "nowhere.yaml")
    assert (result.returncode, result.stderr) == (2, "finetune: nowhere.yaml does not exist\n")
    assert harness.call("run", ".").returncode == 2


@pytest.mark.parametrize("command", ["describe", "logs", "delete", "get"])
@pytest.mark.parametrize("name", ["nothing", "../..", "/etc"])
def test_a_missing_job_is_refused(finetune: InProcessCommand, command: str, name: str) -> None:
    result = finetune(command, name)
    assert result.returncode == 2
    assert result.stderr
    assert "Traceback" not in result.stderr
