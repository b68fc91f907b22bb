"""An unmodified training script in place of a method; part of `spec`."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, WithJsonSchema

from finetune_contract.spec_model import Argument, Location, SpecModel, Word

Arguments = Annotated[
    dict[str, Any] | tuple[Argument, ...],
    # A map or a list. Structural schemas can express this only without a type.
    WithJsonSchema({"x-kubernetes-preserve-unknown-fields": True}),
]
"""Command line of a script: a map of flags, or a list."""

AccelerateConfig = Annotated[
    dict[str, Any],
    WithJsonSchema({"type": "object", "x-kubernetes-preserve-unknown-fields": True}),
]
"""Contents of a file that `accelerate config` writes."""


class ScriptConfigMap(SpecModel):
    """A script in a ConfigMap of the job's namespace."""

    name: Annotated[str, Field(min_length=1, max_length=253)] = Field(description="Name of the ConfigMap")
    key: Annotated[str, Field(min_length=1, max_length=253)] = Field(
        default="train.py", description="Key that contains the script"
    )


class ScriptSpec(SpecModel):
    """An unmodified training script in place of a method."""

    path: Location | None = Field(
        default=None,
        description="Path of the script in the container image or on a volume; a name without folders is an example of "
        "diffusers, e.g. train_controlnet.py. In a local run it is a file, relative to the manifest",
    )
    config_map: ScriptConfigMap | None = Field(default=None, description="ConfigMap that contains the script")
    image: Location | None = Field(
        default=None,
        description="Container image that contains path and is built from the trainer image; default: the trainer "
        "image",
    )
    args: Arguments | None = Field(
        default=None,
        description="Command line of the script: a map such as {train_batch_size: 1, gradient_checkpointing: true}, or "
        "a list. A relative output_dir is on the job's storage",
    )
    env: dict[str, Argument] | None = Field(
        default=None, max_length=64, description="Environment variables of the script"
    )
    accelerate_config: AccelerateConfig | None = Field(
        default=None,
        description="Contents of an accelerate config, for FSDP or DeepSpeed, e.g. {distributed_type: FSDP, "
        "fsdp_config: {fsdp_version: 2}}; the number of machines and processes comes from the topology",
    )
    requirements: tuple[Argument, ...] = Field(
        default=(),
        max_length=64,
        description="Python packages to install, once, into the job's cache, e.g. bitsandbytes==0.45.0",
    )
    resume_flag: Word | None = Field(
        default=None,
        description="Flag of the script that names the checkpoint to resume; default: resume_from_checkpoint, if the "
        "script has it",
    )
