"""The number format and the library that a rank on CPUs computes with: which come into question, and which is fastest.

Pure: `train.tuning.processor` measures.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from finetune_contract.spec import Precision, Sharding, SwitchMode, TrainingSpec
from finetune_trainer.intel.processor import Processor

MIN_WEIGHTS = 50_000_000
"""Weights of a denoiser from which a measurement is worth its time: a step of a smaller one takes milliseconds."""
_MARGIN = 1.03
"""How much faster a path must be to be chosen before a simpler one."""
_IPEX_MARGIN = 1.5
"""The same for a path with IPEX and one without. The measurement is that of single layers. The rest of a step is not
faster with IPEX, and changes layouts for it: `make bench-cpu` has shown layers that are 1.2 times as fast in a step
that takes 1.2 times as long."""


@dataclass(frozen=True)
class ComputePath:
    """How a rank on CPUs computes.

    Attributes:
        precision: number format of the forward pass.
        uses_ipex: whether IPEX computes linear layers and convolutions.
    """

    precision: Precision
    uses_ipex: bool = False

    @property
    def name(self) -> str:
        """The name in files and messages, e.g. "bf16 with IPEX"."""
        return f"{self.precision.value} {'with IPEX' if self.uses_ipex else 'native'}"


@dataclass(frozen=True)
class PathFacts:
    """All that decides which paths come into question.

    Attributes:
        processor: that of rank 0.
        all_have_bf16: whether the processors of all ranks have bf16 instructions.
        ipex_missing: why a rank cannot use IPEX; empty if all can.
        num_weights: weights of the denoiser.
        keeps_format: whether an earlier attempt trained with the default number format of CPUs, fp32.
    """

    processor: Processor
    all_have_bf16: bool
    ipex_missing: str
    num_weights: int
    keeps_format: bool = False


def candidates(training: TrainingSpec, ipex: SwitchMode, facts: PathFacts) -> list[ComputePath]:
    """Return the paths that a run may take, the simplest one first.

    Args:
        training: the settings. A number format that they name is kept.
        ipex: the manifest's `topology.cpu.ipex`. With `on`, its requirements are checked by `ipex_conflict`.
        facts: the machine and the model.
    """
    is_large = facts.num_weights >= MIN_WEIGHTS
    if training.precision is not None:
        formats = [training.precision]
    elif is_large and facts.all_have_bf16 and not facts.keeps_format:
        formats = [Precision.FP32, Precision.BF16]
    else:
        formats = [Precision.FP32]
    if ipex is SwitchMode.ON:
        return [ComputePath(each, True) for each in formats]
    uses = [False]
    if ipex is SwitchMode.AUTO and is_large and not facts.ipex_missing:
        uses.append(True)
    return [
        ComputePath(each, use) for use in uses for each in formats if not (use and ipex_conflict(training, each, facts))
    ]


def ipex_conflict(training: TrainingSpec, precision: Precision, facts: PathFacts) -> str:
    """Return why IPEX cannot compute a run; empty if it can."""
    if training.sharding is not Sharding.NONE:
        return "IPEX cannot pack sharded weights; leave training.sharding out"
    if training.compile is SwitchMode.ON:
        return "IPEX computes the layers that training.compile would compile; write compile: auto"
    if precision is Precision.FP16:
        return "IPEX trains in fp32 and bf16; write training.precision: bf16"
    if precision is Precision.BF16 and not facts.processor.has_avx512:
        return "IPEX needs AVX-512 for bf16, which this processor does not have; write training.precision: fp32"
    return ""


def fastest(paths: Iterable[ComputePath], seconds: Mapping[str, float]) -> ComputePath:
    """Return the fastest path; of nearly equal ones the simplest.

    Args:
        paths: the simplest one first.
        seconds: the measured time of each, by name. A path without one could not be measured.
    """
    ordered = list(paths)
    best = ordered[0]
    for path in ordered[1:]:
        margin = _IPEX_MARGIN if path.uses_ipex and not best.uses_ipex else _MARGIN
        if path.name in seconds and seconds[path.name] * margin < seconds.get(best.name, float("inf")):
            best = path
    return best


def describe(path: ComputePath, seconds: Mapping[str, float], processor: Processor) -> str:
    """Return a message about a choice, for the log of the job."""
    name = processor.name or "this processor"
    others = {other: value / seconds[path.name] for other, value in seconds.items() if other != path.name}
    ratios = ", ".join(f"{ratio:.2f} times as fast as {other}" for other, ratio in others.items())
    return f"{path.name} on {name}, {processor.instructions}: {ratios}"
