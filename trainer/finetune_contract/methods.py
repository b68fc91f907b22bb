"""Traits of the fine-tuning methods: the one table that the CEL rules, the docs, `finetune run` and the trainer read.

Torch-free. A new method needs one row here; `tests/trainer/methods/test_method_traits.py` compares the rows with the
classes that train them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from finetune_contract.spec import Method, OutputFormat, TrainingSpec

_DIFFUSERS = frozenset({OutputFormat.DIFFUSERS})
_LORA_FORMATS = frozenset({OutputFormat.DIFFUSERS, OutputFormat.KOHYA, OutputFormat.WEBUI})


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
    formats: frozenset[OutputFormat] = _DIFFUSERS
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


METHODS: dict[Method, MethodTraits] = {
    Method.LORA: MethodTraits(TrainedPart.ADAPTER, formats=_LORA_FORMATS, settings=("lora",)),
    Method.DREAMBOOTH: MethodTraits(
        TrainedPart.BASE,
        settings=("dreambooth",),
        required_settings=("dreambooth",),
        shardable=True,
        needs_captions=False,
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
        formats=frozenset({OutputFormat.DIFFUSERS, OutputFormat.WEBUI}),
        settings=("textual_inversion",),
        required_settings=("textual_inversion",),
        needs_captions=False,
        always_encodes_text=True,
    ),
    Method.FULL: MethodTraits(TrainedPart.BASE, shardable=True),
    Method.CONTROLNET: MethodTraits(
        TrainedPart.CONTROLNET, settings=("controlnet",), shardable=True, needs_conditioning=True
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


def methods_where(condition: Callable[[MethodTraits], bool]) -> tuple[Method, ...]:
    """Return the methods whose traits meet a condition, in the order of the table."""
    return tuple(method for method, traits in METHODS.items() if condition(traits))


SHARDABLE_METHODS = methods_where(lambda traits: traits.shardable)
ADAPTER_METHODS = methods_where(lambda traits: traits.trains is TrainedPart.ADAPTER)
CONDITIONED_METHODS = methods_where(lambda traits: traits.needs_conditioning)
WRITTEN_FORMATS = frozenset[OutputFormat]().union(*(traits.formats for traits in METHODS.values()))
"""Output formats that at least one method writes."""
