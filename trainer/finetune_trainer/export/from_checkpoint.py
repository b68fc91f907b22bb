"""Writes outputs from one checkpoint, in one process and without the data set. `finetune export` starts it.

Usage: python -m finetune_trainer.export.from_checkpoint RUN_SPEC CHECKPOINT OUTPUTS FOLDER CACHE [--dry-run]

OUTPUTS is a JSON list as in a manifest, with absolute folders or URLs. FOLDER keeps what an interrupted export needs to
continue. With --dry-run, everything is checked, and nothing is written.

The moving average is written if the run keeps one and the output does not say otherwise, as at the end of a run.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from finetune_contract import environment
from finetune_contract.exit_codes import ExitCode
from finetune_contract.heartbeat import OutputState, UnfinishedOutput, WrittenOutput
from finetune_contract.identity import InputIdentity
from finetune_contract.manifest import BadCheckpointError, Manifest, read_manifest, verify
from finetune_contract.methods import needs_whole_base
from finetune_contract.outputs.spec import OutputSpec
from finetune_contract.run_spec import RunSpec
from finetune_contract.spec import Attention, Offload, Optimizer, Precision, Sharding, WeightPrecision
from finetune_trainer import libraries
from finetune_trainer.checkpoint.shards import GROUP, ShardReader
from finetune_trainer.checkpoint.snapshot import STATE
from finetune_trainer.checkpoint.split import group_of
from finetune_trainer.checkpoint.state import WEIGHTS_MISMATCH
from finetune_trainer.data.sampling.draws import Draws
from finetune_trainer.delivery.open import DeliveryPlace
from finetune_trainer.errors import ConfigError, RankError, StorageError
from finetune_trainer.export.formats.about import About
from finetune_trainer.export.outputs import Export, Report, check_outputs, check_packages, check_targets, write_outputs
from finetune_trainer.fetched import fetch
from finetune_trainer.methods.method import Method, MethodContext
from finetune_trainer.methods.registry import method_class, method_traits
from finetune_trainer.models.base import open_base, read_json
from finetune_trainer.models.hub import limit_waits

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
    """Write one output from a checkpoint; see `export_outputs`. An interrupted export starts again."""
    (written,) = export_outputs(spec, checkpoint, (output,), cache_dir)
    return written


def export_outputs(
    spec: RunSpec, checkpoint: Path, outputs: Sequence[OutputSpec], cache_dir: Path, job_dir: Path | None = None
) -> tuple[WrittenOutput, ...]:
    """Write outputs from a checkpoint.

    Args:
        spec: the run.
        checkpoint: folder of the checkpoint.
        outputs: their formats, and absolute folders or URLs.
        cache_dir: folder for files that are fetched or converted.
        job_dir: folder that keeps what an interrupted export needs to continue; None: it starts again.

    Raises:
        ConfigError: a format, a target or the checkpoint does not fit.
        StorageError, NetworkError: something cannot be read or written now.
    """
    place = DeliveryPlace(job_dir or cache_dir, spec.namespace, spec.job)
    source = checkpoint.name if job_dir is not None else ""
    return export_with(spec, checkpoint, outputs, cache_dir, Export(place, spec.uid, source, report=_log_states()))


def export_with(
    spec: RunSpec, checkpoint: Path, outputs: Sequence[OutputSpec], cache_dir: Path, export: Export
) -> tuple[WrittenOutput, ...]:
    """Write outputs from a checkpoint; see `export_outputs`. The origin of the weights is added to the export."""
    manifest = _check(spec, checkpoint, outputs, export.place)
    whole = needs_whole_base(spec.training.method, outputs)
    method = _make_method(_pinned(spec, checkpoint, manifest), cache_dir, whole=whole)
    export = replace(export, about=About.of_checkpoint(spec, export.place.job_dir, cache_dir, manifest.step))
    written: dict[str, WrittenOutput] = {}
    for with_ema in dict.fromkeys(spec.training.ema if each.ema is None else each.ema for each in outputs):
        _restore(method.parameters(), checkpoint, manifest, with_ema=with_ema)
        chosen = [each for each in outputs if (spec.training.ema if each.ema is None else each.ema) is with_ema]
        found = write_outputs(method, chosen, export)
        written |= {each.to: result for each, result in zip(chosen, found, strict=True)}
    return tuple(written[each.to] for each in outputs)


def _check(spec: RunSpec, checkpoint: Path, outputs: Sequence[OutputSpec], place: DeliveryPlace) -> Manifest:
    """Return the manifest of a checkpoint after checking everything that an export needs."""
    check_outputs(outputs, method_traits(spec.training.method).formats)
    check_packages(outputs)
    check_targets(outputs, place, spec.training.method)
    return _verified(checkpoint)


def _log_states() -> Report:
    """Return a report that logs the state of each output when it changes."""
    known: dict[str, str] = {}

    def report(_: tuple[WrittenOutput, ...], unfinished: tuple[UnfinishedOutput, ...]) -> None:
        for each in unfinished:
            if known.get(each.to) != each.state:
                known[each.to] = each.state
                # Files are renamed into a folder, or copied.
                is_moved = each.state is OutputState.UPLOADING and "://" not in each.to
                doing = "moving" if is_moved else each.state.value.lower()
                _LOG.info("%s: %s to %s", each.format, doing, each.to)

    return report


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


def _make_method(spec: RunSpec, cache_dir: Path, *, whole: bool) -> Method:
    """Load the models of the run on the CPU."""
    base = fetch(spec.model.base, "model.base", cache_dir, _LOG.info)
    family = open_base(spec.model.model_copy(update={"base": base}), cache_dir, whole=whole)
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
    """Export as the command line says; print each output as JSON, and return an exit code of the contract."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    is_dry = "--dry-run" in given
    run, checkpoint, listed, folder, cache = (each for each in given if each != "--dry-run")
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(message)s")
    libraries.prepare({environment.CACHE_DIR: cache, **os.environ})
    limit_waits()
    try:
        outputs = [OutputSpec.model_validate(each) for each in json.loads(listed)]
        spec = RunSpec.read(Path(run))
        if is_dry:
            place = DeliveryPlace(Path(folder), spec.namespace, spec.job)
            _check(spec, Path(checkpoint), outputs, place)
            return ExitCode.DONE
        written = export_outputs(spec, Path(checkpoint), outputs, Path(cache), Path(folder))
    except RankError as error:
        _LOG.error("%s", error)
        return error.code
    sys.stdout.writelines(f"{each.to_json()}\n" for each in written)
    return ExitCode.DONE


if __name__ == "__main__":
    sys.exit(main())
