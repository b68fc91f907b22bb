"""Copies what a script has written to the outputs of the job, after its end. Only rank 0 calls it."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from finetune_contract import paths
from finetune_contract.heartbeat import WrittenOutput
from finetune_contract.spec import OutputSpec
from finetune_trainer.errors import StorageError
from finetune_trainer.files import sync_file, sync_folder
from finetune_trainer.script.checkpoints import is_committed, remove_tree

_WRITING = ".writing"


def copy_outputs(source: Path, outputs: Sequence[OutputSpec], job_dir: Path) -> tuple[WrittenOutput, ...]:
    """Copy the files of a script's output folder, without its checkpoints, to each output.

    Args:
        source: output folder of the script.
        outputs: of the manifest.
        job_dir: the job's folder; relative targets are below its folder of outputs.

    Raises:
        StorageError: an output cannot be written, or the script has written no file.
    """
    return tuple(_copy(source, output, job_dir / paths.OUTPUTS / output.to) for output in outputs)


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


def _copy(source: Path, output: OutputSpec, folder: Path) -> WrittenOutput:
    files = list(written_files(source))
    if not files:
        raise StorageError(f"outputs: the script has written no file to {source}; its output_dir must name this folder")
    temporary = folder / _WRITING
    digest, size = hashlib.sha256(), 0
    try:
        remove_tree(temporary, ignore_errors=True)
        for file in files:
            copy, target = temporary / file.relative_to(source), folder / file.relative_to(source)
            for parent in (copy.parent, target.parent):
                parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, copy)
            sync_file(copy)
            with copy.open("rb") as content:
                while block := content.read(1 << 24):
                    digest.update(block)
            size += copy.stat().st_size
            copy.replace(target)
        remove_tree(temporary)
        sync_folder(folder)
    except OSError as error:
        raise StorageError(f"outputs: cannot write to {folder}: {error.strerror or error}") from error
    return WrittenOutput(format=output.format.value, to=str(folder), size_bytes=size, sha256=digest.hexdigest())
