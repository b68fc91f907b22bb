"""`memoryPreset`: chooses settings that fit the memory, from an estimate, and explains them. Pure; see `hardware`.

Settings that the user changed from their defaults are kept. The global batch does not change: fewer samples at a time
mean more passes in a step. If the estimate is too low, the first step runs out of memory and halves the micro-batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from finetune_contract.methods import precision_of
from finetune_contract.spec import Offload, Optimizer, Precision, Sharding, SwitchMode, TrainingSpec, WeightPrecision
from finetune_trainer.errors import ConfigError

GIB = 2**30
SMALL_GIB = 13
"""Below this size the VAE does not fit next to the model, so latents are computed once."""
_SHARE = 0.9
"""Usable share of the memory; the rest is for fragmentation and for other processes."""
_CONTEXT_GIB = 0.8
"""Memory of the GPU's driver and libraries."""
_GRAPHS_GIB = 0.2
"""Memory of the driver for captured passes, and of their inputs. Activations are in the pool of the graphs instead of
torch's own."""
BYTES_OF_MOMENTS = {Optimizer.ADAMW: 8.0, Optimizer.ADAMW_8BIT: 2.1, Optimizer.ADAFACTOR: 0.1, Optimizer.PRODIGY: 16.0}
"""Optimizer state in bytes per trained weight."""
_ADAPTER_SHARE = 0.1
"""Trained share of the denoiser's weights below which its layers count as frozen."""
_GATHERED_GIB = 2.0
"""Gathered weights and gradients of the modules that are computing, if the others are sharded."""


@dataclass(frozen=True)
class Hardware:
    """The devices of the ranks; on unequal machines, the minimum of all ranks.

    Attributes:
        memory_bytes: memory of one GPU, or one rank's share of the node's memory.
        is_gpu: whether the devices are GPUs.
        has_bf16: whether the devices have bf16 instructions.
        has_8bit: whether the optimizer with 8-bit moments is installed.
        host_bytes: one rank's share of the host memory.
        num_ranks: number of ranks.
    """

    memory_bytes: int
    is_gpu: bool
    has_bf16: bool
    has_8bit: bool
    host_bytes: int = 0
    num_ranks: int = 1


@dataclass(frozen=True)
class Weights:
    """Number of weights that a method holds.

    Attributes:
        denoiser: weights of the denoiser; the size of the activations is estimated from them.
        frozen: weights that are not trained, in the run's precision.
        trained: the trained weights.
        fp32: weights that are not trained and are held in fp32, whatever the precision.
    """

    denoiser: int
    frozen: int
    trained: int
    fp32: int = 0


@dataclass(frozen=True)
class PresetChoice:
    """The chosen settings.

    Attributes:
        training: the settings to train with.
        explanation: the settings and the reason, for the user.
    """

    training: TrainingSpec
    explanation: str


def preset_bytes(preset: str) -> int | None:
    """Return the memory that a preset names; None for auto and cpu, which use the available memory.

    Raises:
        ConfigError: the preset is unknown.
    """
    if preset in ("auto", "cpu"):
        return None
    number = preset.removesuffix("GB")
    if not number.isdigit() or preset == number:
        raise ConfigError(f"training.memoryPreset: {preset} is unknown; write auto, cpu or the memory, e.g. 16GB")
    return int(number) * GIB


