"""Tests of the decoding of images in all modes and formats."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from finetune_trainer.data.images.colours import to_rgb
from finetune_trainer.data.images.decoding import CENTRE, CropView, decode, to_pixels


def encode(image: Image.Image, kind: str = "png", **options: object) -> io.BytesIO:
    file = io.BytesIO()
    image.save(file, kind, **options)
    file.seek(0)
    return file


def test_exif_orientation_is_applied() -> None:
    image = Image.new("RGB", (4, 2), "red")
    exif = image.getexif()
    exif[0x0112] = 6
    assert decode(encode(image, exif=exif)).size == (2, 4)


def test_transparent_parts_become_white() -> None:
    image = Image.new("RGBA", (2, 1), (255, 0, 0, 255))
    image.putpixel((1, 0), (255, 0, 0, 0))
    decoded = decode(encode(image))
    assert [decoded.getpixel((0, 0)), decoded.getpixel((1, 0))] == [(255, 0, 0), (255, 255, 255)]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "CMYK", "YCbCr", "HSV", "F", "I", "I;16"])
def test_each_mode_is_converted_to_rgb(mode: str) -> None:
    assert to_rgb(Image.new(mode, (3, 2))).mode == "RGB"


def test_sixteen_bit_greys_are_scaled() -> None:
    image = Image.fromarray(np.full((2, 2), 0x8000, dtype=np.uint16))
    assert decode(encode(image)).getpixel((0, 0)) == (128, 128, 128)


def test_images_are_resized_and_cropped_at_the_centre() -> None:
    image = Image.new("RGB", (30, 10), "black")
    image.paste("white", (10, 0, 20, 10))
    pixels = to_pixels(image, (8, 8), CENTRE)
    assert pixels.shape == (3, 8, 8)
    assert pixels.dtype is torch.float32
    assert float(pixels[:, :, 2:6].min()) > 0.9
    assert float(to_pixels(image, (8, 8), CropView(left=0.0)).max()) < 0.9


def test_flip_mirrors_the_pixels() -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8))
    assert torch.equal(to_pixels(image, (8, 8), CropView(flip=True)), to_pixels(image, (8, 8), CENTRE).flip(2))


def test_pixels_are_in_the_range_minus_one_to_one() -> None:
    image = Image.new("RGB", (8, 8), (0, 255, 0))
    assert to_pixels(image, (8, 8), CENTRE)[:, 0, 0].tolist() == [-1.0, 1.0, -1.0]


def test_truncated_image_is_refused() -> None:
    data = encode(Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))).getvalue()
    with pytest.raises(OSError, match="truncated"):
        decode(io.BytesIO(data[: len(data) // 2]))
