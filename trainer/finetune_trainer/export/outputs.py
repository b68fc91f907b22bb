"""The outputs of a run: checked before the run starts, written after its last step."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import secrets
import shutil
from collections.abc import Sequence
from pathlib import Path

from finetune_contract import paths
from finetune_contract.heartbeat import WrittenOutput
from finetune_contract.spec import OutputFormat, OutputSpec
from finetune_trainer.errors import ConfigError, StorageError
from finetune_trainer.files import sync_file, sync_folder, use_default_mode
from finetune_trainer.methods.method import Method

DEFAULT_OUTPUTS = (OutputSpec(format=OutputFormat.DIFFUSERS, to="."),)
_WRITING = ".writing"
_PROBE = ".probe-"
_PERMANENT = frozenset(
    {
        errno.EACCES,
        errno.EEXIST,
        errno.EISDIR,
        errno.ELOOP,
        errno.ENAMETOOLONG,
        errno.ENOTDIR,
        errno.EPERM,
        errno.EROFS,
    }
)
"""Errors that remain until somebody changes the path or its permissions; others, such as a full disk, may pass."""
_BLOCK = 1 << 24


def check_outputs(outputs: Sequence[OutputSpec], formats: frozenset[OutputFormat]) -> None:
    """Refuse outputs that could not be written at the end of the run.

    Args:
        outputs: the outputs of the manifest.
        formats: formats that the method can write.

    Raises:
        ConfigError: an output has a format that the method cannot write, or a target that is not a folder.
    """
    for number, output in enumerate(outputs):
        if output.format not in formats:
            known = ", ".join(sorted(known.value for known in formats))
            raise ConfigError(f"outputs[{number}].format: the method cannot write {output.format.value}; write {known}")
        if "://" in output.to:
            raise ConfigError(f"outputs[{number}].to: {output.to} is not a supported target; write a folder")


def check_targets(outputs: Sequence[OutputSpec], job_dir: Path) -> None:
    """Refuse targets that cannot be written. Creates their folders. Only rank 0, which writes them, calls it.

    Raises:
        ConfigError: the message names the field and the reason.
    """
    for number, output in enumerate(outputs):
        folder = job_dir / paths.OUTPUTS / output.to
        try:
            _probe(folder)
        except OSError as error:
            if error.errno in _PERMANENT:
                reason = "a file has this name" if error.errno == errno.EEXIST else error.strerror
                raise ConfigError(
                    f"outputs[{number}].to: cannot write to {folder}: {reason}; write a folder that the "
                    "trainer can write to, or a relative path for a folder in the job's own folder"
                ) from error


def _probe(folder: Path) -> None:
    """Create a folder, and create and remove a file in it."""
    folder.mkdir(parents=True, exist_ok=True)
    probe = folder / f"{_PROBE}{secrets.token_hex(8)}"
    probe.touch(exist_ok=False)
    with contextlib.suppress(OSError):
        probe.unlink()


def write_outputs(method: Method, outputs: Sequence[OutputSpec], job_dir: Path) -> tuple[WrittenOutput, ...]:
    """Write all outputs. Writing the same weights again gives the same bytes.

    Args:
        method: the trained method.
        outputs: the outputs of the manifest; if empty, `DEFAULT_OUTPUTS`.
        job_dir: the job's folder; relative targets are below its folder of outputs.

    Raises:
        StorageError: an output cannot be written.
    """
    return tuple(_write(method, output, job_dir) for output in outputs or DEFAULT_OUTPUTS)


def _write(method: Method, output: OutputSpec, job_dir: Path) -> WrittenOutput:
    folder = job_dir / paths.OUTPUTS / output.to
    temporary = folder / _WRITING
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        files = sorted(method.export(output.format, temporary))
        use_default_mode(files, temporary)
        digest, size = hashlib.sha256(), 0
        for file in files:
            sync_file(file)
            with file.open("rb") as content:
                while block := content.read(_BLOCK):
                    digest.update(block)
            size += file.stat().st_size
            target = folder / file.relative_to(temporary)
            target.parent.mkdir(parents=True, exist_ok=True)
            file.replace(target)
        shutil.rmtree(temporary)
        sync_folder(folder)
    except OSError as error:
        raise StorageError(f"outputs: cannot write to {folder}: {error.strerror or error}") from error
    return WrittenOutput(format=output.format.value, to=str(folder), size_bytes=size, sha256=digest.hexdigest())
