"""Outputs of a script: its files as they are, or what they contain in another format. Only rank 0 calls it."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from finetune_contract import paths
from finetune_contract.heartbeat import WrittenOutput
from finetune_contract.input_spec import ModelSpec
from finetune_contract.outputs.spec import OutputFormat, OutputSpec
from finetune_trainer.errors import ConfigError, StorageError
from finetune_trainer.export.formats.open import open_trained
from finetune_trainer.export.formats.write import write_format
from finetune_trainer.export.outputs import Export, deliver_outputs
from finetune_trainer.files import write_atomically
from finetune_trainer.models.base import FAMILIES, find_folder, read_json
from finetune_trainer.models.hub import HubFiles
from finetune_trainer.models.layouts.trained import Trained
from finetune_trainer.script.checkpoints import is_committed

_INDEX = "model_index.json"
_RECORD = "script-result.json"
_REMEDY = "write format: asWritten"


@dataclass(frozen=True)
class ScriptRecord:
    """What a later export needs to know of a script that has ended, in a file of the job's folder.

    Attributes:
        folder: its output folder.
        base: the base that it has trained on, as a document.
        step: its last step.
        source: name of its result, by which an interrupted export is recognized.
    """

    folder: str
    base: dict[str, Any]
    step: int
    source: str

    def write(self, job_dir: Path) -> None:
        """Write the record.

        Raises:
            StorageError: it cannot be written.
        """
        try:
            job_dir.mkdir(parents=True, exist_ok=True)
            write_atomically(job_dir / _RECORD, json.dumps(asdict(self), indent=1).encode())
        except OSError as error:
            raise StorageError(f"outputs: cannot write {job_dir / _RECORD}: {error.strerror or error}") from error

    @classmethod
    def read(cls, job_dir: Path) -> ScriptRecord:
        """Read the record of a job.

        Raises:
            ConfigError: there is none.
        """
        try:
            return cls(**json.loads((job_dir / _RECORD).read_text(encoding="utf-8")))
        except FileNotFoundError as error:
            raise ConfigError("the script of the job has not ended yet: nothing can be exported") from error
        except (OSError, ValueError, TypeError) as error:
            raise StorageError(f"outputs: cannot read {job_dir / _RECORD}: {error}") from error


@dataclass(frozen=True)
class ScriptResult:
    """What a script has written.

    Attributes:
        folder: its output folder.
        base: the base that it has trained on; only formats other than asWritten need it.
        cache_dir: folder for a base that must be converted.
        whole: whether an output contains the base.
    """

    folder: Path
    base: ModelSpec | None = None
    cache_dir: Path | None = None
    whole: bool = False

    @functools.cached_property
    def files(self) -> list[Path]:
        """The files of the script, without its checkpoints and hidden files."""
        return list(written_files(self.folder))

    @functools.cached_property
    def trained(self) -> Trained:
        """What the files contain.

        Raises:
            ConfigError: only copies of the files can be written.
        """
        try:
            return open_trained(self.folder, self.base, self.cache_dir, whole=self.whole)
        except ConfigError as error:
            text = str(error)
            raise ConfigError(text if _REMEDY in text else f"outputs: {text}; or {_REMEDY}") from error


def check_formats(outputs: Sequence[OutputSpec], base: ModelSpec) -> None:
    """Refuse, before the training, formats for bases of which only copies can be written.

    Args:
        outputs: of the manifest.
        base: the base that the script loads.

    Raises:
        ConfigError: the base is of another family.
        NetworkError: the hub cannot be reached.
    """
    if all(output.format is OutputFormat.AS_WRITTEN for output in outputs):
        return
    try:
        index = find_folder(base.base, base.revision, "model.base", HubFiles(without_weights=True)) / _INDEX
        pipeline = read_json(index).get("_class_name") if index.is_file() else None
    except ConfigError:
        # The script itself reports a base that cannot be read; it may also read one that is in no folder.
        return
    if pipeline is not None and pipeline not in FAMILIES:
        raise ConfigError(
            f"outputs: the base {base.base} is a {pipeline}, and only {', '.join(FAMILIES)} can be written in other "
            f"formats; {_REMEDY}"
        )


def write_script_outputs(
    result: ScriptResult, outputs: Sequence[OutputSpec], export: Export | Path
) -> tuple[WrittenOutput, ...]:
    """Write and deliver the outputs of a script.

    Args:
        result: what the script has written.
        outputs: of the manifest.
        export: the export, or only the job's folder.

    Raises:
        ConfigError: a format does not fit what the script has written, or a target refuses its output for good; all
            other outputs are delivered.
        StorageError, NetworkError: an output cannot be written or delivered now, or the script has written no file.
    """
    if outputs and not result.files:
        raise StorageError(
            f"outputs: the script has written no file to {result.folder}; its output_dir must name this folder"
        )
    about = export.about if isinstance(export, Export) else Export.about

    def write(output: OutputSpec, folder: Path) -> Iterable[Path]:
        if output.format is OutputFormat.AS_WRITTEN:
            return _copy(result, folder)
        return write_format(result.trained, output, folder, about)

    return deliver_outputs(write, outputs, export)


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


def _copy(result: ScriptResult, folder: Path) -> Iterator[Path]:
    for file in result.files:
        copy = folder / file.relative_to(result.folder)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, copy)
        yield copy
