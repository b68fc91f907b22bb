"""The outputs of a run: checked before the run starts, written and delivered after its last step.

Every output is written once, to a folder of this machine or of its volume, and recorded. Then it is delivered to its
target. An attempt that ends in between leaves the record, so the next one continues there. Outputs that differ only
in their targets are written once.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from finetune_contract.heartbeat import OutputState, UnfinishedOutput, WrittenOutput
from finetune_contract.outputs.request import written_in_training
from finetune_contract.outputs.spec import OutputFormat, OutputSpec
from finetune_contract.requirements import find_missing_export
from finetune_contract.spec import Method
from finetune_trainer.delivery.folder_target import WRITING, FolderTarget
from finetune_trainer.delivery.open import DeliveryPlace, open_target
from finetune_trainer.delivery.staged import OutputRecord, StagedOutput, describe_file
from finetune_trainer.delivery.target import ExportStage, OnExportStage, Target
from finetune_trainer.errors import ConfigError, RankError, StorageError
from finetune_trainer.export.formats.about import NO_ORIGIN, About
from finetune_trainer.export.formats.names import expected_names
from finetune_trainer.export.formats.write import write_format
from finetune_trainer.files import sync_file, sync_folder, use_default_mode, write_atomically
from finetune_trainer.methods.method import Method as TrainedMethod

DEFAULT_OUTPUTS = (OutputSpec(format=OutputFormat.DIFFUSERS, to="."),)
_EXPORTS = "exports"
"""Folder of the records, below the job's folder."""
_OF_TARGET = {"to", "secret"}
"""Fields of an output that do not change its files."""

WriteFiles = Callable[[OutputSpec, Path], Iterable[Path]]
"""Writes the files of an output into an empty folder, and returns their paths."""
Report = Callable[[tuple[WrittenOutput, ...], tuple[UnfinishedOutput, ...]], None]


@dataclass(frozen=True)
class Export:
    """One export of a job's outputs.

    Attributes:
        place: where the outputs go.
        job_uid: UID of the job.
        source: name of the checkpoint with the weights; empty if it is unknown. Only with it, an export continues what
            an earlier one has left.
        report: receives the finished and the unfinished outputs at every change.
        on_stage: called at each point of the export.
        about: the origin of the weights.
        finished: outputs that an earlier call has finished, by their numbers; this call adds its own.
        records: name of a folder for the records, so that exports of several checkpoints do not remove each other's.
    """

    place: DeliveryPlace
    job_uid: str = ""
    source: str = ""
    report: Report = lambda finished, unfinished: None
    on_stage: OnExportStage = lambda _: None
    about: About = NO_ORIGIN
    finished: dict[int, WrittenOutput] = field(default_factory=dict)
    records: str = ""


def check_outputs(outputs: Sequence[OutputSpec], formats: frozenset[OutputFormat]) -> None:
    """Refuse formats that could not be written at the end of the run.

    Args:
        outputs: the outputs of the manifest.
        formats: formats that the method can write.

    Raises:
        ConfigError: an output has a format that the method cannot write.
    """
    for number, output in enumerate(outputs):
        if output.format not in formats:
            known = ", ".join(sorted(known.value for known in formats))
            raise ConfigError(f"outputs[{number}].format: the method cannot write {output.format.value}; write {known}")


def check_packages(outputs: Sequence[OutputSpec]) -> None:
    """Refuse formats that the packages installed here cannot write.

    Raises:
        ConfigError: the message names the field, the packages and how to install them.
    """
    for message in find_missing_export(outputs):
        raise ConfigError(message)


def check_targets(outputs: Sequence[OutputSpec], place: DeliveryPlace, method: Method | None = None) -> None:
    """Refuse outputs that this machine cannot write, and targets that cannot be written. Only rank 0 calls it.

    Args:
        outputs: the outputs of the manifest.
        place: where they go.
        method: what trains; None: a script.

    Raises:
        ConfigError: the message names the field, the reason and the remedy.
        NetworkError: a target does not answer.
    """
    check_packages(written_in_training(outputs))
    targets = [open_target(number, output, place) for number, output in enumerate(outputs)]
    _check_differ([target.location for target in targets])
    for output, target in zip(outputs, targets, strict=True):
        target.check(expected_names(output, place.job, method))


def _check_differ(locations: Sequence[str]) -> None:
    """Refuse two outputs at one place, however it is spelled: the second would replace files of the first.

    Raises:
        ConfigError: the message names both outputs.
    """
    first: dict[str, int] = {}
    for number, location in enumerate(locations):
        place = location if "://" in location else os.path.realpath(location)
        other = first.setdefault(place, number)
        if other != number:
            raise ConfigError(
                f"outputs[{number}].to: {location} is the target of outputs[{other}], too, and its files would be "
                "replaced; write a different to for each"
            )


