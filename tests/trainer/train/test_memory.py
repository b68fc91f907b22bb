"""Memory presets, and steps that run out of memory."""

from __future__ import annotations

import dataclasses
import signal
from pathlib import Path

import pytest
import torch

from finetune_contract.exit_codes import ExitCode
from finetune_contract.run_spec import RunSpec
from finetune_contract.spec import Method, Optimizer, Precision, TrainingSpec, WeightPrecision
from finetune_trainer.checkpoint.store.select import JobFolders
from finetune_trainer.data.batches import Batch
from finetune_trainer.distributed.world import World
from finetune_trainer.errors import ConfigError
from finetune_trainer.methods.full import Full
from finetune_trainer.models.base import open_base
from finetune_trainer.report import Reporter
from finetune_trainer.tensor_file import count_numbers
from finetune_trainer.train import hardware
from finetune_trainer.train.context import RankContext
from finetune_trainer.train.hardware import (
    PRESET_FILE,
    _may_shard,
    controlnet_weights,
    count_weights,
    has_bf16,
    memory_bytes,
)
from finetune_trainer.train.micro_batch import MicroBatch, is_out_of_memory
from finetune_trainer.train.preemption_notice import PreemptionNotice
from finetune_trainer.train.preset import (
    GIB,
    Hardware,
    Weights,
    choose,
    default_precision,
    estimate_bytes,
    preset_bytes,
)
from finetune_trainer.train.run import run_rank
from testing.measure.activations import kept_bytes
from testing.measure.launches import LaunchCase
from testing.trainer import tiny
from testing.trainer.ranks import Ranks

pytestmark = pytest.mark.trainer

CPU = torch.device("cpu")
SD15 = 860_000_000
SDXL = 2_567_000_000


