"""Settings for the memory that is there, and a step that did not fit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from finetune_contract.exit_codes import ExitCode
from finetune_contract.run_spec import RunSpec
from finetune_contract.spec import Optimizer, Precision, TrainingSpec
from finetune_trainer.data.batches import Batch
from finetune_trainer.errors import ConfigError
from finetune_trainer.methods.full import Full
from finetune_trainer.models.base import open_base
from finetune_trainer.report import Reporter
from finetune_trainer.tensor_file import count_numbers
from finetune_trainer.train.machine import NOTE, count_weights, has_bf16, memory_bytes
from finetune_trainer.train.micro_batch import MicroBatch, is_out_of_memory
from finetune_trainer.train.preemption_notice import PreemptionNotice
from finetune_trainer.train.preset import GIB, Machine, Weights, choose, preset_bytes
from finetune_trainer.train.run import RankContext, run_rank
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
    # Weights, resolution, GB: recomputes, optimizer, samples at a time of the four that are asked for.
    (lora(SD15), 512, 8, True, "adamw", 4),
    (lora(SD15), 512, 16, False, "adamw", 4),
    (lora(SDXL), 1024, 12, True, "adamw", 2),
    (lora(SDXL), 1024, 24, True, "adamw", 4),
    (lora(SDXL), 1024, 80, False, "adamw", 4),
    (full(SD15), 512, 12, True, "adafactor", 2),
    (full(SD15), 512, 16, True, "adamw8bit", 4),
    (full(SD15), 512, 40, False, "adamw", 4),
    (full(SDXL), 1024, 40, True, "adafactor", 4),
    (full(SDXL), 1024, 80, True, "adamw", 4),
]


@pytest.mark.parametrize("row", PRESETS, ids=lambda row: f"{row[0].trained}-{row[2]}GB")
def test_settings_for_a_gpu(row: tuple[Weights, int, int, bool, str, int]) -> None:
    weights, resolution, gigabytes, recomputes, optimizer, size = row
    asked = TrainingSpec(batch_size=4, resolution=resolution, memory_preset=f"{gigabytes}GB", steps=1)
    choice = choose(asked, Machine(gigabytes * GIB, True, True, True), weights)
    chosen = choice.training
    assert (chosen.gradient_checkpointing, chosen.optimizer.value, chosen.batch_size) == (recomputes, optimizer, size)
    assert chosen.precision is Precision.BF16
    assert chosen.center_crop == (gigabytes < 13)
    assert f"{size} of 4 samples at a time" in choice.sentence
    assert "may not be enough" not in choice.sentence


def test_more_memory_never_means_smaller_batches_or_more_work() -> None:
    for weights in (lora(SD15), lora(SDXL), full(SD15), full(SDXL)):
        sizes = []
        for gigabytes in (8, 12, 16, 24, 40, 80):
            asked = TrainingSpec(batch_size=8, resolution=1024, memory_preset="auto", steps=1)
            sizes.append(choose(asked, Machine(gigabytes * GIB, True, True, False), weights).training.batch_size)
        assert sizes == sorted(sizes)


def test_what_a_person_has_set_stays() -> None:
    asked = TrainingSpec(
        precision=Precision.FP16,
        optimizer=Optimizer.PRODIGY,
        gradient_checkpointing=True,
        memory_preset="80GB",
        steps=1,
    )
    chosen = choose(asked, Machine(80 * GIB, True, True, True), lora(SD15)).training
    assert (chosen.precision, chosen.optimizer) == (Precision.FP16, Optimizer.PRODIGY)
    assert chosen.gradient_checkpointing


def test_a_gpu_without_bf16_gets_fp16_and_a_cpu_without_it_fp32() -> None:
    asked = TrainingSpec(memory_preset="auto", steps=1)
    assert choose(asked, Machine(16 * GIB, True, False, False), lora(SD15)).training.precision is Precision.FP16
    assert choose(asked, Machine(16 * GIB, False, False, False), lora(SD15)).training.precision is Precision.FP32


def test_what_fits_nowhere_is_said() -> None:
    asked = TrainingSpec(batch_size=4, resolution=1024, memory_preset="8GB", steps=1)
    choice = choose(asked, Machine(8 * GIB, True, True, False), full(SDXL))
    assert choice.training.batch_size == 1
    assert choice.sentence.endswith("which may not be enough")


def test_names_of_presets() -> None:
    assert preset_bytes("16GB") == 16 * GIB
    assert preset_bytes("auto") is None
    for bad in ("16", "GB", "much"):
        with pytest.raises(ConfigError, match=r"training\.memoryPreset: "):
            preset_bytes(bad)


def test_this_machine_has_memory() -> None:
    everything = memory_bytes(CPU, {})
    assert everything > GIB // 4
    assert memory_bytes(CPU, {"LOCAL_WORLD_SIZE": "1024"}) < everything // 512
    assert has_bf16(CPU) in (True, False)


def test_weights_are_counted_in_the_headers(base: Path) -> None:
    spec = tiny.make_spec(base, base, method="Full")
    family = open_base(spec.model)
    unet = sum(parameter.numel() for parameter in family.load_unet(torch.float32).parameters())
    assert count_numbers(family.unet_files()) == unet
    assert count_weights(spec.training, family) == Weights(unet, 0, unet)


class _Listening(Reporter):
    """Keeps what a person is told."""

    def __init__(self) -> None:
        super().__init__(0, None)
        self.told: list[str] = []

    def _tell(self, text: str) -> None:
        super()._tell(text)
        self.told.append(text)


def run_with(spec: RunSpec, job_dir: Path) -> list[str]:
    reporter = _Listening()
    context = RankContext(spec, 1, job_dir, job_dir.parent / "cache", PreemptionNotice(), reporter)
    assert run_rank(context, {"OMP_NUM_THREADS": "1"}) is ExitCode.DONE
    return reporter.told


@pytest.mark.usefixtures("restored")
def test_a_step_that_does_not_fit_is_taken_in_smaller_parts(
    base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The allocator of torch refuses for real: more than one sample at a time asks it for more than there is."""
    spec = tiny.make_spec(base, data, batchSize=4, steps=2, method="Full")
    small = spec.model_copy(update={"training": spec.training.model_copy(update={"batch_size": 1})})
    assert run_with(small, tmp_path / "small") == []
    own = Full.losses

    def hungry(self: Full, batch: Batch) -> torch.Tensor:
        losses = own(self, batch)
        return losses if len(batch.captions) == 1 else losses + torch.empty(2**50)[: len(losses)]

    monkeypatch.setattr(Full, "losses", hungry)
    told = run_with(spec, tmp_path / "large")
    assert told == [
        "memory ran out with 4 samples at a time; goes on with 2, and the same global batch",
        "memory ran out with 2 samples at a time; goes on with 1, and the same global batch",
    ]
    weights = [
        (tmp_path / name / "outputs" / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
        for name in ("small", "large")
    ]
    assert weights[0] == weights[1]


def test_one_sample_that_does_not_fit_ends_with_a_sentence() -> None:
    told: list[str] = []
    parts = MicroBatch(8, told.append)
    parts.halve(share=3)
    assert parts.size == 1
    with pytest.raises(ConfigError, match=r"training\.batchSize: memory runs out with one sample at a time"):
        parts.halve(share=3)


def test_other_errors_are_not_for_want_of_memory() -> None:
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert not is_out_of_memory(RuntimeError("shapes cannot be multiplied"))


def test_auto_explains_itself_and_is_kept_by_later_attempts(base: Path, data: Path, tmp_path: Path) -> None:
    spec = tiny.make_spec(base, data, memoryPreset="auto", method="Full")
    first = Ranks(spec, tmp_path / "job", world_size=2, kill_at=("rename", 1), saves_all=True)
    first.run()
    assert first.reports()[-1]["warnings"][0].startswith("memoryPreset auto: for ")
    noted = (first.job_dir / NOTE).read_bytes()
    second = Ranks(spec, first.folder, attempt=2)
    assert second.run() == [ExitCode.DONE]
    assert (first.job_dir / NOTE).read_bytes() == noted