def kinds_of_weights(outputs: Sequence[OutputSpec]) -> list[bool]:
    """Return which weights outputs need: the moving average (true), those of the last step (false), or both in turn."""
    return sorted({output.ema is not False for output in outputs or DEFAULT_OUTPUTS}, reverse=True)


def write_outputs(
    method: TrainedMethod, outputs: Sequence[OutputSpec], export: Export | Path, *, averaged: bool | None = None
) -> tuple[WrittenOutput, ...]:
    """Write and deliver outputs. Writing the same weights again gives the same bytes.

    Args:
        method: the trained method.
        outputs: the outputs of the manifest; if empty, `DEFAULT_OUTPUTS`.
        export: the export, or only the job's folder.
        averaged: which weights the method holds now, the moving average or those of the last step: only outputs of
            these are written. None: all outputs are.

    Raises:
        ConfigError: a target refuses its output for good.
        StorageError, NetworkError: an output cannot be written or delivered now.
    """

    about = NO_ORIGIN if isinstance(export, Path) else export.about

    def write(output: OutputSpec, folder: Path) -> Iterable[Path]:
        with method.trained() as trained:
            return write_format(trained, output, folder, about)

    return deliver_outputs(write, outputs or DEFAULT_OUTPUTS, export, averaged=averaged)


def deliver_outputs(
    write: WriteFiles, outputs: Sequence[OutputSpec], export: Export | Path, *, averaged: bool | None = None
) -> tuple[WrittenOutput, ...]:
    """Write and deliver outputs; see `write_outputs`.

    Args:
        write: writes the files of one output.
        outputs: the outputs.
        export: the export, or only the job's folder.
        averaged: see `write_outputs`.

    Raises:
        ConfigError: one output cannot be written, or a target refuses it for good; all other outputs are delivered.
        StorageError, NetworkError: an output cannot be written or delivered now.
    """
    if isinstance(export, Path):
        export = Export(DeliveryPlace(export))
    board, refusals = _Board(outputs, export.report, export.finished), list[ConfigError]()
    for numbers in _groups(outputs):
        if averaged is not None and averaged is (outputs[numbers[0]].ema is False):
            continue
        try:
            _Group(numbers, outputs, export, board).run(write)
        except ConfigError as error:
            refusals.append(error)
    if refusals:
        raise refusals[0]
    return board.finished


def _groups(outputs: Sequence[OutputSpec]) -> list[list[int]]:
    """Return the indexes of the outputs, those that differ only in their targets together."""
    groups: dict[str, list[int]] = {}
    for number, output in enumerate(outputs):
        groups.setdefault(_options(output), []).append(number)
    return list(groups.values())


def _options(output: OutputSpec) -> str:
    """Return the fields of an output on which its files depend, as text."""
    return output.model_dump_json(by_alias=True, exclude=_OF_TARGET, exclude_defaults=True)


@dataclass
class _Board:
    """What is reported about the outputs of an export."""

    outputs: Sequence[OutputSpec]
    report: Report
    done: dict[int, WrittenOutput] = field(default_factory=dict)
    unfinished: dict[int, UnfinishedOutput] = field(default_factory=dict)

    @property
    def finished(self) -> tuple[WrittenOutput, ...]:
        """The finished outputs, in the order of the manifest."""
        return tuple(self.done[number] for number in sorted(self.done))

    def set(self, number: int, state: OutputState, to: str, **figures: object) -> None:
        """Report the state of an unfinished output."""
        entry = UnfinishedOutput(format=self.outputs[number].format.value, to=to, state=state)
        self.unfinished[number] = entry.model_copy(update=figures)
        self._send()

    def finish(self, number: int, to: str, record: OutputRecord) -> None:
        """Report a finished output."""
        self.unfinished.pop(number, None)
        self.done[number] = WrittenOutput(
            format=self.outputs[number].format.value, to=to, size_bytes=record.size_bytes, sha256=record.sha256
        )
        self._send()

    def _send(self) -> None:
        self.report(self.finished, tuple(self.unfinished[number] for number in sorted(self.unfinished)))


