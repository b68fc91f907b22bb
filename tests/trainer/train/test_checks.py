"""Refusals before anything is loaded: missing software, devices, incomplete models, folders that cannot be written."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from finetune_contract import environment
from finetune_contract.exit_codes import ExitCode
from finetune_contract.heartbeat import WrittenOutput
from finetune_contract.input_spec import DatasetSpec, ModelSpec
from finetune_contract.outputs.spec import OutputSpec
from finetune_contract.requirements import find_missing_software
from finetune_contract.run_spec import RunSpec
from finetune_contract.spec import TrainingSpec
from finetune_trainer.delivery.open import DeliveryPlace
from finetune_trainer.distributed.world import World
from finetune_trainer.errors import ConfigError, StorageError
from finetune_trainer.export.outputs import check_targets
from finetune_trainer.export.retry import PatientWriter
from finetune_trainer.models.base import open_base
from finetune_trainer.report import Reporter
from finetune_trainer.train.checks import check_device, check_inputs, check_spec, ignored_revisions
from testing.trainer import tiny
from testing.trainer.ranks import Ranks

pytestmark = pytest.mark.trainer
CPU = torch.device("cpu")
ALONE = World(0, 1, 0, CPU)


def training(**settings: object) -> TrainingSpec:
    return TrainingSpec.model_validate({"method": "LoRA", "steps": 2, **settings})


@pytest.mark.parametrize(
    ("settings", "packages", "programs", "message"),
    [
        (
            {"trackers": ["mlflow"]},
            (),
            (),
            "training.trackers: mlflow needs the package mlflow, which is not installed",
        ),
        ({"optimizer": "adamw8bit"}, ("wandb",), (), "training.optimizer: adamw8bit needs the package bitsandbytes"),
        ({"compile": True}, (), ("make",), "training.compile: no C++ compiler is installed here"),
        ({"trackers": ["wandb"], "optimizer": "adamw8bit", "compile": True}, ("wandb", "bitsandbytes"), ("gcc",), None),
        ({}, (), (), None),
    ],
)
def test_missing_software_is_named(
    settings: dict[str, object], packages: tuple[str, ...], programs: tuple[str, ...], message: str | None
) -> None:
    def which(name: str) -> str | None:
        return name if name in programs else None

    found = list(find_missing_software(training(**settings), packages.__contains__, which))
    assert len(found) == (message is not None)
    assert all(text.startswith(message or "") for text in found)


def test_missing_software_is_refused_before_anything_is_loaded(
    base: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = tiny.make_spec(base, data, trackers=["mlflow"], compile=True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ConfigError, match=r"training\.trackers: mlflow needs .*; training\.compile: no C\+\+ compiler"):
        check_spec(spec)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optimizer": "adamw8bit"}, r"training\.optimizer: adamw8bit needs a GPU; write adamw or adafactor"),
        (
            {"attention": "efficient"},
            r"training\.attention: efficient is not available on cpu with float32; write auto",
        ),
    ],
)
def test_a_device_without_the_requested_kernel_is_refused(settings: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_device(training(**settings), CPU)
    check_device(training(), CPU)


@pytest.fixture
def spec(base: Path, data: Path) -> RunSpec:
    """Return a tiny run."""
    return tiny.make_spec(base, data)


def without(path: str) -> Callable[[Path], object]:
    return lambda folder: (folder / path).unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            without("unet/diffusion_pytorch_model.safetensors"),
            "model.base: .* has no .safetensors weights of the denoi",
        ),
        (
            without("text_encoder/model.safetensors"),
            "model.base: .* has no .safetensors weights of the text",
        ),
        (
            without("vae/diffusion_pytorch_model.safetensors"),
            "model.base: .* has no .safetensors weights of the VAE",
        ),
        (without("text_encoder/config.json"), r"model\.base: .*text_encoder/config\.json does not exist"),
    ],
)
def test_an_incomplete_base_is_refused_before_the_map_phase(
    base: Path, data: Path, tmp_path: Path, damage: Callable[[Path], object], message: str
) -> None:
    copy = shutil.copytree(base, tmp_path / "base")
    damage(copy)
    spec = tiny.make_spec(copy, data)
    with pytest.raises(ConfigError, match=message):
        check_inputs(spec, open_base(spec.model), CPU)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, r"config\.json cannot be read"),
        ({"config.json": {"_class_name": "UNet2DConditionModel"}}, "is a UNet2DConditionModel, not a ControlNetModel"),
        ({"config.json": {"_class_name": "ControlNetModel"}}, r"has no \.safetensors weights"),
    ],
)
def test_a_controlnet_without_weights_is_refused_before_the_map_phase(
    base: Path, data: Path, tmp_path: Path, files: dict[str, object], message: str
) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    spec = tiny.make_spec(base, data, method="ControlNet", controlnet={"base": str(tmp_path)})
    with pytest.raises(ConfigError, match=rf"training\.controlnet\.base: .*{message}.*; write the folder or hub id"):
        check_inputs(spec, open_base(spec.model), CPU)


def test_targets_are_probed_and_leave_no_files(tmp_path: Path) -> None:
    outputs = (OutputSpec(format="diffusers", to="lora"), OutputSpec(format="diffusers", to=str(tmp_path / "else")))
    check_targets(outputs, DeliveryPlace(tmp_path / "job"))
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    (tmp_path / "file").touch()
    blocked = (*outputs, OutputSpec(format="diffusers", to=str(tmp_path / "file" / "lora")))
    with pytest.raises(ConfigError, match=r"outputs\[2\]\.to: cannot write to .*file/lora: Not a directory; write"):
        check_targets(blocked, DeliveryPlace(tmp_path / "job"))


def make_read_only(folder: Path) -> None:
    """Make a folder unusable for every user, root included: a file has its name."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.touch()


