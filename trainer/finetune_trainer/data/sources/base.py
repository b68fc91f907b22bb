"""Where samples come from: a folder of images, a .jsonl file, or what the `datasets` library loads.

Opened once at the start. Whatever is wrong with it ends the rank with the sentence of a DataError.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Protocol

from PIL import Image

from finetune_trainer.data.images import decoding
from finetune_trainer.errors import DataError


class Samples(Protocol):
    """What training reads of a data set; its images have been encoded by then."""

    def __len__(self) -> int:
        """Number of samples."""
        ...

    def caption(self, index: int) -> str:
        """Caption of a sample; empty where the source has none."""
        ...

    def open_conditioning(self, index: int) -> IO[bytes]:
        """The encoded conditioning image of a sample; only where the manifest names its column."""
        ...

    def name(self, index: int) -> str:
        """How a person finds the sample: its file, or its row."""
        ...


class Source(Samples, Protocol):
    """An indexed set of samples whose images can be read whenever they are wanted."""

    def open(self, index: int) -> IO[bytes]:
        """The encoded image (PNG, JPEG, ...) of a sample, as stored."""
        ...

    def file(self, index: int) -> Path | None:
        """The file that holds the image and nothing else, where there is one."""
        ...


def decode_sample(source: Source, index: int) -> Image.Image:
    """The image of a sample as RGB.

    Raises:
        DataError: it is broken.
    """
    with source.open(index) as file, whole_image(source.name(index)):
        return decoding.decode(file)


def decode_conditioning(source: Samples, index: int) -> Image.Image:
    """The conditioning image of a sample as RGB.

    Raises:
        DataError: it is broken.
    """
    with source.open_conditioning(index) as file, whole_image(f"the conditioning image of {source.name(index)}"):
        return decoding.decode(file)


@contextlib.contextmanager
def whole_image(name: str) -> Iterator[None]:
    """Within this block an image is read; what is wrong with it becomes a DataError."""
    try:
        yield
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"dataset.source: {name} is not a whole image: {error}") from error
