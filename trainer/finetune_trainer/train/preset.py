"""`memoryPreset`: settings that fit a machine's memory, chosen by estimate and explained. Pure; called by `run`.

What a person has set to anything but its default is kept. The global batch is never touched: fewer samples at a time
means more passes in a step. Where the estimate is wrong the first step finds out, and halves the micro-batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from finetune_contract.spec import Offload, Optimizer, Precision, Sharding, TrainingSpec
from finetune_trainer.errors import ConfigError

GIB = 2**30
SMALL_GIB = 13
"""Below it the VAE has no room beside the model, so latents are made once."""
_SHARE = 0.9
"""Of the memory; the rest is for fragments and for what others hold."""
_CONTEXT_GIB = 0.8
"""What the GPU's driver and libraries take."""
_BYTES_OF_MOMENTS = {Optimizer.ADAMW: 8.0, Optimizer.ADAMW_8BIT: 2.1, Optimizer.ADAFACTOR: 0.1, Optimizer.PRODIGY: 16.0}
"""For each trained weight."""
_GATHERED_GIB = 2.0
"""Weights and gradients of the parts that are at work, where the rest lies in slices."""


@dataclass(frozen=True)
class Machine:
    """What the ranks compute on; of ranks on unequal machines, the least.

    Attributes:
        memory_bytes: of one GPU, or one rank's share of the node's memory.
        is_gpu: whether it is a GPU.
        has_bf16: whether it computes in bf16 itself.
        has_8bit: whether the optimizer with 8-bit moments is there.
        host_bytes: one rank's share of the memory beside the GPUs.
        num_ranks: how many ranks there are.
    """

    memory_bytes: int
    is_gpu: bool
    has_bf16: bool
    has_8bit: bool
    host_bytes: int = 0
    num_ranks: int = 1


@dataclass(frozen=True)
class Weights:
    """How many numbers a method holds.

    Attributes:
        unet: of the UNet, which the size of activations is judged by.
        frozen: that are not trained, in all.
        trained: that are.
    """

    unet: int
    frozen: int
    trained: int


@dataclass(frozen=True)
class Choice:
    """What was chosen.

    Attributes:
        training: the settings to train with.
        sentence: what they are, and why, for a person.
    """

    training: TrainingSpec
    sentence: str


def preset_bytes(preset: str) -> int | None:
    """Memory that a preset names; None for auto and cpu, which take what is there.

    Raises:
        ConfigError: it is none.
    """
    if preset in ("auto", "cpu"):
        return None
    number = preset.removesuffix("GB")
    if not number.isdigit() or preset == number:
        raise ConfigError(f"training.memoryPreset: {preset} is unknown; write auto, cpu or the memory, e.g. 16GB")
    return int(number) * GIB


def choose(
    training: TrainingSpec, machine: Machine, weights: Weights, settled: bool = False, may_shard: bool = False
) -> Choice:
    """The fastest settings whose estimate fits: without checkpointing and with AdamW where there is room.

    Slices, and those in the host's memory, only where nothing else fits: gathering them costs time in every pass.

    Args:
        training: what was asked for.
        machine: what there is.
        weights: what is held.
        settled: an earlier attempt has chosen precision, optimizer, crop and sharding, which a checkpoint depends on.
        may_shard: slices go with the method and with what was asked for besides.
    """
    base = training if settled else training.model_copy(update={"precision": _precision(training, machine)})
    if not settled and machine.is_gpu and machine.memory_bytes < SMALL_GIB * GIB:
        base = base.model_copy(update={"center_crop": True})
    budget = machine.memory_bytes * _SHARE
    best: tuple[int, TrainingSpec] | None = None
    for candidate in _candidates(base, machine, weights, settled):
        size = _largest_batch(candidate, weights, machine, budget)
        if size == training.batch_size:
            best = (size, candidate)
            break
        if size > 0 and (best is None or size > best[0]):
            best = (size, candidate)
    for candidate in _sharded_candidates(base, machine, weights, settled, may_shard) if best is None else ():
        size = _largest_batch(candidate, weights, machine, budget)
        if best is None and size > 0:
            best = (size, candidate)
    fits = best is not None
    size, chosen = best or (1, candidate)
    chosen = chosen.model_copy(update={"batch_size": size})
    return Choice(chosen, _explain(training, chosen, machine, weights, fits))


def estimate_bytes(training: TrainingSpec, weights: Weights, machine: Machine) -> float:
    """Memory that training takes at most, as far as can be told beforehand."""
    bytes_of_format = 4 if training.precision is Precision.FP32 else 2
    held: float = weights.frozen * bytes_of_format
    if training.offload is Offload.NONE:
        held += _slice_bytes(training, weights, machine)
    if _is_sliced(training, machine):
        held += min(_GATHERED_GIB * GIB, weights.trained * 8)
    # Autocast keeps a copy in the low format of what is trained.
    held += weights.trained * (bytes_of_format if bytes_of_format == 2 else 0)
    side = training.resolution / 512
    billions = weights.unet / 1e9
    # Activations of one sample at 512 px in 16 bits: about what people see with SD 1.5 (6-7 GB) and SDXL (24 GB).
    of_sample = 0.6 if training.gradient_checkpointing else 2.2 + 0.5 * billions
    of_sample *= min(1.0, billions / 0.1) * bytes_of_format / 2
    context = _CONTEXT_GIB if machine.is_gpu else 0.3
    num_samples = training.batch_size * (2 if training.dreambooth and training.dreambooth.class_prompt else 1)
    return held + (context + of_sample * side**2 * num_samples) * GIB


