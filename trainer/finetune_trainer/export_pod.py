"""The process of an export pod: writes outputs from a checkpoint of its job, or from what its script has written.

`python -m finetune_trainer.export_pod`, started by the operator's pod manifest. It runs on the CPU, without the data
set and without the other pods. A kill at any point is safe: the next pod completes what is missing.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import ValidationError

from finetune_contract import environment
from finetune_contract.exit_codes import ExitCode
from finetune_contract.heartbeat import OutputState, UnfinishedOutput, WrittenOutput
from finetune_contract.input_spec import ModelSpec
from finetune_contract.methods import needs_whole_base
from finetune_contract.outputs.pictures import fetch_pictures
from finetune_contract.outputs.request import ExportedOutput, ExportRequest, ExportResult
from finetune_contract.run_spec import RunSpec
from finetune_trainer import libraries
from finetune_trainer.checkpoint.snapshot import Committed
from finetune_trainer.checkpoint.store.base import checkpoint_name
from finetune_trainer.checkpoint.store.select import JobFolders, has_checkpoints, make_store, open_bucket
from finetune_trainer.delivery.open import DeliveryPlace, open_target
from finetune_trainer.errors import ConfigError, RankError, StorageError
from finetune_trainer.export.formats.about import About
from finetune_trainer.export.from_checkpoint import export_with
from finetune_trainer.export.outputs import Export, check_targets
from finetune_trainer.models.hub import limit_waits
from finetune_trainer.outages import exit_code_of
from finetune_trainer.script.outputs import ScriptRecord, ScriptResult, write_script_outputs
from finetune_trainer.supervisor.termination_message import MAX_MESSAGE_BYTES

_LOG = logging.getLogger(__name__)
MAX_MESSAGE = 1000
"""Characters kept of an error: the result must fit into a termination message."""


@dataclass
class ExportJob:
    """What the pod manifest says.

    Attributes:
        spec: the run.
        request: what to export.
        place: where the outputs go.
        cache_dir: folder shared by all jobs.
        states: state of each output, by its index.
        step: step of the checkpoint, once it is known.
    """

    spec: RunSpec
    request: ExportRequest
    place: DeliveryPlace
    cache_dir: Path
    states: dict[int, ExportedOutput] = field(default_factory=dict)
    step: int | None = None

    @property
    def records(self) -> str:
        """Name of the folder for what an interrupted export needs: that of the training for the job's own outputs."""
        return self.request.id

    def report(self, finished: tuple[WrittenOutput, ...], unfinished: tuple[UnfinishedOutput, ...]) -> None:
        """Record the states of outputs, and log each change."""
        for index, output in enumerate(self.request.outputs):
            to = open_target(index, output, self.place).location
            for done in finished:
                if (done.format, done.to) == (output.format.value, to):
                    self._set(index, ExportedOutput(index=index, size_bytes=done.size_bytes, sha256=done.sha256), to)
            for each in unfinished:
                if (each.format, each.to, each.state) == (output.format.value, to, OutputState.FAILED):
                    self._set(index, ExportedOutput(index=index, error=each.message or "unknown error"), to)

    def _set(self, index: int, state: ExportedOutput, to: str) -> None:
        if self.states.get(index) != state:
            self.states[index] = state
            _LOG.info("%s: %s", to, f"failed: {state.error}" if state.error else f"complete, {state.size_bytes} bytes")

    def result(self, message: str | None = None) -> ExportResult:
        """Return the result so far."""
        outputs = tuple(self.states[index] for index in sorted(self.states))
        return ExportResult(step=self.step, outputs=outputs, message=message)


def read_job(env: Mapping[str, str]) -> ExportJob:
    """Read the variables of the pod manifest.

    Raises:
        ConfigError: a variable is missing or invalid.
    """
    try:
        spec = RunSpec.read(Path(env[environment.RUN_SPEC]))
        request = ExportRequest.model_validate_json(env[environment.EXPORT])
        job_dir, cache_dir = Path(env[environment.CHECKPOINT_DIR]), Path(env[environment.CACHE_DIR])
    except KeyError as error:
        raise ConfigError(f"{error.args[0]} is not set; the operator starts export pods") from error
    except (OSError, ValidationError) as error:
        raise ConfigError(f"{environment.RUN_SPEC} or {environment.EXPORT} cannot be read: {error}") from error
    secrets = env.get(environment.OUTPUT_SECRETS)
    bucket = env.get(environment.BUCKET) or None
    place = DeliveryPlace(job_dir, spec.namespace, spec.job, bucket, Path(secrets) if secrets else None)
    return ExportJob(spec, request, place, cache_dir)


