"""The run specification of a job, and the numbers of its gang that are derived from the spec."""

from __future__ import annotations

import hashlib

from finetune_contract.input_spec import ModelSpec
from finetune_contract.methods import with_defaults
from finetune_contract.outputs.request import written_in_training
from finetune_contract.run_spec import RunSpec, RunTarget
from finetune_operator.api.duration import parse_seconds
from finetune_operator.api.job import FineTuneJob, FineTuneJobSpec

HASH_CHARACTERS = 10
DEFAULT_MAX_STALE = "30m"
"""Default of checkpoint.maxStale."""


def num_nodes(spec: FineTuneJobSpec) -> int:
    """Return the number of pods in the gang."""
    return spec.topology.nodes or spec.topology.max_nodes or 1


def global_batch(spec: FineTuneJobSpec) -> int:
    """Return the samples in one optimizer step: fixed for the job, even if the number of pods changes."""
    training = spec.training
    num_ranks = num_nodes(spec) * spec.topology.processes_per_node
    return training.batch_size * training.gradient_accumulation * num_ranks


def build_target(spec: FineTuneJobSpec) -> RunTarget:
    """Return the part of the run specification that each attempt receives anew."""
    return RunTarget(steps=spec.training.steps, epochs=spec.training.epochs, outputs=spec.outputs)


def hash_target(spec: FineTuneJobSpec) -> str:
    """Return a hash of the target, by which an attempt is compared with an edited spec.

    Outputs that an export pod writes after the training are not part of it.
    """
    target = build_target(spec)
    target = target.model_copy(update={"outputs": written_in_training(target.outputs)})
    return hashlib.sha256(target.to_json().encode()).hexdigest()[:HASH_CHARACTERS]


def build_run_spec(job: FineTuneJob) -> RunSpec:
    """Return the run specification that all ranks of all attempts read."""
    spec = job.spec
    return RunSpec(
        namespace=job.metadata.namespace,
        job=job.metadata.name,
        uid=job.metadata.uid,
        # Its image is a volume: the trainer reads only the folder.
        model=ModelSpec(**{name: getattr(spec.model, name) for name in ModelSpec.model_fields}),
        dataset=spec.dataset,
        training=with_defaults(spec.training),
        global_batch=global_batch(spec),
        checkpoint_interval=spec.checkpoint.interval,
        keep=spec.checkpoint.keep,
        keep_every_steps=spec.checkpoint.keep_every,
        keep_best=spec.checkpoint.keep_best,
        max_stale_seconds=parse_seconds(spec.checkpoint.max_stale or DEFAULT_MAX_STALE),
        start_from=spec.checkpoint.from_,
        cpu=spec.topology.cpu,
        outputs=spec.outputs,
    )
