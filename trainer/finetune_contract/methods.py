"""Traits of the fine-tuning methods: the one table that the CEL rules, the docs, `finetune run` and the trainer read.

Torch-free. A new method needs one row here; `tests/trainer/methods/test_method_traits.py` compares the rows with the
classes that train them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum

from finetune_contract.outputs.spec import OutputFormat, OutputSpec
from finetune_contract.spec import Method, Optimizer, Precision, TrainingSpec

_PROGRAMS = frozenset({OutputFormat.DIFFUSERS, OutputFormat.WEBUI, OutputFormat.COMFYUI})
"""Formats of every method."""
_ONE_FILE = _PROGRAMS | {OutputFormat.SINGLE_FILE}
_PIPELINE_FORMATS = _ONE_FILE | {OutputFormat.OPENVINO, OutputFormat.COMPILED}
_LORA_FORMATS = _PROGRAMS | {
    OutputFormat.KOHYA,
    OutputFormat.MERGED,
    OutputFormat.OPENVINO,
    OutputFormat.COMPILED,
}

_LOW_RATE = 5e-6
"""Learning rate for methods that train hundreds of millions of weights on a subject or a condition."""
_PRODIGY_FACTOR = 1.0
"""Learning rate of optimizer prodigy, which finds the step size itself (https://arxiv.org/abs/2306.06101)."""


class TrainedPart(StrEnum):
    """Weights that a method trains. They decide how much memory it needs."""

    BASE = "base"
    """All weights of the base's denoiser, and of its text encoders if requested."""
    ADAPTER = "adapter"
    """Low-rank matrices next to the frozen base."""
    TOKENS = "tokens"
    """Embedding vectors of a new token."""
    CONTROLNET = "controlnet"
    """A copy of the denoiser's encoder next to the frozen base."""


@dataclass(frozen=True)
class MethodTraits:
    """Properties of one method."""

    trains: TrainedPart
    formats: frozenset[OutputFormat] = _PIPELINE_FORMATS
    """Output formats that the trainer can write."""
    settings: tuple[str, ...] = ()
    """Attributes of TrainingSpec that hold the method's own settings; other methods must leave them out."""
    required_settings: tuple[str, ...] = ()
    """Those of `settings` that have no default."""
    shardable: bool = False
    """Whether `training.sharding` can split the trained weights over the ranks."""
    needs_captions: bool = True
    """Whether every image of the data set needs a caption."""
    needs_conditioning: bool = False
    """Whether every image of the data set needs a conditioning image."""
    always_encodes_text: bool = False
    """Whether the text encoders run in every step, for all settings."""
    learning_rate: float = 1e-4
    """Default of training.learningRate, that of the diffusers script for the method."""
    center_crop: bool = False
    """Default of training.centerCrop."""


METHODS: dict[Method, MethodTraits] = {
    Method.LORA: MethodTraits(TrainedPart.ADAPTER, formats=_LORA_FORMATS, settings=("lora",)),
    Method.DREAMBOOTH: MethodTraits(
        TrainedPart.BASE,
        settings=("dreambooth",),
        required_settings=("dreambooth",),
        shardable=True,
        needs_captions=False,
        learning_rate=_LOW_RATE,
    ),
    Method.DREAMBOOTH_LORA: MethodTraits(
        TrainedPart.ADAPTER,
        formats=_LORA_FORMATS,
        settings=("lora", "dreambooth"),
        required_settings=("dreambooth",),
        needs_captions=False,
    ),
    Method.TEXTUAL_INVERSION: MethodTraits(
        TrainedPart.TOKENS,
        formats=_ONE_FILE,
        settings=("textual_inversion",),
        required_settings=("textual_inversion",),
        needs_captions=False,
        always_encodes_text=True,
    ),
    Method.FULL: MethodTraits(TrainedPart.BASE, shardable=True),
    Method.CONTROLNET: MethodTraits(
        TrainedPart.CONTROLNET,
        formats=_ONE_FILE,
        settings=("controlnet",),
        shardable=True,
        needs_conditioning=True,
        learning_rate=_LOW_RATE,
        # A crop of the conditioning image must show all that the caption describes.
        center_crop=True,
    ),
}
"""Traits of every method."""


def encodes_text(training: TrainingSpec) -> bool:
    """Return whether the method runs the text encoders in every step, so that their output cannot be cached."""
    if training.method is None:
        return False
    traits = METHODS[training.method]
    blocks = [getattr(training, name) for name in traits.settings]
    return traits.always_encodes_text or any(getattr(block, "train_text_encoder", False) for block in blocks)


def needs_whole_base(method: Method | None, outputs: Iterable[OutputSpec]) -> bool:
    """Return whether the outputs contain all parts of the base, also those that the training does not read.

    Args:
        method: the method; None for a script, whose pipelines contain their parts.
        outputs: the outputs.
    """
    is_complete = method is not None and METHODS[method].trains is TrainedPart.BASE
    merged = (OutputFormat.MERGED, OutputFormat.OPENVINO, OutputFormat.COMPILED)
    return is_complete or any(output.full or output.format in merged for output in outputs)


def peak_learning_rate(training: TrainingSpec) -> float:
    """Return the peak learning rate: the manifest's, or the default of the optimizer or the method."""
    if training.learning_rate is not None:
        return training.learning_rate
    if training.optimizer is Optimizer.PRODIGY:
        return _PRODIGY_FACTOR
    return _traits(training).learning_rate


def crops_at_centre(training: TrainingSpec) -> bool:
    """Return whether images are cropped at the centre: the manifest's setting, or the default of the method."""
    return _traits(training).center_crop if training.center_crop is None else training.center_crop


def with_defaults(training: TrainingSpec) -> TrainingSpec:
    """Return the settings with the defaults that depend on other settings written out.

    All attempts of a job read them from one run specification, so a later version with other defaults cannot change a
    job that has begun.
    """
    values = {"learning_rate": peak_learning_rate(training), "center_crop": crops_at_centre(training)}
    return training.model_copy(update=values)


def precision_of(training: TrainingSpec) -> Precision:
    """Return the number format of a run. Without one, and before the trainer has chosen it, that of CPUs."""
    return training.precision or Precision.FP32


def _traits(training: TrainingSpec) -> MethodTraits:
    """Return the traits of the method; without one, those of LoRA, the smallest method."""
    return METHODS[training.method or Method.LORA]


def methods_where(condition: Callable[[MethodTraits], bool]) -> tuple[Method, ...]:
    """Return the methods whose traits meet a condition, in the order of the table."""
    return tuple(method for method, traits in METHODS.items() if condition(traits))


SHARDABLE_METHODS = methods_where(lambda traits: traits.shardable)
ADAPTER_METHODS = methods_where(lambda traits: traits.trains is TrainedPart.ADAPTER)
CENTRED_METHODS = methods_where(lambda traits: traits.center_crop)
CONDITIONED_METHODS = methods_where(lambda traits: traits.needs_conditioning)
WRITTEN_FORMATS = frozenset[OutputFormat]().union(*(traits.formats for traits in METHODS.values()))
"""Output formats that at least one method writes."""