def carry_out(job: ExportJob) -> None:
    """Write the outputs of a request.

    Raises:
        RankError: an output cannot be written; `job.states` tells which are complete.
    """
    check_targets(job.request.outputs, job.place, job.spec.training.method)
    if job.spec.training.script is not None:
        _export_script(job)
        return
    found = find_checkpoint(job)
    job.step = found.manifest.step
    bucket = open_bucket(job.place.bucket)
    if bucket is not None:
        try:
            fetch_pictures(bucket, job.place.job_dir, found.manifest.step)
        except OSError as error:
            raise StorageError(f"validation: {error}") from error
    export = Export(job.place, job.spec.uid, found.folder.name, report=job.report, records=job.records)
    export_with(job.spec, found.folder, job.request.outputs, job.cache_dir, export)


def find_checkpoint(job: ExportJob) -> Committed:
    """Return the checkpoint of the requested step, or the newest one; from a bucket, it is fetched first.

    Raises:
        ConfigError: there is none.
        StorageError: it cannot be read, or is damaged.
    """
    folders = JobFolders(job.place.job_dir, bucket=open_bucket(job.place.bucket))
    store = make_store(job.spec, 1, folders, 0)
    kept = sorted(store.kept(), reverse=True) if has_checkpoints(folders) else []
    step = job.request.step
    chosen = next((each for each in kept if step is None or each[0] == step), None)
    if chosen is not None:
        return store.find(checkpoint_name(*chosen))
    steps = ", ".join(str(number) for number in sorted({number for number, _ in kept}))
    if not steps:
        raise ConfigError("the job has no complete checkpoint that could be exported")
    raise ConfigError(f"step: the job has no checkpoint of step {step}; write one of the kept ones: {steps}")


def _export_script(job: ExportJob) -> None:
    record = ScriptRecord.read(job.place.job_dir)
    base = ModelSpec.model_validate(record.base)
    whole = needs_whole_base(None, job.request.outputs)
    job.step = record.step
    about = About(job.spec.job, step=record.step, cache=job.cache_dir)
    export = Export(job.place, job.spec.uid, record.source, report=job.report, about=about, records=job.records)
    result = ScriptResult(Path(record.folder), base, job.cache_dir, whole)
    write_script_outputs(result, job.request.outputs, export)


def run(env: Mapping[str, str]) -> tuple[ExitCode, ExportResult]:
    """Carry out the request of the environment; return the exit code and the result."""
    libraries.prepare(env)
    limit_waits()
    job: ExportJob | None = None
    try:
        job = read_job(env)
        carry_out(job)
    except RankError as error:
        _LOG.error("%s", error)
        code, message = exit_code_of(error, error.code), str(error)
    except Exception as error:
        _LOG.exception("unexpected error in the export")
        code, message = exit_code_of(error, ExitCode.SOFTWARE), f"{type(error).__name__}: {error}"
    else:
        return ExitCode.DONE, job.result()
    message = message[:MAX_MESSAGE]
    return code, job.result(message) if job is not None else ExportResult(message=message)


def main(arguments: Sequence[str] | None = None, env: Mapping[str, str] = os.environ) -> int:
    """Export, and write the result to the pod's termination message; return an exit code of the contract."""
    del arguments
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(message)s")
    # Without a handler, the first process of a container ignores SIGTERM.
    signal.signal(signal.SIGTERM, lambda *_: os._exit(128 + signal.SIGTERM))
    code, result = run(env)
    write_result(env.get(environment.TERMINATION_LOG), result)
    return code


def write_result(path: str | None, result: ExportResult) -> None:
    """Write the termination message. If it is too long, the errors of the outputs are shortened."""
    if not path:
        return
    text = result.to_json()
    if len(text.encode()) > MAX_MESSAGE_BYTES:
        short = [each.model_copy(update={"error": each.error and each.error[:100]}) for each in result.outputs]
        text = result.model_copy(update={"outputs": tuple(short), "message": (result.message or "")[:500]}).to_json()
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        _LOG.warning("the result cannot be written to %s: %s: %s", path, error.strerror, json.dumps(text))


if __name__ == "__main__":
    sys.exit(main())