@pytest.mark.parametrize(
    ("blocked", "code", "message"),
    [
        ("job/outputs/lora", ExitCode.CONFIG, "job/outputs/lora: a file has this name; write"),
        ("cache", ExitCode.STORAGE, "cache: cannot write"),
        ("job/checkpoints", ExitCode.STORAGE, "checkpoint storage:"),
    ],
)
def test_a_folder_that_cannot_be_written_ends_the_run_before_the_map_phase(
    spec: RunSpec, tmp_path: Path, blocked: str, code: ExitCode, message: str
) -> None:
    make_read_only(tmp_path / "run" / blocked)
    spec = spec.model_copy(update={"outputs": (OutputSpec(format="diffusers", to="lora"),)})
    ranks = Ranks(spec, tmp_path / "run", extra={environment.CACHE_DIR: str(tmp_path / "run" / "cache")})
    assert ranks.run() == [code]
    assert message in ranks.stderr()
    assert {"Caching", "Training"}.isdisjoint(report["state"] for report in ranks.reports())


def test_a_revision_of_an_input_that_is_not_on_the_hub_is_reported(tmp_path: Path) -> None:
    spec = tiny.make_spec(tmp_path, tmp_path)
    additional = [
        {"source": "s3://pictures/discs", "revision": "v2"},
        {"source": "me/rings", "revision": "v2"},
        {"source": str(tmp_path / "rings.csv"), "revision": "v3"},
        {"source": str(tmp_path)},
    ]
    dataset = DatasetSpec.model_validate({"source": "me/circles", "revision": "v1", "additional": additional})
    model = spec.model.model_copy(update={"revision": "fp16"})
    found = ignored_revisions(spec.model_copy(update={"model": model, "dataset": dataset}))
    assert [text.partition(": ")[0] for text in found] == [
        "model.revision",
        "dataset.additional[0].revision",
        "dataset.additional[2].revision",
    ]
    assert found[0] == (
        f"model.revision: {tmp_path} is not on the hub, so revision fp16 has no effect; leave revision out, or write "
        "the hub id"
    )
    assert ignored_revisions(spec) == []


class Disk:
    """A disk that is full for a number of tries, and a clock that advances only by waiting."""

    def __init__(self, num_full: int) -> None:
        self.num_full = num_full
        self.time = 0.0
        self.pauses: list[float] = []

    def pause(self, seconds: float) -> bool:
        self.pauses.append(seconds)
        self.time += seconds
        return False

    def write(self) -> tuple[WrittenOutput, ...]:
        if len(self.pauses) < self.num_full:
            raise StorageError("outputs: cannot write to /out: No space left on device")
        return (WrittenOutput(format="diffusers", to="/out", size_bytes=1),)


def patient_writer(disk: Disk, limit_seconds: float, report_fd: int | None = None) -> PatientWriter:
    return PatientWriter(ALONE, Reporter(0, report_fd), limit_seconds, clock=lambda: disk.time, pause=disk.pause)


def test_a_full_disk_is_waited_for(tmp_path: Path) -> None:
    disk = Disk(num_full=6)
    with (tmp_path / "reports").open("wb") as reports:
        patient_writer(disk, 1800, reports.fileno()).write(disk.write)
    assert disk.pauses == [2, 4, 8, 16, 32, 60]
    last = json.loads((tmp_path / "reports").read_text().splitlines()[-1])
    assert last["outputs"][0]["to"] == "/out"
    assert len(last["warnings"]) == 1
    assert "No space left on device; the last step is committed, and the outputs are tried again" in last["warnings"][0]


def test_a_disk_that_stays_full_fails_the_attempt_at_the_limit() -> None:
    disk = Disk(num_full=10**6)
    with pytest.raises(StorageError, match=r"No space left on device; no output could be written for 100 s .*maxStale"):
        patient_writer(disk, 100).write(disk.write)
    assert disk.time <= 100


def test_a_full_disk_delays_the_end_of_a_real_run(base: Path, data: Path, tmp_path: Path) -> None:
    """A file in the place of the folder of records stands in for the full disk: a test cannot fill a real one."""
    spec: RunSpec = tiny.make_spec(base, data, steps=2)
    target = tmp_path / "out"
    spec = spec.model_copy(update={"outputs": (OutputSpec(format="diffusers", to=str(target)),)})
    ranks = Ranks(spec, tmp_path / "run")
    obstacle = ranks.job_dir / "exports"
    make_read_only(obstacle)
    ranks.start()
    ranks.wait_until(lambda report: any("tried again" in text for text in report.get("warnings", ())))
    obstacle.unlink()
    assert ranks.wait() == [0]
    assert list(target.glob("*.safetensors"))


