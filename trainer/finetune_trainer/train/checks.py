"""Validation of a run specification against what this trainer, its image and its device support.

All checks run before anything is loaded. `finetune validate` shares those of `finetune_contract`.
"""

from __future__ import annotations

import errno
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from finetune_contract.methods import crops_at_centre, encodes_text, precision_of
from finetune_contract.requirements import find_missing_software
from finetune_contract.run_spec import RunSpec
from finetune_contract.spec import Offload, Optimizer, Precision, Sharding, SwitchMode, TrainingSpec
from finetune_trainer.data.sources.open import is_on_hub
from finetune_trainer.distributed.world import World
from finetune_trainer.errors import ConfigError, StorageError
from finetune_trainer.export.formats.merge import read_adapter
from finetune_trainer.export.outputs import check_outputs, check_targets
from finetune_trainer.intel.extension import FIELD, unavailable_reason
from finetune_trainer.methods import adapter_file
from finetune_trainer.methods.controlnet import check_controlnet
from finetune_trainer.methods.embedding_file import find_embedding_files, select_embedding
from finetune_trainer.methods.kernels import attention_kernel
from finetune_trainer.methods.registry import method_traits
from finetune_trainer.models.family import Family
from finetune_trainer.train.context import RankContext
from finetune_trainer.train.passes.choice import GraphFacts, choose_graphs

DTYPES = {Precision.FP32: torch.float32, Precision.FP16: torch.float16, Precision.BF16: torch.bfloat16}
"""Number format of the frozen weights and of the forward pass."""


def check_spec(spec: RunSpec) -> None:
    """Refuse what this trainer does not support.

    Raises:
        ConfigError: the message names the field.
    """
    if spec.training.steps is None and spec.training.epochs is None:
        raise ConfigError("training.steps: neither steps nor epochs is given; write one of them")
    dreambooth = spec.training.dreambooth
    if spec.training.aspect_buckets and dreambooth is not None and dreambooth.class_prompt is not None:
        raise ConfigError("training.aspectBuckets: class images are square; leave it out, or dreambooth.classPrompt")
    if spec.dataset.streaming and not (crops_at_centre(spec.training) or spec.training.aspect_buckets):
        raise ConfigError(
            "dataset.streaming: a random crop needs the image again in each epoch; write training.centerCrop: true or "
            "training.aspectBuckets: true, or leave streaming out"
        )
    if spec.training.sharding is not Sharding.NONE:
        check_sharded(spec.training)
    elif spec.training.offload is not Offload.NONE:
        raise ConfigError("training.offload: only sharded weights can be kept in host memory; write sharding: full")
    if missing := list(find_missing_software(spec.training)):
        raise ConfigError("; ".join(missing))
    if spec.cpu.ipex is SwitchMode.ON and (reason := unavailable_reason()):
        raise ConfigError(f"{FIELD}: {reason}; use the image trainer-cpu-intel, or write ipex: auto")
    check_outputs(spec.outputs, method_traits(spec.training.method).formats)


def ignored_revisions(spec: RunSpec) -> list[str]:
    """Return a warning for each revision of an input that has no revisions, because it is not on the hub."""
    dataset = spec.dataset
    inputs = [
        ("model", spec.model.base, spec.model.revision),
        ("dataset", dataset.source, dataset.revision),
        *((f"dataset.additional[{i}]", each.source, each.revision) for i, each in enumerate(dataset.additional)),
    ]
    return [
        f"{field}.revision: {location} is not on the hub, so revision {revision} has no effect; leave revision out, or "
        "write the hub id"
        for field, location, revision in inputs
        if revision is not None and not is_on_hub(location)
    ]


def check_place(context: RankContext, world: World) -> None:
    """Refuse what this machine does not support: its device, the cache, and the folders of the outputs.

    Raises:
        ConfigError: the message names the field.
        StorageError: the cache cannot be written.
    """
    training = context.spec.training
    if training.memory_preset is None and training.precision is not None:
        # Otherwise the number format is chosen later; see `load_inputs`.
        check_device(training, world.device)
    try:
        context.cache_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=context.cache_dir):
            pass
    except OSError as error:
        # The map phase waits until a full disk has room.
        if error.errno != errno.ENOSPC:
            raise StorageError(f"cache: cannot write {context.cache_dir}: {error.strerror}") from error
    if world.is_first:
        check_targets(context.spec.outputs, context.delivery, context.spec.training.method)


