"""Outputs of checkpoints: `finetune export` writes the weights of the checkpoint, whole or sharded, average or not."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from finetune_contract import paths
from finetune_contract.bucket import Bucket
from finetune_contract.exit_codes import ExitCode
from finetune_contract.heartbeat import WrittenOutput
from finetune_contract.outputs.spec import OutputSpec
from finetune_contract.run_spec import RunSpec
from finetune_operator.cli.commands.export import export
from finetune_operator.cli.errors import Exit, UsageError
from finetune_operator.cli.main import parser
from finetune_trainer.checkpoint.sharded_state import make_sharded_state
from finetune_trainer.checkpoint.state import TrainState
from finetune_trainer.checkpoint.store.base import CheckpointStore
from finetune_trainer.checkpoint.store.bucket import BucketStore
from finetune_trainer.checkpoint.store.folder import FolderStore
from finetune_trainer.checkpoint.store.retention import Retention
from finetune_trainer.delivery.open import DeliveryPlace
from finetune_trainer.distributed.world import World
from finetune_trainer.errors import ConfigError
from finetune_trainer.export import from_checkpoint
from finetune_trainer.export.outputs import Export, kinds_of_weights, write_outputs
from finetune_trainer.methods.method import Method
from finetune_trainer.optim.ema import Ema
from finetune_trainer.optim.optimizer import make_optimizer
from finetune_trainer.train.storage import make_complete_state
from testing.trainer import tiny
from testing.trainer.methods import make_method

pytestmark = pytest.mark.trainer
ALONE = World(0, 1, 0, torch.device("cpu"))


def fill(method: Method, value: float) -> None:
    """Give each weight a value that depends on its place."""
    with torch.no_grad():
        for number, parameter in enumerate(method.parameters().values()):
            parameter.copy_(torch.linspace(value, value + number + 1, parameter.numel()).view_as(parameter))


def save(
    folder: Path, spec: RunSpec, method: Method, step: int, sharded: bool = False, *, bucket: Bucket | None = None
) -> None:
    """Save a checkpoint to a folder, or to a bucket."""
    training, parameters = spec.training, method.parameters()
    ema = Ema(parameters) if training.ema else None
    state = (
        make_sharded_state(training, ALONE, parameters, None)
        if sharded
        else TrainState(parameters, make_optimizer(training, parameters), ema)
    )
    state.step = step
    if state.ema is not None:
        # The average keeps the earlier weights.
        fill(method, 100.0)
    store: CheckpointStore
    if bucket is None:
        store = FolderStore(folder, spec.uid, 1, Retention(5, None, False))
    else:
        store = BucketStore(bucket, folder, spec.uid, 1, Retention(5, None, False))
    store.open()
    store.save(state.snapshot({}), 1e9)


@pytest.mark.parametrize(
    ("name", "settings", "sharded"),
    [
        ("LoRA", {"lora": {"rank": 2}}, False),
        ("LoRA", {"lora": {"rank": 2}, "ema": True}, False),
        ("Full", {"sharding": "full"}, True),
    ],
)
def test_export_equals_the_output_of_the_run(
    base: Path, tmp_path: Path, name: str, settings: dict[str, Any], sharded: bool
) -> None:
    spec = tiny.make_spec(base, tmp_path, method=name, steps=6, **settings)
    method = make_method(base, name, **({"lora": settings["lora"]} if "lora" in settings else {}))
    fill(method, 1.0)
    output = OutputSpec(format="diffusers", to=str(tmp_path / "expected"))
    write_outputs(method, (output,), Path("/"))
    save(tmp_path / "job", spec, method, 3, sharded)
    (checkpoint,) = (tmp_path / "job" / paths.CHECKPOINTS).glob("step-*")
    written = from_checkpoint.export_checkpoint(
        spec, checkpoint, OutputSpec(format="diffusers", to=str(tmp_path / "out")), tmp_path / "cache"
    )
    assert written.to == str(tmp_path / "out")
    files = sorted(path.relative_to(tmp_path / "out") for path in (tmp_path / "out").rglob("*.safetensors"))
    assert files
    for file in files:
        exported, expected = load_file(tmp_path / "out" / file), load_file(tmp_path / "expected" / file)
        assert exported.keys() == expected.keys()
        for key, value in exported.items():
            assert torch.equal(value, expected[key]), key


def test_export_of_weights_that_are_stored_in_bf16_equals_the_output_of_the_run(base: Path, tmp_path: Path) -> None:
    """Their average is fp32; both outputs round it to the format of the weights, and write fp32."""
    settings = {"precision": "bf16", "weightPrecision": "bf16", "ema": True}
    spec = tiny.make_spec(base, tmp_path, method="Full", steps=6, **settings)
    method = make_method(base, "Full", torch.bfloat16, **settings)
    state = make_complete_state(spec.training, method, ALONE.device)
    fill(method, 1.0)
    assert state.ema is not None
    state.ema.update(1)
    state.step = 3
    store = FolderStore(tmp_path / "job", spec.uid, 1, Retention(5, None, False))
    store.open()
    store.save(state.snapshot({}), 1e9)
    with state.exported():
        write_outputs(method, (OutputSpec(format="diffusers", to=str(tmp_path / "expected")),), Path("/"))
    (checkpoint,) = (tmp_path / "job" / paths.CHECKPOINTS).glob("step-*")
    from_checkpoint.export_checkpoint(
        spec, checkpoint, OutputSpec(format="diffusers", to=str(tmp_path / "out")), tmp_path / "cache"
    )
    (file,) = (tmp_path / "expected" / "unet").glob("*.safetensors")
    expected, exported = load_file(file), load_file(tmp_path / "out" / "unet" / file.name)
    for key, value in exported.items():
        assert value.dtype is torch.float32
        assert torch.equal(value, expected[key]), key
        rounded = state.ema.tensors[f"unet.{key}"].to(state.parameters[f"unet.{key}"].dtype)
        assert torch.equal(value, rounded.float()), key


def test_a_checkpoint_of_other_weights_is_refused(base: Path, data: Path, tmp_path: Path) -> None:
    spec = tiny.make_spec(base, data)
    method = make_method(base, "LoRA", lora={"rank": 3})
    save(tmp_path / "job", spec, method, 3)
    (checkpoint,) = (tmp_path / "job" / paths.CHECKPOINTS).glob("step-*")
    (tmp_path / "run.json").write_text(spec.to_json())
    arguments = [
        str(tmp_path / "run.json"),
        str(checkpoint),
        json.dumps([{"format": "diffusers", "to": str(tmp_path / "out")}]),
        str(tmp_path / "state"),
        str(tmp_path / "cache"),
    ]
    assert from_checkpoint.main(arguments) == ExitCode.CONFIG
    with pytest.raises(ConfigError, match="hold other weights"):
        output = OutputSpec(format="diffusers", to=str(tmp_path / "out"))
        from_checkpoint.export_checkpoint(spec, checkpoint, output, tmp_path / "cache")


def thumbnail_of(file: Path) -> Image.Image:
    with safe_open(file, framework="pt") as tensors:
        encoded = tensors.metadata()["modelspec.thumbnail"].partition(",")[2]
    return Image.open(io.BytesIO(base64.b64decode(encoded)))


def is_red(picture: Image.Image) -> bool:
    red, _, blue = picture.getpixel((8, 8))  # type: ignore[misc]
    return bool(red > 200 and blue < 50)


def test_the_command_exports_a_step_from_a_manifest_and_a_folder(
    base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = tiny.make_spec(base, data)
    for step in (2, 4):
        method = make_method(base, "LoRA", lora={"rank": 2})
        fill(method, step)
        save(tmp_path / "job", spec, method, step)
    tiny.write_manifest(tmp_path / "job.yaml", spec)
    where = ["--home", str(tmp_path / "home"), "--to", str(tmp_path / "out"), "--format", "kohya"]
    folder = ["--folder", str(tmp_path / "job")]

    def call(*arguments: str) -> Exit:
        return export(parser().parse_args(["export", *arguments, *where]))

    pictures = tmp_path / "job" / paths.VALIDATION / "pictures"
    pictures.mkdir(parents=True)
    for step, colour in ((2, "red"), (4, "blue")):
        Image.new("RGB", (16, 16), colour).save(pictures / f"step-{step:08}-00.png")
    assert call(str(tmp_path / "job.yaml"), *folder, "--step", "2") is Exit.SUCCEEDED
    shown = capsys.readouterr()
    assert "step-00000002-a1: wrote kohya to " in shown.out
    assert f"kohya: moving to {tmp_path / 'out'}" in shown.err
    assert is_red(thumbnail_of(tmp_path / "out" / "tiny.safetensors"))
    first = load_file(tmp_path / "out" / "tiny.safetensors")
    assert min(float(value.min()) for name, value in first.items() if "alpha" not in name) == pytest.approx(2.0)
    (tmp_path / "out" / "tiny.safetensors").unlink()
    assert call(str(tmp_path / "job.yaml"), *folder, "--dry-run") is Exit.SUCCEEDED
    assert f"step-00000004-a1: would write kohya to {tmp_path / 'out'}" in capsys.readouterr().out
    assert not (tmp_path / "out" / "tiny.safetensors").exists()
    assert call(str(tmp_path / "job.yaml"), *folder, "--list") is Exit.SUCCEEDED
    listed = capsys.readouterr().out
    assert [line.split()[:2] for line in listed.splitlines()[1:3]] == [
        ["step-00000004-a1", "4"],
        ["step-00000002-a1", "2"],
    ]
    assert {"diffusers", "kohya"} <= set(listed.splitlines()[-1].removeprefix("Formats: ").split(", "))
    with pytest.raises(UsageError, match="no checkpoint 3; existing checkpoints: step-00000004-a1, step-00000002-a1"):
        call(str(tmp_path / "job.yaml"), *folder, "--step", "3")
    with pytest.raises(UsageError, match=r"no job gone .* for a job on a cluster, give its manifest and --folder"):
        call("gone")


def test_outputs_of_the_average_and_of_the_last_step_are_written_next_to_each_other(base: Path, tmp_path: Path) -> None:
    """As at the end of a run: once with each kind of weights. A checkpoint gives the same files."""
    spec = tiny.make_spec(base, tmp_path, method="LoRA", lora={"rank": 2}, ema=True)
    method = make_method(base, "LoRA", lora={"rank": 2}, ema=True)
    fill(method, 1.0)
    state = TrainState(
        method.parameters(), make_optimizer(spec.training, method.parameters()), Ema(method.parameters())
    )
    fill(method, 100.0)
    outputs = [
        OutputSpec.model_validate({"format": "diffusers", "to": str(tmp_path / name), "ema": ema})
        for name, ema in (("last", False), ("default", None), ("average", True))
    ]
    finished: dict[int, WrittenOutput] = {}
    assert kinds_of_weights(outputs) == [True, False]
    for averaged in kinds_of_weights(outputs):
        with state.exported(averaged=averaged):
            written = write_outputs(
                method, outputs, Export(DeliveryPlace(tmp_path), finished=finished), averaged=averaged
            )
    assert [Path(each.to).name for each in written] == ["last", "default", "average"]
    smallest = {
        name: min(float(value.min()) for value in load_file(next((tmp_path / name).glob("*.safetensors"))).values())
        for name in ("last", "default", "average")
    }
    assert smallest == {"last": 100.0, "default": 1.0, "average": 1.0}
    save(tmp_path / "job", spec, make_method(base, "LoRA", lora={"rank": 2}), 3)
    (checkpoint,) = (tmp_path / "job" / paths.CHECKPOINTS).glob("step-*")
    again = OutputSpec.model_validate({"format": "diffusers", "to": str(tmp_path / "again"), "ema": False})
    from_checkpoint.export_checkpoint(spec, checkpoint, again, tmp_path / "cache")
    (file,) = (tmp_path / "again").glob("*.safetensors")
    assert min(float(value.min()) for value in load_file(file).values()) == 100.0
