"""The comparison of what a run writes with the free space of its volumes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from finetune_contract import paths
from finetune_contract.outputs.spec import OutputSpec
from finetune_contract.run_spec import RunSpec
from finetune_contract.spec import CheckpointInterval
from finetune_trainer.delivery.open import DeliveryPlace
from finetune_trainer.errors import ConfigError, StorageOutageError
from finetune_trainer.models.base import open_base
from finetune_trainer.train.preset import Weights
from finetune_trainer.train.space import check as space
from finetune_trainer.train.space.check import Need, check_space, find_needs, find_shortage
from finetune_trainer.train.space.sizes import checkpoint_bytes, num_checkpoints, output_bytes
from testing.trainer import tiny
from testing.trainer.methods import make_method

pytestmark = pytest.mark.trainer
FULL = Weights(denoiser=1000, frozen=0, trained=1000)
LORA = Weights(denoiser=1000, frozen=1000, trained=10)


def make(tmp_path: Path, outputs: Any = (), method: str = "Full", **changes: Any) -> RunSpec:
    spec = tiny.make_spec(tmp_path, tmp_path, method=method, steps=100)
    return spec.model_copy(update={"outputs": tuple(OutputSpec.model_validate(each) for each in outputs)} | changes)


@pytest.mark.parametrize(
    ("settings", "size"),
    [
        ({}, 12_000),
        ({"ema": True}, 16_000),
        ({"optimizer": "adafactor"}, 4_100),
        ({"optimizer": "prodigy"}, 20_000),
        ({"weightPrecision": "bf16", "precision": "bf16"}, 10_000),
    ],
)
def test_a_checkpoint_contains_weights_moments_and_average(tmp_path: Path, settings: dict[str, Any], size: int) -> None:
    spec = tiny.make_spec(tmp_path, tmp_path, method="Full", steps=100, **settings)
    assert checkpoint_bytes(spec.training, FULL) == size


@pytest.mark.parametrize(
    ("changes", "number"),
    [
        ({}, 4),
        ({"keep": 1}, 2),
        ({"keep_best": True}, 5),
        ({"keep_every_steps": 25}, 8),
        ({"checkpoint_interval": CheckpointInterval(steps=50)}, 2),
        ({"checkpoint_interval": CheckpointInterval(steps=10)}, 4),
    ],
)
def test_kept_checkpoints_and_the_one_in_progress_count(tmp_path: Path, changes: dict[str, Any], number: int) -> None:
    assert num_checkpoints(make(tmp_path, **changes)) == number


@pytest.mark.parametrize(
    ("method", "weights", "output", "size"),
    [
        ("Full", FULL, {"format": "diffusers"}, 4000),
        ("Full", FULL, {"format": "single-file", "precision": "fp16"}, 2000),
        ("LoRA", LORA, {"format": "kohya"}, 40),
        ("LoRA", LORA, {"format": "merged"}, 5000),
        ("LoRA", LORA, {"format": "openvino"}, 5000),
        ("LoRA", LORA, {"format": "diffusers", "full": True}, 5040),
    ],
)
def test_outputs_are_what_was_trained_or_complete(
    tmp_path: Path, method: str, weights: Weights, output: dict[str, Any], size: int
) -> None:
    spec = make(tmp_path, method=method)
    assert output_bytes(OutputSpec.model_validate(output | {"to": "x"}), spec.training, weights, 5000) == size


def test_object_stores_are_not_checked(tmp_path: Path) -> None:
    outputs = [{"format": "diffusers", "to": "s3://models/a"}, {"format": "diffusers", "to": "b"}]
    place = DeliveryPlace(tmp_path, bucket="s3://models/job")
    assert find_needs(make(tmp_path, outputs), FULL, 0, place) == []
    fields = [need.field for need in find_needs(make(tmp_path, outputs), FULL, 0, DeliveryPlace(tmp_path))]
    assert fields == ["checkpoint.storage", "outputs[1].to"]


def test_needs_of_one_file_system_are_added() -> None:
    needs = [
        Need("checkpoint.storage", Path("/a/checkpoints"), 3 * space.GIB, "3 checkpoints of 1.0 GiB", "keep less"),
        Need("outputs[0].to", Path("/a/out"), 2 * space.GIB, "format merged", "write elsewhere"),
        Need("outputs[1].to", Path("/b/out"), 9 * space.GIB, "format merged", "write elsewhere"),
    ]
    free = {"a": 5 * space.GIB, "b": 9 * space.GIB}
    assert find_shortage(needs, lambda folder: (folder.parts[1], free[folder.parts[1]])) is None
    free["a"] -= 1
    assert find_shortage(needs, lambda folder: (folder.parts[1], free[folder.parts[1]])) == (
        "checkpoint.storage: the run will write about 5.0 GiB to the file system of /a/checkpoints (3 checkpoints of "
        "1.0 GiB (checkpoint.storage), format merged (outputs[0].to)), and 5.0 GiB are free; enlarge the volume, or "
        "keep less"
    )
    # A file system that does not tell its size is not checked.
    assert find_shortage(needs, lambda folder: (folder.parts[1], None)) is None


def test_the_estimate_of_a_real_base_is_its_checkpoint(base: Path, tmp_path: Path, monkeypatch: Any) -> None:
    spec = tiny.make_spec(base, tmp_path, method="Full", steps=6)
    parameters = make_method(base, "Full").parameters().values()
    exact = 12 * sum(parameter.numel() for parameter in parameters)
    needed = exact * num_checkpoints(spec)
    family = open_base(spec.model, tmp_path / "cache")
    asked = []

    def measure(folder: Path) -> tuple[object, int]:
        asked.append(folder)
        return 1, needed

    monkeypatch.setattr(space, "measure_free", measure)
    check_space(spec, family, DeliveryPlace(tmp_path / "job"), 1)
    assert asked == [paths.checkpoints(tmp_path / "job")]
    needed -= 1
    with pytest.raises(ConfigError, match=r"^checkpoint\.storage: the run will write about .* are free; enlarge"):
        check_space(spec, family, DeliveryPlace(tmp_path / "job"), 1)
    # The volume was filled since the first attempt: its space may return.
    with pytest.raises(StorageOutageError, match="are free; enlarge"):
        check_space(spec, family, DeliveryPlace(tmp_path / "job"), 2)


def test_the_space_of_a_folder_that_does_not_exist_is_that_of_its_parent(tmp_path: Path) -> None:
    system, num_free = space.measure_free(tmp_path / "a" / "b")
    assert system == tmp_path.stat().st_dev
    assert num_free is not None
    assert num_free > 0