def check_inputs(spec: RunSpec, family: Family, device: torch.device) -> None:
    """Refuse models that lack files. Their weights are read after the map phase, which may take hours.

    Args:
        spec: the run, with local paths and with the settings of its memory preset.
        family: the base model.
        device: device of this rank.

    Raises:
        ConfigError: the message names the field and the file.
    """
    check_device(spec.training, device)
    vae = "model.base" if spec.model.vae is None else "model.vae"
    _check_files("model.base", spec.model.base, "denoiser", family.denoiser_files())
    _check_files("model.base", spec.model.base, "text encoder", family.text_encoder_files())
    _check_files(vae, spec.model.vae or spec.model.base, "VAE", family.image_encoder_files())
    controlnet = spec.training.controlnet
    if controlnet is not None and controlnet.base is not None:
        check_controlnet(Path(controlnet.base), family)
    _check_lora(spec.training, family)
    _check_embedding(spec.training, family)


def _check_lora(training: TrainingSpec, family: Family) -> None:
    """Refuse a LoRA to start from whose layers the base lacks, or the run does not adapt. Reads only headers."""
    lora = training.lora
    if lora is None or lora.base is None:
        return
    layers = read_adapter(Path(lora.base), family, adapter_file.FIELD).layers
    of_text = [name for name in layers if not name.startswith(f"{family.denoiser_name}.")]
    if of_text and not encodes_text(training):
        raise ConfigError(f"{adapter_file.FIELD}: {lora.base} {adapter_file.describe_text_layers(of_text)}")
    ends = tuple(f".{target}" for target in lora.target_modules)
    left_out = [name for name in layers if name not in of_text and not name.endswith(ends)]
    if left_out:
        raise ConfigError(f"{adapter_file.FIELD}: {lora.base} {adapter_file.describe_left_out(left_out, left_out)}")


def _check_embedding(training: TrainingSpec, family: Family) -> None:
    """Refuse an embedding to start from that is not for the text encoders of the base."""
    inversion = training.textual_inversion
    if inversion is None or inversion.base is None:
        return
    files = find_embedding_files(Path(inversion.base))
    # Without their weights.
    for number, part in enumerate(family.load_text_encoder(torch.device("meta")).parts):
        width = part.core.embeddings.token_embedding.weight.shape[1]
        select_embedding(files, inversion, part.name, number, part.webui_key, width)


def _check_files(field: str, name: str, part: str, files: Sequence[Path]) -> None:
    if not any(path.suffix == ".safetensors" for path in files):
        raise ConfigError(
            f"{field}: {name} has no .safetensors weights of the {part}; use a complete copy, or another model.variant"
        )
    if missing := next((path for path in files if not path.is_file()), None):
        raise ConfigError(f"{field}: {missing} does not exist; use a complete copy")


def check_device(training: TrainingSpec, device: torch.device) -> None:
    """Refuse what the device of this rank does not support. With a memory preset, call it after the preset's choice.

    Raises:
        ConfigError: the message names the field.
    """
    if training.optimizer is Optimizer.ADAMW_8BIT and device.type != "cuda":
        raise ConfigError("training.optimizer: adamw8bit needs a GPU; write adamw or adafactor on CPUs")
    if training.cuda_graphs is SwitchMode.ON:
        choose_graphs(training, GraphFacts(is_gpu=device.type == "cuda"))
    attention_kernel(training.attention, device, DTYPES[precision_of(training)])


def check_sharded(training: TrainingSpec) -> None:
    """Refuse what sharded training does not support.

    Raises:
        ConfigError: the message names the field.
    """
    if training.precision is Precision.FP16:
        raise ConfigError("training.precision: fp16 cannot be combined with sharding; write bf16")
    if training.optimizer is not Optimizer.ADAMW:
        raise ConfigError(
            f"training.optimizer: {training.optimizer.value} cannot be combined with sharding; write adamw"
        )
    if training.aspect_buckets:
        raise ConfigError(
            "training.aspectBuckets: ranks would make different numbers of forward passes, which sharding does not "
            "allow; leave it out, or leave sharding out"
        )
