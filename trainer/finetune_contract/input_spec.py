"""The inputs of a FineTuneJob: the base model and the data set. The trainer reads them, too."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from finetune_contract.spec_model import Location, SpecModel, Word

MAX_REPEATS = 10_000
"""Most uses of a sample in one epoch."""


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


class AdditionalDataset(SpecModel):
    """A data set that is trained on together with `dataset.source`."""

    source: Location = Field(description="Data set, in any form that dataset.source accepts")
    revision: Word | None = Field(default=None, description="Branch, tag or commit on the hub")
    split: Word | None = Field(default=None, description="Split of the data set to train on; default: dataset.split")
    repeats: int = Field(
        default=1, ge=1, le=MAX_REPEATS, description="Number of times that each epoch uses each of its samples"
    )
    weight: float = Field(default=1.0, gt=0, le=1000, description="Factor of the loss of its samples")


class ShuffleTagsSpec(SpecModel):
    """Captions that are lists of tags, in another order for each use."""

    keep_first: int = Field(default=0, ge=0, le=1000, description="Number of tags at the start that keep their place")
    separator: Annotated[str, Field(min_length=1, max_length=8)] = Field(
        default=",", description="Text between two tags"
    )


class DatasetSpec(SpecModel):
    """Images and captions to train on."""

    source: Location = Field(
        description="Data set: hub id, folder of images with metadata or caption files, .jsonl, .csv, .parquet or .tar "
        "file, or s3:// URL"
    )
    revision: Word | None = Field(
        default=None, description="Branch, tag or commit of a data set on the hub; default: the main branch"
    )
    split: Word = Field(default="train", description="Split of the data set to train on")
    columns: Columns = Field(default=Columns(), description="Names of the columns")
    max_samples: int | None = Field(
        default=None, ge=1, le=2**53, description="Number of samples to use, from the start; default: all"
    )
    repeats: int = Field(
        default=1, ge=1, le=MAX_REPEATS, description="Number of times that each epoch uses each sample of source"
    )
    weight: float = Field(default=1.0, gt=0, le=1000, description="Factor of the loss of the samples of source")
    additional: tuple[AdditionalDataset, ...] = Field(
        default=(),
        max_length=10,
        description="More data sets to train on in the same epochs, with the same columns; maxSamples applies to each",
    )
    shuffle_tags: ShuffleTagsSpec | None = Field(
        default=None,
        description="Shuffle the tags of each caption for each use; {} enables it. The text encoder then runs in each "
        "step",
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
