"""Writes an output from one checkpoint, in one process and without the data set. `finetune export` starts it.

Usage: python -m finetune_trainer.export.from_checkpoint RUN_SPEC CHECKPOINT FORMAT TARGET CACHE

The moving average is written if the run keeps one and the output does not say otherwise, as at the end of a run.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from finetune_contract import environment
from finetune_contract.exit_codes import ExitCode
from finetune_contract.heartbeat import WrittenOutput
from finetune_contract.identity import InputIdentity
from finetune_contract.manifest import BadCheckpointError, Manifest, read_manifest, verify
from finetune_contract.run_spec import RunSpec
from finetune_contract.spec import (
    Attention,
    Offload,
    Optimizer,
    OutputFormat,
    OutputSpec,
    Precision,
    Sharding,
    WeightPrecision,
)
from finetune_trainer import libraries
from finetune_trainer.checkpoint.shards import GROUP, ShardReader
from finetune_trainer.checkpoint.snapshot import STATE
from finetune_trainer.checkpoint.split import group_of
from finetune_trainer.checkpoint.state import WEIGHTS_MISMATCH
from finetune_trainer.data.sampling.draws import Draws
from finetune_trainer.delivery.open import DeliveryPlace
from finetune_trainer.errors import ConfigError, RankError, StorageError
from finetune_trainer.export.formats.about import About
from finetune_trainer.export.outputs import Export, check_outputs, check_targets, write_outputs
from finetune_trainer.fetched import fetch
from finetune_trainer.methods.method import Method, MethodContext
from finetune_trainer.methods.registry import method_class, method_traits
from finetune_trainer.models.base import open_base, read_json

_LOG = logging.getLogger(__name__)
_INPUTS = "inputs"
"""Key of a checkpoint's values: the identities of what it was trained on."""
PLAIN = {
    "precision": Precision.FP32,
    "optimizer": Optimizer.ADAMW,
    "attention": Attention.AUTO,
    "sharding": Sharding.NONE,
    "offload": Offload.NONE,
    "compile": False,
    "gradient_checkpointing": False,
    "memory_preset": None,
}
"""Settings that only training needs: the export works on a machine without a GPU."""


def export_checkpoint(spec: RunSpec, checkpoint: Path, output: OutputSpec, cache_dir: Path) -> WrittenOutput:
    """Write an output from a checkpoint.

    Args:
        spec: the run.
        checkpoint: folder of the checkpoint.
        output: its format, and the absolute path of its folder.
        cache_dir: folder for files that are fetched or converted.

    Raises:
        ConfigError: the format or the checkpoint does not fit the run.
        StorageError: something cannot be read or written.
    """
    check_outputs((output,), method_traits(spec.training.method).formats)
    check_targets((output,), DeliveryPlace(Path("/")))
    manifest = _verified(checkpoint)
    method = _make_method(_pinned(spec, checkpoint, manifest), cache_dir)
    with_ema = spec.training.ema if output.ema is None else output.ema
    _restore(method.parameters(), checkpoint, manifest, with_ema=with_ema)
    about = About.of_run(spec, None, cache_dir, manifest.step)
    (written,) = write_outputs(method, (output,), Export(DeliveryPlace(Path("/")), about=about))
    return written


def _verified(checkpoint: Path) -> Manifest:
    try:
        return verify(checkpoint, read_manifest(checkpoint).job_uid)
    except BadCheckpointError as error:
        raise StorageError(f"checkpoint {checkpoint.name} cannot be used: {error}") from error


def _pinned(spec: RunSpec, checkpoint: Path, manifest: Manifest) -> RunSpec:
    """Return the run with the commit of the base that the checkpoint was trained on, if it names one."""
    name = next((file.name for file in manifest.files if Path(file.name).name == STATE), STATE)
    for each in map(InputIdentity.model_validate, read_json(checkpoint / name).get(_INPUTS, ())):
        if each.field == "model.base" and each.commit is not None:
            return spec.model_copy(update={"model": spec.model.model_copy(update={"revision": each.commit})})
    return spec


def _make_method(spec: RunSpec, cache_dir: Path) -> Method:
    """Load the models of the run on the CPU."""
    base = fetch(spec.model.base, "model.base", cache_dir, _LOG.info)
    family = open_base(spec.model.model_copy(update={"base": base}), cache_dir)
    training, dtype = spec.training.model_copy(update=PLAIN), torch.float32
    if training.weight_precision is WeightPrecision.BF16:
        # An average is rounded to the format of the weights, as in the outputs of the job.
        training, dtype = training.model_copy(update={"precision": Precision.BF16}), torch.bfloat16
    context = MethodContext(family, training, Draws(training.seed), torch.device("cpu"), dtype)
    return method_class(training.method)(context)


@torch.no_grad()
def _restore(parameters: Mapping[str, nn.Parameter], checkpoint: Path, manifest: Manifest, *, with_ema: bool) -> None:
    """Copy the weights of a checkpoint into the parameters.

    Raises:
        ConfigError: it holds other weights than the run trains.
        StorageError: it cannot be read.
    """
    files = [checkpoint / entry.name for entry in manifest.files]
    group = "ema" if with_ema else "model"
    found = _read_shards(files, group, parameters) or _read_group(files, group)
    if {name: tuple(value.shape) for name, value in found.items()} != {
        name: tuple(parameter.shape) for name, parameter in parameters.items()
    }:
        raise ConfigError(WEIGHTS_MISMATCH)
    for name, parameter in parameters.items():
        parameter.copy_(found[name])


def _read_group(files: Iterable[Path], group: str) -> dict[str, Tensor]:
    """Return the tensors of one group of a replicated checkpoint."""
    tensors: dict[str, Tensor] = {}
    try:
        for path in files:
            if group_of(path.name) == group:
                tensors |= load_file(path)
    except (OSError, SafetensorError) as error:
        raise StorageError(f"checkpoint: {error}") from error
    return tensors


def _read_shards(files: Sequence[Path], group: str, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Return the complete tensors of one group of a sharded checkpoint; empty for a replicated one."""
    if not any(group_of(path.name) == GROUP for path in files):
        return {}
    reader = ShardReader(files)
    names = [name.removeprefix(f"{group}.") for name in reader.names if name.startswith(f"{group}.")]
    return {
        name: reader.read(f"{group}.{name}", (0,) * len(reader.shape(f"{group}.{name}")), parameters[name])
        for name in names
        if name in parameters and reader.shape(f"{group}.{name}") == tuple(parameters[name].shape)
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Export as the command line says; print the output as JSON, and return an exit code of the contract."""
    run, checkpoint, name, target, cache = sys.argv[1:] if arguments is None else arguments
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(message)s")
    libraries.prepare({environment.CACHE_DIR: cache, **os.environ})
    output = OutputSpec(format=OutputFormat(name), to=target)
    try:
        written = export_checkpoint(RunSpec.read(Path(run)), Path(checkpoint), output, Path(cache))
    except RankError as error:
        _LOG.error("%s", error)
        return error.code
    sys.stdout.write(f"{written.to_json()}\n")
    return ExitCode.DONE


if __name__ == "__main__":
    sys.exit(main())