def write_controlnet(folder: Path, **changes: object) -> Path:
    """Write what is read of a ControlNet for the tiny base: its configuration."""
    folder.mkdir(exist_ok=True)
    config = {
        "_class_name": "ControlNetModel",
        "cross_attention_dim": tiny.WIDTH,
        "conditioning_embedding_out_channels": [16, 32],
    }
    (folder / "config.json").write_text(json.dumps(config | changes))
    (folder / "diffusion_pytorch_model.safetensors").touch()
    return folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cross_attention_dim": 1024}, r"has text embeddings of width 1024, and the base has \d+"),
        ({"block_out_channels": [320, 640, 1280]}, "has blocks with the channels 320, 640, 1280, and the base has"),
        ({"conditioning_channels": 1}, "reads conditioning images with 1 channels, and those of a data set have 3"),
        ({"conditioning_embedding_out_channels": [16, 32, 96, 256]}, r"reduces conditioning images by 8, and the base"),
    ],
)
def test_a_controlnet_of_another_kind_of_base_is_refused_before_the_map_phase(
    base: Path, data: Path, tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    spec = tiny.make_spec(base, data, method="ControlNet", controlnet={"base": str(write_controlnet(tmp_path))})
    check_inputs(spec, open_base(spec.model), CPU)
    write_controlnet(tmp_path, **changes)
    with pytest.raises(
        ConfigError, match=rf"training\.controlnet\.base: .*{message}.*; write a ControlNet of the same"
    ):
        check_inputs(spec, open_base(spec.model), CPU)


def write_lora(path: Path, layers: dict[str, tuple[int, int]]) -> Path:
    """Write a LoRA of rank 2 for layers of these sizes."""
    tensors = {}
    for name, (height, width) in layers.items():
        tensors[f"{name}.lora_A.weight"] = torch.ones(2, width)
        tensors[f"{name}.lora_B.weight"] = torch.ones(height, 2)
    save_file(tensors, path)
    return path


def test_a_lora_that_does_not_fit_is_refused_before_the_map_phase(base: Path, data: Path, tmp_path: Path) -> None:
    family = open_base(ModelSpec(base=str(base)))
    layer = next(name for name in family.pipeline.tensors("unet") if name.endswith("attn2.to_k.weight"))
    height, width = family.pipeline.tensors("unet")[layer].shape
    name = f"unet.{layer.removesuffix('.weight')}"
    text = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"

    def check(layers: dict[str, tuple[int, int]], **lora: object) -> None:
        path = write_lora(tmp_path / "start.safetensors", layers)
        spec = tiny.make_spec(base, data, method="LoRA", lora={"rank": 2, "base": str(path), **lora})
        check_inputs(spec, family, CPU)

    fits = {name: (height, width)}
    check(fits)
    start = r"training\.lora\.base: .*start\.safetensors"
    # The names of SD 1.x and 2.x are equal; the width of the text embeddings differs.
    with pytest.raises(ConfigError, match=rf"{start} changes {name} by a matrix of {height} x 1024, and the base has"):
        check({name: (height, 1024)})
    with pytest.raises(
        ConfigError, match=rf"{start} has adapters for layers that the base lacks \(unet\.down_blocks\.7"
    ):
        check({"unet.down_blocks.7.to_k": (height, width)})
    with pytest.raises(ConfigError, match=rf"{start} also adapts layers .*add to_k to targetModules"):
        check(fits, targetModules=["to_q"])
    size = family.pipeline.tensors("text_encoder")[f"{text.partition('.')[2]}.weight"].shape
    with pytest.raises(ConfigError, match=rf"{start} also has adapters for the text encoder .*trainTextEncoder: true"):
        check({**fits, text: (size[0], size[1])})
    check({**fits, text: (size[0], size[1])}, trainTextEncoder=True)


def test_an_embedding_of_another_width_is_refused_before_the_map_phase(base: Path, data: Path, tmp_path: Path) -> None:
    inversion = {"placeholderToken": "<cat>", "initializerToken": "a", "base": str(tmp_path / "cat.safetensors")}
    spec = tiny.make_spec(base, data, method="TextualInversion", textualInversion=inversion)
    family = open_base(spec.model)
    save_file({"emb_params": torch.ones(1, tiny.WIDTH)}, tmp_path / "cat.safetensors")
    check_inputs(spec, family, CPU)
    save_file({"emb_params": torch.ones(1, 1024)}, tmp_path / "cat.safetensors")
    message = (
        r"training\.textualInversion\.base: .*cat\.safetensors has no vectors of width \d+ .*\(it has 1024\); write"
    )
    with pytest.raises(ConfigError, match=message):
        check_inputs(spec, family, CPU)
