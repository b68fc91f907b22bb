"""The data sets that a manifest trains on together, and the fields that name them. Called by `prepare`."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from finetune_contract.input_spec import DatasetSpec
from finetune_contract.spec import TrainingSpec
from finetune_trainer.errors import RankError

_FIELD = re.compile(r"^dataset\.(source|split)(?=:)")


@dataclass(frozen=True)
class TrainingSet:
    """One of the data sets that a run trains on.

    Attributes:
        field: the field that names it.
        dataset: the data set.
        repeats: number of times that each epoch uses each of its samples.
        weight: factor of the loss of its samples.
    """

    field: str
    dataset: DatasetSpec
    repeats: int
    weight: float


def list_training_sets(dataset: DatasetSpec) -> list[TrainingSet]:
    """Return `dataset.source` and the additional data sets, which have its columns and limits."""
    sets = [TrainingSet("dataset", dataset, dataset.repeats, dataset.weight)]
    for number, each in enumerate(dataset.additional):
        own = {"source": each.source, "split": each.split or dataset.split, "revision": each.revision}
        field = f"dataset.additional[{number}]"
        sets.append(TrainingSet(field, dataset.model_copy(update=own), each.repeats, each.weight))
    return sets


def fetch_datasets(dataset: DatasetSpec, fetched: Callable[[str, str], str]) -> DatasetSpec:
    """Return a data set with the local paths of its sources, unless it is streamed.

    Args:
        dataset: the manifest's data set.
        fetched: returns the local path of a location, given with its field.
    """
    if dataset.streaming:
        return dataset
    additional = tuple(
        each.model_copy(update={"source": fetched(each.source, f"dataset.additional[{number}].source")})
        for number, each in enumerate(dataset.additional)
    )
    source = fetched(dataset.source, "dataset.source")
    return dataset.model_copy(update={"source": source, "additional": additional})


def fetch_images(training: TrainingSpec, fetched: Callable[[str, str], str]) -> TrainingSpec:
    """Return the settings with the local paths of class images and of conditioning images; see `fetch_datasets`."""
    dreambooth, validation = training.dreambooth, training.validation
    if dreambooth is not None and dreambooth.class_images is not None:
        path = fetched(dreambooth.class_images, "training.dreambooth.classImages")
        dreambooth = dreambooth.model_copy(update={"class_images": path})
    if validation is not None:
        paths = tuple(fetched(each, "training.validation.images") for each in validation.images)
        validation = validation.model_copy(update={"images": paths})
    return training.model_copy(update={"dreambooth": dreambooth, "validation": validation})


@contextlib.contextmanager
def naming_field(field: str, whole: bool = False, split_only: bool = False) -> Iterator[None]:
    """Let the messages of errors within this block name another field than `dataset`.

    Args:
        field: the field that has the source and the split.
        whole: whether the field is the source itself.
        split_only: whether the field is the split of `dataset.source`.
    """

    def rename(found: re.Match[str]) -> str:
        if split_only:
            return field if found[1] == "split" else found[0]
        return field if whole else f"{field}.{found[1]}"

    try:
        yield
    except RankError as error:
        text = str(error)
        renamed = _FIELD.sub(rename, text)
        if renamed == text:
            raise
        raise type(error)(renamed) from error
