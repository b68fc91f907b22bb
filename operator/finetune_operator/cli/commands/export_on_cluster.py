"""`finetune export --cluster`: asks the operator for an export pod, and follows it; needs only rights on the job.

The request is an annotation of the job, so the caller needs no rights on pods or Secrets.
"""

from __future__ import annotations

import argparse
import asyncio
import secrets
import sys
from collections.abc import AsyncGenerator
from contextlib import aclosing
from pathlib import Path

from pydantic import ValidationError

from finetune_contract.methods import METHODS
from finetune_contract.outputs.request import ExportRequest
from finetune_operator.api.job import FineTuneJob
from finetune_operator.api.names import export_pod_name
from finetune_operator.api.status import ExportState, ExportStatus
from finetune_operator.cli.commands.exported import choose_outputs
from finetune_operator.cli.errors import Exit, UsageError
from finetune_operator.cli.manifest import load_manifest
from finetune_operator.cli.output import formatting
from finetune_operator.cli.output.table import format_columns
from finetune_operator.plan.model.exporting import ACTIVE, find_export
from finetune_operator.plan.policies.exports import find_faults
from finetune_operator.settings import Settings


def export_on_cluster(arguments: argparse.Namespace) -> Exit:
    """Carry out `finetune export --cluster`.

    Raises:
        UsageError: the request is invalid, or the API server refuses it.
    """
    if arguments.folder is not None:
        raise UsageError("--folder: the operator knows the folder of the job; leave --folder or --cluster out")
    # Imported late: the client takes longer to import than everything else.
    from finetune_operator.client.asynchronous import AsyncFineTuneJobs, JobNotFoundError  # noqa: PLC0415
    from finetune_operator.cluster.kube.client.client import ApiError, SetupError  # noqa: PLC0415

    name, namespace = _key(arguments)

    async def run() -> Exit:
        async with AsyncFineTuneJobs(namespace, kubeconfig=arguments.kubeconfig, context=arguments.context) as jobs:
            job = await jobs.get(name)
            if arguments.list:
                return _list(job)
            request = choose_request(arguments, job)
            if arguments.dry_run:
                await jobs.request_export(job, request, dry_run=True)
                for output in request.outputs:
                    sys.stdout.write(f"{_step(request.step)}: would write {output.format} to {output.to}\n")
                return Exit.SUCCEEDED
            await jobs.request_export(job, request)
            sys.stdout.write(f"requested; the operator starts the pod {export_pod_name(name)}\n")
            async with aclosing(jobs.watch(name)) as changes:
                return await follow(changes, request)

    try:
        return asyncio.run(run())
    except SetupError as error:
        raise UsageError(f"--cluster: {error}; write --kubeconfig FILE") from error
    except JobNotFoundError as error:
        raise UsageError(str(error)) from error
    except ApiError as error:
        raise UsageError(f"--cluster: the API server refuses the request: {error}") from error


def _key(arguments: argparse.Namespace) -> tuple[str, str]:
    """Return name and namespace of the job that the command line names, by its name or its manifest."""
    path = Path(arguments.job)
    if not path.is_file():
        return arguments.job, arguments.namespace
    meta = load_manifest(path, arguments.set).metadata
    return meta.name, meta.namespace


def choose_request(arguments: argparse.Namespace, job: FineTuneJob) -> ExportRequest:
    """Return the request that the command line describes; by default the outputs of the job.

    Raises:
        UsageError: it is invalid, or another request is in progress.
    """
    busy = find_export(job.status, own=False)
    if busy is not None and busy.state in ACTIVE:
        raise UsageError(
            f"{job.metadata.name}: the export {busy.request} is in progress ({busy.message or busy.state.value}); wait "
            "for its end"
        )
    chosen = choose_outputs(arguments, job, str, lambda _: True)
    try:
        request = ExportRequest(id=secrets.token_hex(4), step=arguments.step, outputs=chosen.outputs)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        raise UsageError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    if faults := find_faults(job, request, Settings()):
        raise UsageError("\n".join(map(chosen.name_fields, faults)))
    return request


async def follow(changes: AsyncGenerator[FineTuneJob, None], request: ExportRequest) -> Exit:
    """Print each change of an export until it has ended; return whether it succeeded."""
    printed = ""
    async for job in changes:
        export = find_export(job.status, own=False)
        if export is None or export.request != request.id:
            # The operator has not seen the request yet.
            continue
        if export.state in ACTIVE:
            line = f"{export.state.value}: {export.message}" if export.message else export.state.value
            if line != printed:
                sys.stdout.write(f"{line}\n")
                sys.stdout.flush()
            printed = line
            continue
        return _print_end(job, export, request)
    raise UsageError("the job was deleted")


def _print_end(job: FineTuneJob, export: ExportStatus, request: ExportRequest) -> Exit:
    wanted = {(output.format.value, output.to) for output in request.outputs}
    for output in job.status.outputs:
        if (output.format, output.to) in wanted and output.step == request.step and output.sha256 is not None:
            size = formatting.format_size(output.bytes)
            sys.stdout.write(f"{_step(request.step)}: wrote {output.format} to {output.to} ({size})\n")
    if export.state is ExportState.DONE:
        return Exit.SUCCEEDED
    sys.stderr.write(f"finetune: the export failed: {export.message}\n")
    return Exit.FAILED


def _step(step: int | None) -> str:
    return "newest checkpoint" if step is None else f"step {step}"


def _list(job: FineTuneJob) -> Exit:
    """Print what the status tells of checkpoints, outputs and exports."""
    newest = job.status.last_checkpoint
    if newest is not None:
        rows = [(str(newest.step), formatting.format_size(newest.bytes))]
        sys.stdout.write(format_columns(("NEWEST CHECKPOINT", "SIZE"), rows) + "\n")
    written = [
        (output.format, "" if output.step is None else str(output.step), output.state.value, output.to)
        for output in job.status.outputs
    ]
    sys.stdout.write(format_columns(("FORMAT", "STEP", "STATE", "TO"), written))
    exports = [(each.request or "outputs", each.state.value, each.message or "") for each in job.status.exports]
    if exports:
        sys.stdout.write("\n" + format_columns(("EXPORT", "STATE", "MESSAGE"), exports))
    method = job.spec.training.method
    if method is not None:
        sys.stdout.write(f"\nFormats: {', '.join(sorted(METHODS[method].formats))}\n")
    return Exit.SUCCEEDED