def choose(
    training: TrainingSpec, hardware: Hardware, weights: Weights, settled: bool = False, may_shard: bool = False
) -> PresetChoice:
    """Return the fastest settings whose estimate fits: if possible without gradient checkpointing and with AdamW.

    Sharding and offload are chosen only if nothing else fits: gathering weights costs time in every pass.

    Args:
        training: the requested settings.
        hardware: the available devices.
        weights: the weights of the method.
        settled: an earlier attempt has chosen precision, optimizer, crop and sharding, which a checkpoint depends on.
        may_shard: whether the method and the other settings support sharding.
    """
    base = training
    if training.precision is None:
        precision = default_precision(training, hardware.is_gpu, hardware.has_bf16)
        if precision is Precision.FP32 and not hardware.is_gpu and hardware.has_bf16:
            # A preset saves memory on CPUs, too.
            precision = Precision.BF16
        base = training.model_copy(update={"precision": precision})
    if not settled and hardware.is_gpu and hardware.memory_bytes < SMALL_GIB * GIB:
        base = base.model_copy(update={"center_crop": True})
    budget = hardware.memory_bytes * _SHARE
    best: tuple[int, TrainingSpec] | None = None
    for candidate in _candidates(base, hardware, weights, settled):
        size = _largest_batch(candidate, weights, hardware, budget)
        if size == training.batch_size:
            best = (size, candidate)
            break
        if size > 0 and (best is None or size > best[0]):
            best = (size, candidate)
    for candidate in _sharded_candidates(base, hardware, weights, settled, may_shard) if best is None else ():
        size = _largest_batch(candidate, weights, hardware, budget)
        if best is None and size > 0:
            best = (size, candidate)
    fits = best is not None
    size, chosen = best or (1, candidate)
    chosen = chosen.model_copy(update={"batch_size": size})
    return PresetChoice(chosen, _explain(training, chosen, hardware, weights, fits))


def estimate_bytes(training: TrainingSpec, weights: Weights, hardware: Hardware) -> float:
    """Return an estimate of the peak memory of training."""
    bytes_of_format = 4 if precision_of(training) is Precision.FP32 else 2
    held: float = weights.frozen * bytes_of_format + weights.fp32 * 4
    if training.offload is Offload.NONE:
        held += _slice_bytes(training, weights, hardware)
    if _is_sliced(training, hardware):
        held += min(_GATHERED_GIB * GIB, weights.trained * 8)
    if bytes_of_format == 2 and not _is_bf16(training):
        # The forward pass uses a low-precision copy of the trained weights.
        held += weights.trained * 2
    side = training.resolution / 512
    of_sample = _sample_gib(training, weights) * bytes_of_format / 2
    context = _CONTEXT_GIB if hardware.is_gpu else 0.3
    if hardware.is_gpu and training.cuda_graphs is not SwitchMode.OFF and training.sharding is Sharding.NONE:
        context += _GRAPHS_GIB
    num_samples = training.batch_size * (2 if training.dreambooth and training.dreambooth.class_prompt else 1)
    return held + (context + of_sample * side**2 * num_samples) * GIB


def _sample_gib(training: TrainingSpec, weights: Weights) -> float:
    """Return the activations of one sample of 512 x 512 pixels in 16 bits.

    Without recomputation they are about 20 % more than what the forward pass keeps, as the backward pass of adapters
    needed on an H100. What it keeps is counted without a GPU, for each method.
    """
    billions = weights.denoiser / 1e9
    if training.gradient_checkpointing:
        size = 0.6
    elif weights.trained < _ADAPTER_SHARE * weights.denoiser:
        # Frozen layers keep no inputs. An H100 needed 0.78 for SD 1.5 and 1.33 for SDXL.
        size = 0.5 + 0.4 * billions
    elif weights.frozen:
        # A ControlNet: no gradients pass through the frozen encoder.
        size = 0.65 + 0.45 * billions
    else:
        size = 0.9 + 0.55 * billions
    return size * min(1.0, billions / 0.1)


def host_bytes(training: TrainingSpec, weights: Weights, hardware: Hardware) -> float:
    """Return the host memory of one rank's slices and of their copy for checkpoints."""
    gradients = 4 * weights.trained / hardware.num_ranks
    return 2 * _slice_bytes(training, weights, hardware) - gradients


def _slice_bytes(training: TrainingSpec, weights: Weights, hardware: Hardware) -> float:
    """Return the size of one rank's weights, gradients, moments and moving average."""
    stored = 2 if _is_bf16(training) else 4
    of_weight = stored + 4 + BYTES_OF_MOMENTS[training.optimizer] + (4 if training.ema else 0)
    num_slices = 1 if training.sharding is Sharding.NONE else hardware.num_ranks
    return weights.trained * of_weight / num_slices


def _is_bf16(training: TrainingSpec) -> bool:
    """Return whether trained weights are stored in bf16 only."""
    return training.weight_precision is WeightPrecision.BF16