def host_bytes(training: TrainingSpec, weights: Weights, machine: Machine) -> float:
    """The host's memory that one rank's slices take, and the copy of them that a checkpoint is written from."""
    gradients = 4 * weights.trained / machine.num_ranks
    return 2 * _slice_bytes(training, weights, machine) - gradients


def _slice_bytes(training: TrainingSpec, weights: Weights, machine: Machine) -> float:
    """What one rank holds of weights, gradients, moments and average."""
    of_weight = 4 + 4 + _BYTES_OF_MOMENTS[training.optimizer] + (4 if training.ema else 0)
    num_slices = 1 if training.sharding is Sharding.NONE else machine.num_ranks
    return weights.trained * of_weight / num_slices


def _is_sliced(training: TrainingSpec, machine: Machine) -> bool:
    """Whether weights are gathered; a rank that is alone has them all, unless the host's memory does."""
    return training.offload is Offload.CPU or (training.sharding is Sharding.FULL and machine.num_ranks > 1)


def _precision(training: TrainingSpec, machine: Machine) -> Precision:
    if training.precision is not Precision.FP32:
        return training.precision
    if machine.has_bf16:
        return Precision.BF16
    return Precision.FP16 if machine.is_gpu else Precision.FP32


def _candidates(training: TrainingSpec, machine: Machine, weights: Weights, settled: bool) -> Iterator[TrainingSpec]:
    """Settings from the fastest to the most frugal."""
    optimizers = [training.optimizer]
    # What a checkpoint holds is settled, and slices allow AdamW alone.
    is_free = not settled and training.sharding is Sharding.NONE
    if is_free and training.optimizer is Optimizer.ADAMW and weights.trained > 10_000_000:
        optimizers += [Optimizer.ADAMW_8BIT] if machine.has_8bit else []
        optimizers += [Optimizer.ADAFACTOR]
    for recomputes in (False, True):
        if recomputes or not training.gradient_checkpointing:
            for optimizer in optimizers:
                yield training.model_copy(update={"gradient_checkpointing": recomputes, "optimizer": optimizer})


def _sharded_candidates(
    training: TrainingSpec, machine: Machine, weights: Weights, settled: bool, may_shard: bool
) -> Iterator[TrainingSpec]:
    """Settings where each rank has a slice, from the fastest to the most frugal."""
    if not may_shard or not machine.is_gpu or (settled and training.sharding is Sharding.NONE):
        return
    if training.optimizer is not Optimizer.ADAMW or training.precision is Precision.FP16:
        return
    sliced = training.model_copy(update={"gradient_checkpointing": True, "sharding": Sharding.FULL})
    if machine.num_ranks > 1:
        yield sliced
    offloaded = sliced.model_copy(update={"offload": Offload.CPU})
    if host_bytes(offloaded, weights, machine) <= machine.host_bytes * _SHARE:
        yield offloaded


def _largest_batch(training: TrainingSpec, weights: Weights, machine: Machine, budget: float) -> int:
    """Largest micro-batch that fits, halved from what was asked for; 0 where none does."""
    size = training.batch_size
    while size > 0:
        if estimate_bytes(training.model_copy(update={"batch_size": size}), weights, machine) <= budget:
            return size
        size //= 2
    return 0


def _explain(asked: TrainingSpec, chosen: TrainingSpec, machine: Machine, weights: Weights, fits: bool) -> str:
    needed = estimate_bytes(chosen, weights, machine)
    what = "GPU memory" if machine.is_gpu else "memory"
    parts = [
        chosen.precision.value,
        "gradient checkpointing" if chosen.gradient_checkpointing else "no gradient checkpointing",
        chosen.optimizer.value,
        f"{chosen.batch_size} of {asked.batch_size} samples at a time",
    ]
    if _is_sliced(chosen, machine):
        parts.append(f"each of {machine.num_ranks} ranks with a slice" if machine.num_ranks > 1 else "one slice")
    if chosen.offload is Offload.CPU:
        parts[-1] += f" in the host's memory, {host_bytes(chosen, weights, machine) / GIB:.1f} GiB"
    if chosen.center_crop and not asked.center_crop:
        parts.append("latents made once, of centre crops")
    verdict = "" if fits else ", which may not be enough"
    return (
        f"memoryPreset {asked.memory_preset}: for {machine.memory_bytes / GIB:.1f} GiB of {what}: {', '.join(parts)}; "
        f"estimate {needed / GIB:.1f} GiB{verdict}"
    )
