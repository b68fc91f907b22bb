"""The inputs of a FineTuneJob: the base model and the data set. The trainer reads them, too."""

from __future__ import annotations

from pydantic import Field

from finetune_contract.spec_model import Location, SpecModel, Word


class ModelSpec(SpecModel):
    """The base model."""

    base: Location = Field(description="Base model: hub id, folder, single-file checkpoint or s3:// URL")
    revision: Word | None = Field(default=None, description="Branch, tag or commit on the hub")
    variant: Word | None = Field(default=None, description="Weight variant of the base model, e.g. fp16")
    config: Location | None = Field(
        default=None,
        description="Folder or hub id in diffusers' layout with the configuration of a single-file base; default: "
        "detected "
        "from the file and loaded from the hub",
    )
    vae: Location | None = Field(
        default=None, description="VAE that replaces the one of the base model: hub id or folder"
    )


class Columns(SpecModel):
    """Names of the data set's columns."""

    image: Word = Field(default="image", description="Column that contains the image")
    caption: Word = Field(default="text", description="Column that contains the caption")
    conditioning: Word | None = Field(default=None, description="Column that contains ControlNet's conditioning image")


class DatasetSpec(SpecModel):
    """Images and captions to train on."""

    source: Location = Field(
        description="Data set: hub id, folder with metadata.jsonl, .jsonl, .parquet or .tar file, or s3:// URL"
    )
    split: Word = Field(default="train", description="Split of the data set to train on")
    columns: Columns = Field(default=Columns(), description="Names of the columns")
    max_samples: int | None = Field(
        default=None, ge=1, le=2**53, description="Number of samples to use, from the start; default: all"
    )
    streaming: bool = Field(
        default=False,
        description="Read the samples sequentially from their source and keep only their latents and embeddings; for "
        "data "
        "sets that are too large to copy",
    )
    max_broken: int = Field(
        default=0, ge=0, le=2**53, description="Maximum number of broken images to skip; more of them fail the job"
    )
