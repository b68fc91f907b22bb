"""Validation of a run specification against what this trainer supports, before anything is loaded."""

from __future__ import annotations

from finetune_contract.run_spec import RunSpec
from finetune_contract.spec import Offload, Optimizer, Precision, Sharding, TrainingSpec
from finetune_trainer.errors import ConfigError
from finetune_trainer.export.outputs import check_outputs
from finetune_trainer.methods.registry import method_traits
from finetune_trainer.train.trackers import check_trackers


def check_spec(spec: RunSpec) -> None:
    """Refuse what this trainer does not support.

    Raises:
        ConfigError: the message names the field.
    """
    if spec.training.steps is None and spec.training.epochs is None:
        raise ConfigError("training.steps: neither steps nor epochs is given; write one of them")
    dreambooth = spec.training.dreambooth
    if spec.training.aspect_buckets and dreambooth is not None and dreambooth.class_prompt is not None:
        raise ConfigError("training.aspectBuckets: class images are square; leave it out, or dreambooth.classPrompt")
    if spec.dataset.streaming and not (spec.training.center_crop or spec.training.aspect_buckets):
        raise ConfigError(
            "dataset.streaming: a random crop needs the image again in each epoch; write training.centerCrop: true or "
            "training.aspectBuckets: true, or leave streaming out"
        )
    if spec.training.sharding is not Sharding.NONE:
        check_sharded(spec.training)
    elif spec.training.offload is not Offload.NONE:
        raise ConfigError("training.offload: only sharded weights can be kept in host memory; write sharding: full")
    check_trackers(spec.training.trackers)
    check_outputs(spec.outputs, method_traits(spec.training.method).formats)


def check_sharded(training: TrainingSpec) -> None:
    """Refuse what sharded training does not support.

    Raises:
        ConfigError: the message names the field.
    """
    if training.precision is Precision.FP16:
        raise ConfigError("training.precision: fp16 cannot be combined with sharding; write bf16")
    if training.optimizer is not Optimizer.ADAMW:
        raise ConfigError(
            f"training.optimizer: {training.optimizer.value} cannot be combined with sharding; write adamw"
        )
    if training.aspect_buckets:
        raise ConfigError(
            "training.aspectBuckets: ranks would make different numbers of forward passes, which sharding does not "
            "allow; leave it out, or leave sharding out"
        )
