"""`finetune validate`: checks a manifest; with --here also this machine, with --cluster also a cluster."""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from finetune_operator.api.job import FineTuneJob
from finetune_operator.api.kueue import find_contradiction
from finetune_operator.api.rules.supported import find_missing
from finetune_operator.cli.errors import Exit, UsageError
from finetune_operator.cli.manifest import ManifestFile, make_absolute, read_manifest
from finetune_operator.cli.preflight.check import find_problems, find_warnings, measure_machine
from finetune_operator.cluster.local.home import Home
from finetune_operator.cluster.local.settings import LOCAL
from finetune_operator.plan.policies.acceptance import find_pod_faults, find_unsupported
from finetune_operator.settings import Settings


def validate(arguments: argparse.Namespace) -> Exit:
    """Carry out `finetune validate`."""
    manifest = read_manifest(arguments.file, arguments.set)
    job = manifest.job
    settings = Settings() if arguments.cluster else LOCAL
    # Whether a cluster has queues and PodGroups is checked there, and what its administrator has set is not known here;
    # without --here the job may be meant for any cluster.
    settings = replace(settings, kueue=True, gangs=True, rack_label=LOCAL.rack_label)
    problems = list(_manifest_problems(job, settings))
    warnings: list[str] = []
    places = []
    if arguments.here:
        local = make_absolute(job, arguments.file.absolute().parent)
        problems += find_problems(local, Home(arguments.home), measure_machine())
        warnings += find_warnings(local.spec)
        places.append("can run on this machine")
    if arguments.cluster:
        path = arguments.kubeconfig or Path(os.environ.get("KUBECONFIG") or "~/.kube/config").expanduser()
        found, notes = asyncio.run(_ask_cluster(path, arguments.context, manifest))
        problems, warnings = [*problems, *found], [*warnings, *notes]
        places.append("can run on the cluster")
    if problems:
        raise UsageError("\n".join(f"{arguments.file}: {problem}" for problem in dict.fromkeys(problems)))
    for warning in warnings:
        sys.stderr.write(f"finetune: warning: {warning}\n")
    sys.stdout.write(f"finetunejob {job.metadata.name!r} {' and '.join(['is valid', *places])}\n")
    return Exit.SUCCEEDED


def _manifest_problems(job: FineTuneJob, settings: Settings) -> Iterator[str]:
    """Yield what the operator would refuse, without looking at files, devices or a cluster."""
    yield from find_missing(job.spec)
    yield from find_unsupported(job, settings)
    yield from filter(None, [find_contradiction(job)])
    yield from find_pod_faults(job, settings)


async def _ask_cluster(path: Path, context: str | None, manifest: ManifestFile) -> tuple[list[str], list[str]]:
    """Return the problems and the warnings of the cluster.

    Raises:
        UsageError: the kubeconfig cannot be read, or the API server does not answer.
    """
    # Imported late: the client takes longer to import than all other checks.
    from finetune_operator.cli.preflight.cluster import ClusterCheck  # noqa: PLC0415
    from finetune_operator.cluster.kube.client.client import (  # noqa: PLC0415
        ApiError,
        KubeApi,
        SetupError,
        connect,
    )
    from finetune_operator.cluster.kube.client.clock import ServerClock  # noqa: PLC0415

    try:
        client = await connect(path, context, num_connections=4)
    except SetupError as error:
        raise UsageError(f"--cluster: {error}; write --kubeconfig FILE") from error
    api = KubeApi(client, ServerClock())
    try:
        report = await ClusterCheck(api, manifest.job, manifest.document, manifest.siblings).run()
    except ApiError as error:
        raise UsageError(f"--cluster: the API server of {path} cannot be asked: {error}") from error
    finally:
        await api.close()
    return report.problems, report.warnings
