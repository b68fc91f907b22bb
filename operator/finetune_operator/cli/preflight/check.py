"""Runs all checks of a job against this machine. Called by `finetune run` and `finetune validate`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from finetune_contract.cpu.requirements import find_missing_cpu_software
from finetune_contract.input_spec import DatasetSpec
from finetune_contract.methods import METHODS
from finetune_contract.requirements import find_missing_export, find_missing_software
from finetune_operator.api.job import CONTROLLER, Accelerator, FineTuneJob, FineTuneJobSpec, TopologySpec
from finetune_operator.api.rules.supported import find_missing
from finetune_operator.cli.manifest import is_url
from finetune_operator.cli.preflight.dataset import find_dataset_problems, find_metadata
from finetune_operator.cli.preflight.disk import find_disk_problems, find_output_problems, find_storage_problems
from finetune_operator.cli.preflight.model import find_missing_clients, find_model_problems, find_start_problems
from finetune_operator.cli.preflight.script import find_script_problems
from finetune_operator.cluster.local.home import Home
from finetune_operator.cluster.local.kubelet.devices import find_gpus
from finetune_operator.cluster.local.settings import LOCAL
from finetune_operator.manifests import build_pod, num_nodes
from finetune_operator.manifests.merge import MergeError
from finetune_operator.plan.policies.acceptance import find_unsupported

_SOURCE = "spec.dataset.source:"


@dataclass(frozen=True)
class MachineCapacity:
    """Cores and GPUs that the ranks of a job can use."""

    num_cores: int
    num_gpus: int


def measure_machine() -> MachineCapacity:
    """Return the capacity of the machine that this process runs on."""
    return MachineCapacity(len(os.sched_getaffinity(0)), len(find_gpus()))


def find_problems(job: FineTuneJob, home: Home, machine: MachineCapacity) -> list[str]:
    """Return a message for every problem of a job on this machine; empty if it can run.

    Args:
        job: with absolute paths.
        home: the state folder.
        machine: what the ranks can use.
    """
    return [*_spec_problems(job, home, machine), *_template_problems(job)]


def find_warnings(spec: FineTuneJobSpec) -> Iterator[str]:
    """Yield messages about settings that deserve a warning but do not prevent the run."""
    if spec.secrets:
        yield (
            "spec.secrets: a local run has no Secrets; the trainer receives the hub's variables (such as HF_TOKEN) "
            "from your environment"
        )
    requested, dataset = spec.dataset.max_samples, spec.dataset
    metadata = find_metadata(dataset, dataset.split)
    if requested is not None and metadata is not None and metadata.suffix == ".jsonl":
        with metadata.open("rb") as file:
            found = sum(1 for line in islice(file, requested) if line.strip())
        if found < requested:
            yield f"spec.dataset.maxSamples: {requested} samples are requested, but {metadata} contains only {found}"


def _spec_problems(job: FineTuneJob, home: Home, machine: MachineCapacity) -> Iterator[str]:
    spec = job.spec
    unsupported = [*find_unsupported(job, LOCAL), *find_missing(spec)]
    yield from unsupported
    if spec.managed_by != CONTROLLER:
        yield f"spec.managedBy: a local run cannot hand the job to {spec.managed_by}; leave managedBy out"
    if spec.suspend:
        yield "spec.suspend: a suspended job does not run; leave suspend out, and stop the run with Ctrl-C instead"
    yield from _topology_problems(spec, machine)
    yield from find_storage_problems(spec.checkpoint.storage)
    yield from _cluster_only(spec)
    # Fields that the trainer does not support have a message already.
    if spec.training.script is not None:
        yield from find_script_problems(spec.training.script)
    elif spec.model.image is None and not any(message.startswith("spec.model") for message in unsupported):
        yield from find_model_problems(spec.model)
    yield from find_start_problems(spec)
    if spec.training.script is None and not any(message.startswith("spec.dataset") for message in unsupported):
        yield from _data_problems(spec)
    yield from (f"spec.{message}" for message in find_missing_software(spec.training))
    if spec.topology.accelerator is Accelerator.CPU:
        yield from (f"spec.{message}" for message in find_missing_cpu_software(spec.topology.cpu))
    yield from find_missing_clients(spec)
    yield from (f"spec.{message}" for message in find_missing_export(spec.outputs))
    for number, output in enumerate(spec.outputs):
        yield from find_output_problems(number, output)
    yield from find_disk_problems(spec, home)


def _cluster_only(spec: FineTuneJobSpec) -> Iterator[str]:
    """Yield a message for each field that only the nodes of a cluster can carry out."""
    if spec.model.image is not None:
        yield (
            "spec.model.image: a local run mounts no images; copy the weights out of the image, write their folder as "
            "base, and leave image out"
        )
    if spec.topology.gpu_claim_template_name is not None:
        yield "spec.topology.gpuClaimTemplateName: a local run has no resource claims; leave gpuClaimTemplateName out"


def _data_problems(spec: FineTuneJobSpec) -> Iterator[str]:
    """Yield the problems of all data sets and images that the job reads."""
    training, dataset = spec.training, spec.dataset
    needs_captions = training.method is None or METHODS[training.method].needs_captions
    yield from find_dataset_problems(dataset, "dataset.split", dataset.split, needs_captions)
    for number, each in enumerate(dataset.additional):
        field, split = f"dataset.additional[{number}]", each.split or dataset.split
        other = dataset.model_copy(update={"source": each.source, "split": split})
        for problem in find_dataset_problems(other, f"{field}.split", split, needs_captions):
            yield problem.replace(_SOURCE, f"spec.{field}.source:", 1)
    if training.dreambooth is not None and training.dreambooth.class_images is not None:
        field = "training.dreambooth.classImages"
        own = DatasetSpec(source=training.dreambooth.class_images)
        for problem in find_dataset_problems(own, field, own.split, needs_captions=False):
            yield problem.replace(_SOURCE, f"spec.{field}:", 1)
    validation = training.validation
    if validation is not None and validation.split is not None:
        yield from find_dataset_problems(dataset, "training.validation.split", validation.split, needs_captions)
    for number, image in enumerate(validation.images if validation is not None else ()):
        if not is_url(image) and not Path(image).is_file():
            yield f"spec.training.validation.images[{number}]: {image} does not exist; write the path of an image"


def _template_problems(job: FineTuneJob) -> Iterator[str]:
    try:
        build_pod(job, 1, 0, LOCAL)
    except MergeError as error:
        yield f"spec.podTemplate: {error}"


def _topology_problems(spec: FineTuneJobSpec, machine: MachineCapacity) -> Iterator[str]:
    topology = spec.topology
    num_ranks = num_nodes(spec) * topology.processes_per_node
    if topology.accelerator is Accelerator.GPU:
        if machine.num_gpus == 0:
            yield "spec.topology.accelerator: this machine has no GPU; write accelerator: cpu"
        elif num_ranks > machine.num_gpus:
            yield _too_many(topology, num_ranks, machine.num_gpus, "GPUs")
    elif num_ranks > machine.num_cores:
        yield _too_many(topology, num_ranks, machine.num_cores, "cores")


def _too_many(topology: TopologySpec, num_ranks: int, available: int, unit: str) -> str:
    field = "processesPerNode" if topology.processes_per_node > available else "nodes"
    return (
        f"spec.topology.{field}: {num_ranks} ranks do not fit on the {available} {unit} of this machine; "
        f"write nodes and processesPerNode whose product is at most {available}"
    )