def lora(unet: int) -> Weights:
    return Weights(unet, unet, unet // 250)


def full(unet: int) -> Weights:
    return Weights(unet, 0, unet)


PRESETS = [
    # Weights, resolution, GB; expected: gradient checkpointing, optimizer, samples at a time of the four requested.
    (lora(SD15), 512, 8, False, "adamw", 4),
    (lora(SDXL), 1024, 12, True, "adamw", 2),
    (lora(SDXL), 1024, 24, True, "adamw", 4),
    (lora(SDXL), 1024, 40, False, "adamw", 4),
    (full(SD15), 512, 12, True, "adafactor", 2),
    (full(SD15), 512, 16, True, "adamw8bit", 4),
    (full(SD15), 512, 40, False, "adamw", 4),
    (full(SDXL), 1024, 40, True, "adafactor", 4),
    (full(SDXL), 1024, 80, False, "adamw8bit", 4),
]


@pytest.mark.parametrize("row", PRESETS, ids=lambda row: f"{row[0].trained}-{row[2]}GB")
def test_preset_settings_for_a_gpu(row: tuple[Weights, int, int, bool, str, int]) -> None:
    weights, resolution, gigabytes, recomputes, optimizer, size = row
    requested = TrainingSpec(batch_size=4, resolution=resolution, memory_preset=f"{gigabytes}GB", steps=1)
    choice = choose(requested, Hardware(gigabytes * GIB, True, True, True), weights)
    chosen = choice.training
    assert (chosen.gradient_checkpointing, chosen.optimizer.value, chosen.batch_size) == (recomputes, optimizer, size)
    assert chosen.precision is Precision.BF16
    assert bool(chosen.center_crop) == (gigabytes < 13)
    assert f"{size} of 4 samples at a time" in choice.explanation
    assert "may not be enough" not in choice.explanation


@pytest.mark.parametrize(
    ("unet", "resolution", "size", "peak"), [(SD15, 512, 8, 7.8), (SDXL, 1024, 4, 26.1)], ids=["sd15", "sdxl"]
)
def test_estimate_of_a_lora_is_slightly_above_the_measured_peak(
    unet: int, resolution: int, size: int, peak: float
) -> None:
    """Peaks of torch's allocator in GiB on an H100, with bf16 and rank 4; the estimate includes the driver's memory."""
    training = TrainingSpec(precision=Precision.BF16, batch_size=size, resolution=resolution, steps=1)
    estimate = estimate_bytes(training, lora(unet), Hardware(80 * GIB, True, True, True)) / GIB - 1.0
    assert 1.0 < estimate / peak < 1.2


MEASURED = [
    # Method, pixels, samples, recomputation; peak of torch's allocator in GiB in the first step on an H100, in bf16.
    ("Full", 1024, 2, True, 38.7),
    ("ControlNet", 512, 4, False, 23.7),
]


@pytest.mark.parametrize(("method", "resolution", "size", "recomputes", "peak"), MEASURED, ids=str)
def test_estimate_of_a_complete_model_is_near_the_measured_peak(
    method: str, resolution: int, size: int, recomputes: bool, peak: float
) -> None:
    """The first step allocates the moments after its activations are free: the larger of both moments is the peak.

    The measured release had no working copy; autocast kept the same bytes until the end of the backward pass.
    """
    weights = full(SDXL) if method == "Full" else Weights(SDXL, SDXL, controlnet_weights(SDXL))
    training = TrainingSpec.model_validate(
        {
            "method": method,
            "steps": 1,
            "precision": "bf16",
            "cudaGraphs": "off",
            "batchSize": size,
            "resolution": resolution,
            "gradientCheckpointing": recomputes,
        }
    )
    driver = 0.8
    estimate = estimate_bytes(training, weights, Hardware(80 * GIB, True, True, True)) / GIB - driver
    in_backward = estimate - 8 * weights.trained / GIB
    in_update = (16 * weights.trained + 2 * weights.frozen) / GIB
    assert max(in_backward, in_update) == pytest.approx(peak, rel=0.05)


KEPT = [
    (LaunchCase("sd15", "LoRA", 512, 1, {"lora": {"rank": 4}}), lora(SD15)),
    (LaunchCase("sd15", "Full", 512, 1), full(SD15)),
    (LaunchCase("sdxl", "Full", 512, 1), full(SDXL)),
    (LaunchCase("sdxl", "ControlNet", 512, 1), Weights(SDXL, SDXL, controlnet_weights(SDXL))),
]


@pytest.mark.parametrize("row", KEPT, ids=lambda row: f"{row[0].family}-{row[0].method}")
def test_estimated_activations_are_what_a_pass_keeps_and_its_temporary_tensors(row: tuple[LaunchCase, Weights]) -> None:
    case, weights = row
    one, two = (
        estimate_bytes(
            TrainingSpec(precision=Precision.BF16, batch_size=size, resolution=case.resolution, steps=1),
            weights,
            Hardware(80 * GIB, True, True, True),
        )
        for size in (1, 2)
    )
    assert 1.1 < (two - one) / kept_bytes(case) < 1.35


def test_weights_of_a_controlnet() -> None:
    assert controlnet_weights(859_520_964) == pytest.approx(361_279_120, rel=0.01)
    assert controlnet_weights(2_567_463_684) == pytest.approx(1_251_014_160, rel=0.01)


def test_more_memory_never_gives_smaller_batches() -> None:
    for weights in (lora(SD15), lora(SDXL), full(SD15), full(SDXL)):
        sizes = []
        for gigabytes in (8, 12, 16, 24, 40, 80):
            requested = TrainingSpec(batch_size=8, resolution=1024, memory_preset="auto", steps=1)
            sizes.append(choose(requested, Hardware(gigabytes * GIB, True, True, False), weights).training.batch_size)
        assert sizes == sorted(sizes)


def test_settings_of_the_user_are_kept() -> None:
    requested = TrainingSpec(
        precision=Precision.FP16,
        optimizer=Optimizer.PRODIGY,
        gradient_checkpointing=True,
        memory_preset="80GB",
        steps=1,
    )
    chosen = choose(requested, Hardware(80 * GIB, True, True, True), lora(SD15)).training
    assert (chosen.precision, chosen.optimizer) == (Precision.FP16, Optimizer.PRODIGY)
    assert chosen.gradient_checkpointing


def test_a_gpu_without_bf16_gets_fp16_and_a_cpu_without_it_fp32() -> None:
    requested = TrainingSpec(memory_preset="auto", steps=1)
    assert choose(requested, Hardware(16 * GIB, True, False, False), lora(SD15)).training.precision is Precision.FP16
    assert choose(requested, Hardware(16 * GIB, False, False, False), lora(SD15)).training.precision is Precision.FP32


def test_explanation_warns_if_nothing_fits() -> None:
    requested = TrainingSpec(batch_size=4, resolution=1024, memory_preset="8GB", steps=1)
    choice = choose(requested, Hardware(8 * GIB, True, True, False), full(SDXL))
    assert choice.training.batch_size == 1
    assert choice.explanation.endswith("which may not be enough")


def test_preset_names_are_parsed() -> None:
    assert preset_bytes("16GB") == 16 * GIB
    assert preset_bytes("auto") is None
    for bad in ("16", "GB", "much"):
        with pytest.raises(ConfigError, match=r"training\.memoryPreset: "):
            preset_bytes(bad)


def test_memory_and_bf16_of_this_machine() -> None:
    everything = memory_bytes(CPU, {})
    assert everything > GIB // 4
    assert memory_bytes(CPU, {"LOCAL_WORLD_SIZE": "1024"}) < everything // 512
    assert has_bf16(CPU) is torch.cpu._is_avx512_bf16_supported()


def test_weights_are_counted_from_file_headers(base: Path) -> None:
    spec = tiny.make_spec(base, base, method="Full")
    family = open_base(spec.model)
    unet = sum(parameter.numel() for parameter in family.load_denoiser(torch.float32).parameters())
    assert count_numbers(family.denoiser_files()) == unet
    assert count_weights(spec.training, family) == Weights(unet, 0, unet)


@pytest.mark.parametrize(
    ("method", "settings", "in_precision", "in_fp32"),
    [
        ("LoRA", {}, 0, 1),
        ("Full", {}, 0, 1),
        ("ControlNet", {}, 0, 1),
        # The method holds the encoders itself.
        ("LoRA", {"lora": {"trainTextEncoder": True}}, 1, 0),
        ("TextualInversion", {"textualInversion": {"placeholderToken": "<x>", "initializerToken": "dog"}}, 1, 0),
    ],
)
def test_text_encoders_that_encode_shuffled_tags_are_counted_once(
    method: str, settings: dict[str, object], in_precision: int, in_fp32: int, base: Path
) -> None:
    spec = tiny.make_spec(base, base, method=method, **settings)
    family = open_base(spec.model)
    text = count_numbers(family.text_encoder_files())
    plain, shuffled = (count_weights(spec.training, family, shuffles) for shuffles in (False, True))
    assert plain.fp32 == 0
    assert shuffled.fp32 == in_fp32 * text
    assert shuffled.frozen == plain.frozen
    assert (plain.frozen - plain.denoiser == text) == bool(in_precision)


def test_weights_in_fp32_need_four_bytes_in_every_precision() -> None:
    weights, encoders = lora(SDXL), 817_000_000
    shuffled = dataclasses.replace(weights, fp32=encoders)
    hardware = Hardware(24 * GIB, True, True, True)
    for precision in Precision:
        training = TrainingSpec(precision=precision, steps=1)
        more = estimate_bytes(training, shuffled, hardware) - estimate_bytes(training, weights, hardware)
        assert more == encoders * 4
    requested = TrainingSpec(batch_size=4, resolution=1024, memory_preset="12GB", steps=1)
    small = dataclasses.replace(hardware, memory_bytes=12 * GIB)
    sizes = [choose(requested, small, each).training.batch_size for each in (weights, shuffled)]
    assert sizes == [2, 1]


class _RecordingReporter(Reporter):
    """Records the warnings for the user."""

    def __init__(self) -> None:
        super().__init__(0, None)
        self.messages: list[str] = []

    def warn(self, text: str) -> None:
        super().warn(text)
        self.messages.append(text)


def run_with(spec: RunSpec, job_dir: Path) -> list[str]:
    reporter = _RecordingReporter()
    context = RankContext(spec, 1, job_dir, job_dir.parent / "cache", PreemptionNotice(), reporter)
    assert run_rank(context, {"OMP_NUM_THREADS": "1"}) is ExitCode.DONE
    return reporter.messages


@pytest.mark.usefixtures("restored")
def test_step_that_runs_out_of_memory_is_repeated_in_smaller_parts(
    base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch's allocator really fails: more than one sample at a time requests more memory than exists."""
    spec = tiny.make_spec(base, data, batchSize=4, steps=2, method="Full")
    small = spec.model_copy(update={"training": spec.training.model_copy(update={"batch_size": 1})})
    assert "memory" not in " ".join(run_with(small, tmp_path / "small"))
    own = Full.losses

    def hungry(self: Full, batch: Batch) -> torch.Tensor:
        losses = own(self, batch)
        return losses if len(batch.captions) == 1 else losses + torch.empty(2**50)[: len(losses)]

    monkeypatch.setattr(Full, "losses", hungry)
    messages = [message for message in run_with(spec, tmp_path / "large") if "memory" in message]
    assert messages == [
        "memory ran out with 4 samples at a time; continuing with 2 and the same global batch",
        "memory ran out with 2 samples at a time; continuing with 1 and the same global batch",
    ]
    weights = [
        (tmp_path / name / "outputs" / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
        for name in ("small", "large")
    ]
    assert weights[0] == weights[1]


def test_error_with_advice_if_one_sample_does_not_fit() -> None:
    warnings: list[str] = []
    parts = MicroBatch(8, warnings.append)
    parts.halve(share=3)
    assert parts.size == 1
    assert warnings == ["memory ran out with 3 samples at a time; continuing with 1 and the same global batch"]
    with pytest.raises(ConfigError, match=r"training\.batchSize: memory runs out with one sample at a time"):
        parts.halve(share=3)


def test_other_errors_are_not_out_of_memory() -> None:
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert not is_out_of_memory(RuntimeError("shapes cannot be multiplied"))


def test_auto_preset_is_explained_and_kept_by_later_attempts(base: Path, data: Path, tmp_path: Path) -> None:
    spec = tiny.make_spec(base, data, memoryPreset="auto", method="Full")
    first = Ranks(spec, tmp_path / "job", world_size=2, kill_at=("rename", 1), saves_all=True)
    assert -signal.SIGKILL in first.run()
    assert first.reports()[-1]["warnings"][0].startswith("memoryPreset auto: for ")
    recorded = (first.job_dir / PRESET_FILE).read_bytes()
    second = Ranks(spec, first.folder, attempt=2)
    assert second.run() == [ExitCode.DONE]
    assert (first.job_dir / PRESET_FILE).read_bytes() == recorded


@pytest.mark.parametrize(
    ("is_gpu", "has_bf16", "sharding", "precision"),
    [
        (True, True, "none", Precision.BF16),
        (True, False, "none", Precision.FP16),
        (True, False, "full", Precision.FP32),
        (True, True, "full", Precision.BF16),
        (False, True, "none", Precision.FP32),
        (False, False, "none", Precision.FP32),
    ],
)
def test_precision_of_a_manifest_without_one_fits_the_device(
    is_gpu: bool, has_bf16: bool, sharding: str, precision: Precision
) -> None:
    training = TrainingSpec.model_validate({"method": "Full", "steps": 1, "sharding": sharding})
    assert default_precision(training, is_gpu, has_bf16) is precision


def test_resumed_run_keeps_the_precision_of_its_first_attempt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for GPUs: only their type and whether they have bf16 are replaced."""
    gpu, folders = World(0, 1, 0, torch.device("cuda")), JobFolders(tmp_path)
    training = TrainingSpec.model_validate({"method": "LoRA", "steps": 1})
    monkeypatch.setattr(World, "gather_numbers", lambda _, number: [number])
    monkeypatch.setattr(hardware, "has_bf16", lambda _: True)
    assert hardware.choose_precision(training, gpu, folders).precision is Precision.BF16
    monkeypatch.setattr(hardware, "has_bf16", lambda _: False)
    assert hardware.choose_precision(training, gpu, folders).precision is Precision.BF16
    other = JobFolders(tmp_path / "other")
    other.job_dir.mkdir()
    assert hardware.choose_precision(training, gpu, other).precision is Precision.FP16
    named = training.model_copy(update={"precision": Precision.FP32})
    assert hardware.choose_precision(named, gpu, folders) == named


def test_precision_is_fp32_on_cpus_and_nothing_is_recorded(tmp_path: Path) -> None:
    training = TrainingSpec.model_validate({"method": "LoRA", "steps": 1})
    chosen = hardware.choose_precision(training, World(0, 1, 0, torch.device("cpu")), JobFolders(tmp_path))
    assert chosen.precision is Precision.FP32
    assert list(tmp_path.iterdir()) == []


def test_weights_stored_in_bf16_save_four_bytes_each_and_are_not_sharded() -> None:
    hardware = Hardware(40 * GIB, True, True, False, host_bytes=200 * GIB, num_ranks=4)
    plain = TrainingSpec(precision=Precision.BF16, method=Method.FULL, steps=1)
    rounded = plain.model_copy(update={"weight_precision": WeightPrecision.BF16})
    saved = estimate_bytes(plain, full(SDXL), hardware) - estimate_bytes(rounded, full(SDXL), hardware)
    assert saved == 4 * SDXL
    requested = rounded.model_copy(update={"memory_preset": "40GB"})
    choice = choose(requested, hardware, full(SDXL))
    assert choice.training.weight_precision is WeightPrecision.BF16
    assert "weights stored in bf16" in choice.explanation
    folders = JobFolders(Path("job"), None, None)
    assert _may_shard(plain, folders)
    assert not _may_shard(rounded, folders)


def test_estimate_includes_the_memory_of_graphs_where_they_are_used() -> None:
    gpu, cpu = Hardware(80 * GIB, True, True, True), Hardware(80 * GIB, False, True, False)

    def estimate(on: Hardware, **settings: str) -> float:
        return estimate_bytes(
            TrainingSpec.model_validate({"steps": 1, "precision": "bf16", **settings}), full(SD15), on
        )

    assert 0.1 * GIB < estimate(gpu) - estimate(gpu, cudaGraphs="off") < GIB
    assert estimate(cpu) == estimate(cpu, cudaGraphs="off")
    sharded = {"sharding": "full"}
    assert estimate(gpu, **sharded) == estimate(gpu, cudaGraphs="off", **sharded)
