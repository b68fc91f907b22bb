"""The choice of number format and library on CPUs."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune_contract import environment
from finetune_contract.cpu.spec import CpuSpec
from finetune_contract.input_spec import ModelSpec
from finetune_contract.spec import Precision, Sharding, SwitchMode, TrainingSpec
from finetune_trainer.checkpoint.store.select import JobFolders
from finetune_trainer.distributed.world import World
from finetune_trainer.errors import ConfigError
from finetune_trainer.intel.paths import MIN_WEIGHTS, ComputePath, PathFacts, candidates, fastest, ipex_conflict
from finetune_trainer.intel.processor import Processor, parse_processor
from finetune_trainer.libraries import PATH_FILE, uses_ipex
from finetune_trainer.models.base import open_base
from finetune_trainer.report import Reporter
from finetune_trainer.train.tuning import processor as tuning
from finetune_trainer.train.tuning.layer_probe import LayerShape, count_layers, make_request, measure_paths
from finetune_trainer.train.tuning.processor import MEASUREMENTS, ProcessorTuner
from testing.trainer import tiny

pytestmark = pytest.mark.trainer

XEON = "model name\t: Xeon\nflags\t\t: fpu avx512f {}\nmodel name\t: other\nflags\t\t: fpu\n"
NATIVE, BF16 = ComputePath(Precision.FP32), ComputePath(Precision.BF16)
NATIVE_IPEX, BF16_IPEX = ComputePath(Precision.FP32, True), ComputePath(Precision.BF16, True)
WORLD = World(0, 1, 0, torch.device("cpu"))


@pytest.mark.parametrize(
    ("flags", "instructions", "has_bf16"),
    [
        ("avx512_bf16 amx_tile amx_bf16", "AMX (bf16 tiles)", True),
        ("avx512_bf16", "AVX-512 BF16", True),
        ("", "AVX-512 (fp32)", False),
        ("amx_tile", "AVX-512 (fp32)", False),
    ],
)
def test_instructions(flags: str, instructions: str, has_bf16: bool) -> None:
    found = parse_processor(XEON.format(flags))
    assert (found.name, found.instructions, found.has_bf16) == ("Xeon", instructions, has_bf16)


def test_other_processors_have_no_special_instructions() -> None:
    assert parse_processor("processor\t: 0\nFeatures\t: fp asimd\n") == Processor()
    assert Processor().instructions == "no bf16 instructions (fp32)"


def facts(**changes: Any) -> PathFacts:
    values = {"all_have_bf16": True, "ipex_missing": "", "num_weights": MIN_WEIGHTS, **changes}
    return PathFacts(parse_processor(XEON.format("avx512_bf16")), **values)


def training(**settings: Any) -> TrainingSpec:
    return TrainingSpec.model_validate({"method": "LoRA", **settings})


@pytest.mark.parametrize(
    ("settings", "ipex", "changes", "expected"),
    [
        ({}, SwitchMode.AUTO, {}, [NATIVE, BF16, NATIVE_IPEX, BF16_IPEX]),
        ({}, SwitchMode.OFF, {}, [NATIVE, BF16]),
        ({}, SwitchMode.ON, {}, [NATIVE_IPEX, BF16_IPEX]),
        ({"precision": "bf16"}, SwitchMode.AUTO, {}, [BF16, BF16_IPEX]),
        ({"precision": "fp16"}, SwitchMode.AUTO, {}, [ComputePath(Precision.FP16)]),
        ({}, SwitchMode.AUTO, {"ipex_missing": "no"}, [NATIVE, BF16]),
        ({}, SwitchMode.AUTO, {"all_have_bf16": False}, [NATIVE, NATIVE_IPEX]),
        ({}, SwitchMode.AUTO, {"keeps_format": True}, [NATIVE, NATIVE_IPEX]),
        ({}, SwitchMode.AUTO, {"num_weights": MIN_WEIGHTS - 1}, [NATIVE]),
        ({}, SwitchMode.ON, {"num_weights": MIN_WEIGHTS - 1}, [NATIVE_IPEX]),
        ({"method": "Full", "sharding": "full"}, SwitchMode.AUTO, {}, [NATIVE, BF16]),
        ({"compile": "on"}, SwitchMode.AUTO, {}, [NATIVE, BF16]),
    ],
)
def test_candidates(
    settings: dict[str, Any], ipex: SwitchMode, changes: dict[str, Any], expected: list[ComputePath]
) -> None:
    assert candidates(training(**settings), ipex, facts(**changes)) == expected


def test_conflicts_name_the_setting() -> None:
    assert ipex_conflict(training(), Precision.BF16, facts()) == ""
    assert "training.sharding" in ipex_conflict(training(method="Full", sharding="full"), Precision.FP32, facts())
    assert "training.compile" in ipex_conflict(training(compile="on"), Precision.FP32, facts())
    assert "training.precision: bf16" in ipex_conflict(training(), Precision.FP16, facts())
    old = PathFacts(Processor(), all_have_bf16=False, ipex_missing="", num_weights=0)
    assert "AVX-512" in ipex_conflict(training(), Precision.BF16, old)
    assert ipex_conflict(training(), Precision.FP32, old) == ""
    assert training(method="Full", sharding="full").sharding is Sharding.FULL


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        ({"fp32 native": 3.0, "bf16 native": 1.0, "bf16 with IPEX": 0.6}, BF16_IPEX),
        ({"fp32 native": 3.0, "bf16 native": 1.0, "bf16 with IPEX": 0.7}, BF16),
        ({"fp32 native": 1.0, "bf16 native": 0.9, "bf16 with IPEX": 1.5}, BF16),
        ({"fp32 native": 1.0, "bf16 native": 0.98, "bf16 with IPEX": 1.5}, NATIVE),
        ({"bf16 with IPEX": 1.0}, BF16_IPEX),
    ],
)
def test_the_fastest_path_is_chosen_and_of_nearly_equal_ones_the_simplest(
    seconds: Mapping[str, float], expected: ComputePath
) -> None:
    assert fastest([NATIVE, BF16, BF16_IPEX], seconds) == expected


def test_all_paths_are_measured_with_the_layers_that_took_most_of_the_time() -> None:
    now = [0.0]
    costs = {1024: 0.3, 512: 0.3, 8: 0.3}
    measured: list[tuple[int, str]] = []

    def measure(shape: LayerShape, path: ComputePath) -> float:
        measured.append((shape.outputs, path.name))
        if path is BF16_IPEX:
            raise RuntimeError("no such instruction")
        now[0] += costs[shape.outputs]
        return costs[shape.outputs] / (2 if path is BF16 else 1)

    counts = {LayerShape((1, 8), size): 2 for size in costs}
    found = measure_paths(counts, [BF16_IPEX, NATIVE, BF16], measure, lambda: now[0])
    # A third of a second each: two of the three layers.
    assert found == {"fp32 native": pytest.approx(1.2), "bf16 native": pytest.approx(0.6)}
    assert [size for size, name in measured if name == "bf16 native"] == [1024, 512]
    assert measured[-1] == (1024, "bf16 with IPEX")


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_layers_are_counted_without_weights(name: str, bases: dict[str, Path]) -> None:
    family = open_base(ModelSpec(base=str(bases[name])))
    counts = count_layers(family, training(batchSize=3, resolution=16))
    from diffusers import UNet2DConditionModel  # noqa: PLC0415  slow to import

    unet = UNet2DConditionModel.from_pretrained(bases[name], subfolder="unet")
    layers = [layer for layer in unet.modules() if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d)]
    assert sum(counts.values()) == len(layers)
    assert counts[LayerShape((3, 4, 8, 8), 8, 3, 1, 1)] == 1


def test_the_process_measures_what_it_is_asked_for() -> None:
    counts = {LayerShape((2, 32, 8, 8), 32, 3, 1, 1): 4, LayerShape((2, 16, 32), 64): 8}
    request = make_request(counts, [BF16, NATIVE], is_trained=False)
    command = [sys.executable, "-m", tuning.PROBE]
    result = subprocess.run(command, input=request, capture_output=True, text=True, check=True)
    seconds = json.loads(result.stdout.splitlines()[-1])
    assert set(seconds) == {"fp32 native", "bf16 native"}
    assert all(value > 0 for value in seconds.values())


class Probes:
    """Answers requests, and counts them."""

    def __init__(self, answer: str) -> None:
        self.answer, self.requests = answer, 0

    def __call__(self, request: str) -> str:
        self.requests += 1
        assert json.loads(request)["layers"]
        return self.answer


FASTER_BF16 = json.dumps({"fp32 native": 2.0, "bf16 native": 1.0})


@pytest.fixture(name="tuner")
def _tuner(base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(tuning, "this_processor", lambda: parse_processor(XEON.format("avx512_bf16")))
    monkeypatch.setattr("finetune_trainer.intel.paths.MIN_WEIGHTS", 1)

    def make(job: str = "job", resumes: bool = False, ipex: SwitchMode = SwitchMode.AUTO, **settings: Any) -> Any:
        spec = tiny.make_spec(base, data, **settings).model_copy(update={"cpu": CpuSpec(ipex=ipex)})
        family = open_base(ModelSpec(base=str(base)))
        folders = JobFolders(tmp_path / job, None, None)
        return ProcessorTuner(spec, family, WORLD, folders, tmp_path / "cache", Reporter(0, None), resumes)

    return make


def test_the_choice_is_kept_for_the_job_and_the_measurement_for_all_jobs(tuner: Any, tmp_path: Path) -> None:
    probe = Probes(FASTER_BF16)
    assert tuner().choose(probe) == BF16
    assert json.loads((tmp_path / "job" / PATH_FILE).read_text()) == "bf16 native"
    assert tuner(resumes=True).choose(probe) == BF16
    assert tuner("other").choose(probe) == BF16
    assert probe.requests == 1
    # Other shapes are measured separately.
    assert tuner("third", batchSize=1).choose(probe) == BF16
    assert probe.requests == 2
    assert len(list((tmp_path / "cache" / MEASUREMENTS).iterdir())) == 2


def test_a_job_that_began_in_fp32_stays_there(tuner: Any) -> None:
    probe = Probes(FASTER_BF16)
    assert tuner(resumes=True).choose(probe) == NATIVE
    assert probe.requests == 0


def test_a_number_format_of_the_manifest_is_kept(tuner: Any) -> None:
    probe = Probes(FASTER_BF16)
    assert tuner(precision="fp32").choose(probe) == NATIVE
    assert tuner(precision="bf16").choose(probe) == BF16
    assert probe.requests == 0


@pytest.mark.parametrize("answer", ["", "no JSON", "[1]"])
def test_a_failed_measurement_leaves_the_default(answer: str, tuner: Any, tmp_path: Path) -> None:
    assert tuner().choose(Probes(answer)) == NATIVE
    assert not (tmp_path / "cache" / MEASUREMENTS).exists()


def test_small_models_are_not_measured(tuner: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finetune_trainer.intel.paths.MIN_WEIGHTS", MIN_WEIGHTS)
    probe = Probes(FASTER_BF16)
    assert tuner().choose(probe) == NATIVE
    assert probe.requests == 0


def test_required_ipex_that_is_missing_is_an_error(tuner: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "unavailable_reason", lambda: "this image does not contain IPEX")
    with pytest.raises(ConfigError, match=r"topology\.cpu\.ipex: this image does not contain IPEX; use the image"):
        tuner(ipex=SwitchMode.ON).choose(Probes(""))


def test_required_ipex_needs_no_measurement_if_the_format_is_given(tuner: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "unavailable_reason", lambda: "")
    assert tuner(ipex=SwitchMode.ON, precision="bf16").choose(Probes("")) == BF16_IPEX
    with pytest.raises(ConfigError, match=r"topology\.cpu\.ipex: IPEX computes the layers that training\.compile"):
        tuner(ipex=SwitchMode.ON, precision="bf16", compile="on").choose(Probes(""))


def test_a_kept_choice_of_ipex_does_not_bind_an_image_without_it(tuner: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "unavailable_reason", lambda: "")
    answer = json.dumps({"fp32 native": 2.0, "bf16 native": 1.0, "bf16 with IPEX": 0.4})
    assert tuner().choose(Probes(answer)) == BF16_IPEX
    monkeypatch.setattr(tuning, "unavailable_reason", lambda: "no IPEX here")
    assert tuner(resumes=True).choose(Probes("")) == BF16


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        (("on", None), True),
        (("off", "bf16 with IPEX"), False),
        (("auto", "bf16 with IPEX"), True),
        (("auto", "bf16 native"), False),
        (("auto", None), False),
    ],
)
def test_ipex_is_imported_once_for_the_ranks_of_a_pod_that_use_it(
    choice: tuple[str, str | None], expected: bool, base: Path, data: Path, tmp_path: Path
) -> None:
    ipex, kept = choice
    spec = tiny.make_spec(base, data).model_copy(update={"cpu": CpuSpec(ipex=SwitchMode(ipex))})
    (tmp_path / "run.json").write_text(spec.to_json(), encoding="utf-8")
    if kept is not None:
        (tmp_path / PATH_FILE).write_text(json.dumps(kept), encoding="utf-8")
    env = {environment.RUN_SPEC: str(tmp_path / "run.json"), environment.CHECKPOINT_DIR: str(tmp_path)}
    assert uses_ipex(env) is expected
    assert not uses_ipex({})
