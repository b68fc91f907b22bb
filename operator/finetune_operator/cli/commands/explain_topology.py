"""`finetune explain-topology`: prints the cores, memory and environment that each rank of a job gets on a machine."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from finetune_contract.cpu.backend import INTEL_IMAGE, BackendChoice, choose_backend
from finetune_contract.cpu.libraries import provider_folders
from finetune_contract.cpu.lscpu import parse_lscpu
from finetune_contract.cpu.machine import Machine, format_cpu_list
from finetune_contract.cpu.network import Network, read_network
from finetune_contract.cpu.placement import Placement, PlacementError, PlacementRequest, RankPlace, place_ranks
from finetune_contract.cpu.sysfs import read_machine
from finetune_contract.cpu.variables import fabric_variables, thread_variables
from finetune_operator.api.job import Accelerator, FineTuneJob, FineTuneJobSpec
from finetune_operator.api.quantity import parse_quantity
from finetune_operator.cli.errors import Exit, UsageError
from finetune_operator.cli.manifest import load_manifest
from finetune_operator.cli.output.formatting import pluralize
from finetune_operator.cli.output.table import format_columns
from finetune_operator.manifests import num_nodes
from finetune_operator.manifests.fabric import NCCL, backend
from finetune_operator.manifests.pods import select_image
from finetune_operator.settings import Settings

CPU = "cpu"
NONE = "-"


@dataclass(frozen=True)
class Explanation:
    """What is printed."""

    job: FineTuneJob
    machine: Machine
    choice: BackendChoice
    network: Network
    placement: Placement


def explain_topology(arguments: argparse.Namespace) -> Exit:
    """Carry out `finetune explain-topology`."""
    job = load_manifest(arguments.file, arguments.set)
    machine = _read_lscpu(arguments.lscpu) if arguments.lscpu is not None else read_machine()
    is_this = arguments.lscpu is None
    sys.stdout.write(format_explanation(_explain(job, machine, is_this=is_this), is_this=is_this))
    return Exit.SUCCEEDED


def _read_lscpu(path: Path) -> Machine:
    """Read the description of a machine.

    Raises:
        UsageError: it cannot be read.
    """
    try:
        return parse_lscpu(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise UsageError(f"--lscpu {path}: {reason}") from error


def _explain(job: FineTuneJob, machine: Machine, *, is_this: bool) -> Explanation:
    """Place the ranks of one pod.

    Raises:
        UsageError: they cannot be placed as the job requests.
    """
    spec = job.spec
    topology = spec.topology
    requested = backend(topology)
    has_intel_image = INTEL_IMAGE in _image(spec)
    # The packages of the image count, not those of this machine.
    choice = choose_backend(requested, lambda _: has_intel_image or requested == "ccl")
    machine = _limited(machine, spec)
    request = PlacementRequest.of(topology.cpu, topology.processes_per_node, choice.backend)
    try:
        placement = place_ranks(machine, request)
    except PlacementError as error:
        raise UsageError(f"spec.{error}") from error
    network = read_network(num_nodes(spec) == 1, provider_folders()) if is_this else Network("", "tcp", "")
    return Explanation(job, machine, choice, network, placement)


def _image(spec: FineTuneJobSpec) -> str:
    script = spec.training.script
    return (script.image if script is not None else None) or select_image(spec.topology, Settings())


def _limited(machine: Machine, spec: FineTuneJobSpec) -> Machine:
    """Return the machine with the limit of the pod: topology.resources sets requests and limits."""
    amount = (spec.topology.resources or {}).get(CPU)
    if amount is None:
        return machine
    limit = float(parse_quantity(str(amount)))
    return replace(machine, quota=limit if machine.quota is None else min(limit, machine.quota))


def format_explanation(explanation: Explanation, *, is_this: bool) -> str:
    """Return the explanation as text.

    Args:
        explanation: what was decided.
        is_this: whether the machine is this one.
    """
    job, placement = explanation.job, explanation.placement
    header = ("Ranks", "Threads", "Compute CPUs", "Communication CPUs", "Memory")
    rows = (_row(job.spec, local_rank, place) for local_rank, place in enumerate(placement.ranks))
    lines = [*_head(explanation, is_this=is_this), "", format_columns(header, rows).rstrip(), ""]
    lines += [f"Environment of rank 0 ({_image(job.spec)}):"]
    lines += [f"  {name}={value}" for name, value in sorted(_variables(explanation).items())]
    return "\n".join(lines) + "\n"


def _head(explanation: Explanation, *, is_this: bool) -> Iterator[str]:
    job, machine = explanation.job, explanation.machine
    nodes, each = num_nodes(job.spec), job.spec.topology.processes_per_node
    where = "this machine" if is_this else "the machine of the file"
    yield (
        f"{job.metadata.name}: {pluralize(nodes, 'node')} x {pluralize(each, 'rank')}; each node like {where}: "
        f"{machine.describe()}"
    )
    if machine.assumed:
        yield f"note: {machine.assumed}"
    yield f"placement: {explanation.placement.reason}"
    yield f"backend: {explanation.choice.backend} ({explanation.choice.reason})"
    if explanation.network.reason and explanation.choice.backend != NCCL:
        yield f"network: interface {explanation.network.interface or 'any'} ({explanation.network.reason})"
    if machine.has_shared_cpus:
        yield (
            "note: with resources.cpu equal to the number of hardware threads, or with the static CPU policy of the "
            "kubelet, each thread gets a core of its own"
        )
    num_numa = len({core.numa_node for core in machine.cores})
    if each != num_numa and job.spec.topology.accelerator is Accelerator.CPU:
        yield f"note: processesPerNode: {num_numa} gives one rank per NUMA node"


def _row(spec: FineTuneJobSpec, local_rank: int, place: RankPlace) -> tuple[str, ...]:
    """Return the row of a local rank: it has one number in each node."""
    each = spec.topology.processes_per_node
    ranks = [str(node * each + local_rank) for node in range(num_nodes(spec))]
    shown = ", ".join(ranks if len(ranks) <= 4 else [*ranks[:2], "...", ranks[-1]])
    communication = format_cpu_list(place.communication)
    if communication and not place.has_own_communication:
        communication += " (shared)"
    return (
        shown,
        str(place.num_threads),
        format_cpu_list(place.compute) or "any",
        communication or NONE,
        f"NUMA node {format_cpu_list(place.memory)}" if place.memory else NONE,
    )


def _variables(explanation: Explanation) -> Mapping[str, str]:
    """Return the variables that the supervisor sets for rank 0."""
    placement = explanation.placement
    fabric = fabric_variables(placement, 0, explanation.choice.backend, explanation.network, {})
    return {**thread_variables(placement.ranks[0], {}), **fabric}