def _is_sliced(training: TrainingSpec, hardware: Hardware) -> bool:
    """Return whether weights are gathered. A single rank gathers only if the weights are in host memory."""
    return training.offload is Offload.CPU or (training.sharding is Sharding.FULL and hardware.num_ranks > 1)


def default_precision(training: TrainingSpec, is_gpu: bool, has_bf16: bool) -> Precision:
    """Return the number format of a manifest that names none.

    Args:
        training: the settings; sharding does not support fp16.
        is_gpu: whether the devices are GPUs.
        has_bf16: whether all of them have bf16 instructions.
    """
    if not is_gpu:
        return Precision.FP32
    if has_bf16:
        return Precision.BF16
    return Precision.FP16 if training.sharding is Sharding.NONE else Precision.FP32


def _candidates(training: TrainingSpec, hardware: Hardware, weights: Weights, settled: bool) -> Iterator[TrainingSpec]:
    """Yield settings from the fastest to the one with the least memory."""
    optimizers = [training.optimizer]
    # An existing checkpoint fixes the optimizer, and sharding supports AdamW only.
    is_free = not settled and training.sharding is Sharding.NONE
    if is_free and training.optimizer is Optimizer.ADAMW and weights.trained > 10_000_000:
        optimizers += [Optimizer.ADAMW_8BIT] if hardware.has_8bit else []
        optimizers += [Optimizer.ADAFACTOR]
    for recomputes in (False, True):
        if recomputes or not training.gradient_checkpointing:
            for optimizer in optimizers:
                yield training.model_copy(update={"gradient_checkpointing": recomputes, "optimizer": optimizer})


def _sharded_candidates(
    training: TrainingSpec, hardware: Hardware, weights: Weights, settled: bool, may_shard: bool
) -> Iterator[TrainingSpec]:
    """Yield sharded settings, from the fastest to the one with the least memory."""
    if not may_shard or not hardware.is_gpu or (settled and training.sharding is Sharding.NONE):
        return
    if training.optimizer is not Optimizer.ADAMW or training.precision is Precision.FP16:
        return
    sliced = training.model_copy(update={"gradient_checkpointing": True, "sharding": Sharding.FULL})
    if hardware.num_ranks > 1:
        yield sliced
    offloaded = sliced.model_copy(update={"offload": Offload.CPU})
    if host_bytes(offloaded, weights, hardware) <= hardware.host_bytes * _SHARE:
        yield offloaded


def _largest_batch(training: TrainingSpec, weights: Weights, hardware: Hardware, budget: float) -> int:
    """Return the largest micro-batch that fits, halved from the requested size; 0 if none fits."""
    size = training.batch_size
    while size > 0:
        if estimate_bytes(training.model_copy(update={"batch_size": size}), weights, hardware) <= budget:
            return size
        size //= 2
    return 0


def _explain(requested: TrainingSpec, chosen: TrainingSpec, hardware: Hardware, weights: Weights, fits: bool) -> str:
    needed = estimate_bytes(chosen, weights, hardware)
    what = "GPU memory" if hardware.is_gpu else "memory"
    parts = [
        precision_of(chosen).value,
        "gradient checkpointing" if chosen.gradient_checkpointing else "no gradient checkpointing",
        chosen.optimizer.value,
        f"{chosen.batch_size} of {requested.batch_size} samples at a time",
    ]
    if _is_bf16(chosen):
        parts.append("weights stored in bf16")
    if _is_sliced(chosen, hardware):
        parts.append(f"sharded over {hardware.num_ranks} ranks" if hardware.num_ranks > 1 else "sharded")
    if chosen.offload is Offload.CPU:
        per_rank = " per rank" if hardware.num_ranks > 1 else ""
        parts.append(f"in host memory ({host_bytes(chosen, weights, hardware) / GIB:.1f} GiB{per_rank})")
    if chosen.center_crop and not requested.center_crop:
        parts.append("latents of centre crops, computed once")
    verdict = "" if fits else ", which may not be enough"
    return (
        f"memoryPreset {requested.memory_preset}: for {hardware.memory_bytes / GIB:.1f} GiB of {what}: "
        f"{', '.join(parts)}; estimate {needed / GIB:.1f} GiB{verdict}"
    )