class _Group:
    """Outputs with the same files: written once, delivered to each target."""

    def __init__(self, numbers: Sequence[int], outputs: Sequence[OutputSpec], export: Export, board: _Board) -> None:
        self._output = outputs[numbers[0]]
        self._export, self._board = export, board
        self._targets = {number: open_target(number, outputs[number], export.place) for number in numbers}
        identity = f"{export.job_uid} {export.source} {_options(self._output)}"
        self._key = hashlib.sha256(identity.encode()).hexdigest()[:12]
        self._records = export.place.job_dir / _EXPORTS / export.records

    def run(self, write: WriteFiles) -> None:
        """Write what is missing, and deliver it where it is missing."""
        with self._failures(*self._targets):
            record = self._read_record()
            missing = self._missing(record)
            folder = self._folder()
            if missing and (record is None or not self._is_staged(record, folder, missing)):
                record = self._write(write, folder)
        assert record is not None
        staged = StagedOutput(record, folder, self._key)
        for number, target in self._in_order(folder):
            with self._failures(number):
                if number in missing:
                    self._deliver(number, target, staged)
            self._board.finish(number, target.location, record)
        shutil.rmtree(folder, ignore_errors=True)

    def _missing(self, record: OutputRecord | None) -> set[int]:
        if record is None:
            return set(self._targets)
        return {number for number, target in self._targets.items() if not target.holds(record)}

    def _folder(self) -> Path:
        """Return the folder to write to: next to the first target that is a folder, so that nothing is copied later."""
        for target in self._targets.values():
            if isinstance(target, FolderTarget):
                return target.staging_folder(self._key)
        return self._records / f"{self._key}{WRITING}"

    def _is_staged(self, record: OutputRecord, folder: Path, missing: set[int]) -> bool:
        """Return whether an earlier export has left all files, or has renamed the others into the only target left."""
        last = [self._targets[number] for number in missing]
        for file in record.files:
            path = folder / file.name
            if path.is_file() and path.stat().st_size == file.size_bytes:
                continue
            if len(last) != 1 or not isinstance(last[0], FolderTarget) or not last[0].has(file):
                return False
        return True

    def _write(self, write: WriteFiles, folder: Path) -> OutputRecord:
        for number, target in self._targets.items():
            self._board.set(number, OutputState.WRITING, target.location)
        self._export.on_stage(ExportStage.WRITE)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        try:
            files = sorted(write(self._output, folder))
        except ConfigError:
            # The output may get another format, and then another folder.
            shutil.rmtree(folder, ignore_errors=True)
            raise
        use_default_mode(files, folder)
        for file in files:
            sync_file(file)
        for parent in {file.parent for file in files} | {folder}:
            sync_folder(parent)
        place = self._export.place
        record = OutputRecord(
            namespace=place.namespace,
            job=place.job,
            job_uid=self._export.job_uid,
            format=self._output.format.value,
            source=self._export.source,
            files=tuple(describe_file(file, file.relative_to(folder).as_posix()) for file in files),
        )
        self._export.on_stage(ExportStage.WRITTEN)
        if self._export.source:
            self._remove_old_records()
            write_atomically(self._record_file, record.to_json().encode())
        self._export.on_stage(ExportStage.RECORDED)
        return record

    def _deliver(self, number: int, target: Target, staged: StagedOutput) -> None:
        board, total = self._board, staged.record.size_bytes

        def progress(done_bytes: int, total_bytes: int) -> None:
            board.set(number, OutputState.UPLOADING, target.location, done_bytes=done_bytes, size_bytes=total_bytes)

        progress(0, total)
        target.deliver(staged, self._export.on_stage, progress)
        self._export.on_stage(ExportStage.PUBLISHED)

    def _in_order(self, folder: Path) -> Iterator[tuple[int, Target]]:
        """Yield the targets: the one that receives the written files themselves is the last one."""

        def is_last(target: Target) -> bool:
            return isinstance(target, FolderTarget) and target.staging_folder(self._key) == folder

        yield from sorted(self._targets.items(), key=lambda item: is_last(item[1]))

    @property
    def _record_file(self) -> Path:
        return self._records / f"{self._key}.json"

    def _read_record(self) -> OutputRecord | None:
        if not self._export.source:
            return None
        try:
            return OutputRecord.parse(self._record_file.read_bytes())
        except FileNotFoundError:
            return None

    def _remove_old_records(self) -> None:
        """Remove the records of other checkpoints, and what exports of them have left."""
        for path in self._records.glob("*.json"):
            found = OutputRecord.parse(path.read_bytes())
            if found is None or found.source != self._export.source:
                path.unlink(missing_ok=True)
                shutil.rmtree(path.with_suffix(WRITING), ignore_errors=True)

    @contextlib.contextmanager
    def _failures(self, *numbers: int) -> Iterator[None]:
        """Report the failure of outputs, and translate the errors of the disk.

        Raises:
            StorageError: the disk fails.
        """
        try:
            yield
        except OSError as error:
            path = error.filename or self._records
            raised = StorageError(f"outputs: cannot write to {path}: {error.strerror or error}")
            self._fail(numbers, raised)
            raise raised from error
        except RankError as error:
            self._fail(numbers, error)
            raise

    def _fail(self, numbers: Iterable[int], error: RankError) -> None:
        for number in numbers:
            self._board.set(number, OutputState.FAILED, self._targets[number].location, message=str(error)[:500])
