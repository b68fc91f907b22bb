"""Copies what a script has written to the outputs of the job, after its end. Only rank 0 calls it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from finetune_contract import paths
from finetune_contract.heartbeat import WrittenOutput
from finetune_contract.outputs.spec import OutputSpec
from finetune_trainer.errors import StorageError
from finetune_trainer.export.outputs import Export, deliver_outputs
from finetune_trainer.script.checkpoints import is_committed


def copy_outputs(source: Path, outputs: Sequence[OutputSpec], export: Export | Path) -> tuple[WrittenOutput, ...]:
    """Copy the files of a script's output folder, without its checkpoints, to each output.

    Args:
        source: output folder of the script.
        outputs: of the manifest.
        export: the export, or only the job's folder.

    Raises:
        ConfigError: a target refuses its output for good.
        StorageError, NetworkError: an output cannot be written or delivered now, or the script has written no file.
    """
    files = list(written_files(source))
    if outputs and not files:
        raise StorageError(f"outputs: the script has written no file to {source}; its output_dir must name this folder")
    return deliver_outputs(lambda _, folder: _copy(source, files, folder), outputs, export)


def written_files(source: Path) -> Iterator[Path]:
    """Yield the files that a script has written, without its checkpoints and hidden files."""
    for entry in sorted(source.iterdir()) if source.is_dir() else ():
        is_checkpoint = entry.name.startswith(("checkpoint-", paths.CORRUPT)) or is_committed(entry)
        if entry.name.startswith(".") or is_checkpoint:
            continue
        if entry.is_file():
            yield entry
        elif entry.is_dir():
            yield from (path for path in sorted(entry.rglob("*")) if path.is_file())


def _copy(source: Path, files: Sequence[Path], folder: Path) -> Iterator[Path]:
    for file in files:
        copy = folder / file.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, copy)
        yield copy
