"""Tests of the decoding of images in all modes and formats."""

from __future__ import annotations

import contextlib
import io
import tracemalloc
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from finetune_trainer.data.images import decoding
from finetune_trainer.data.images.colours import to_rgb
from finetune_trainer.data.images.decoding import CENTRE, CropView, decode, image_errors, to_pixels
from finetune_trainer.errors import DataError


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


PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def pixel(image: Image.Image, x: int, y: int) -> list[int]:
    """Return the channels of a pixel."""
    return [int(level) for level in np.asarray(image)[y, x]]


def grey_levels(file: io.BytesIO) -> list[int]:
    """Return the grey levels of the first row of a picture that must be grey."""
    pixels = np.asarray(decode(file))
    assert (pixels == pixels[:, :, :1]).all()
    return [int(level) for level in pixels[0, :, 0]]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([[0.0, 0.5, 1.0, np.nan, -1.0]], dtype=np.float32), [0, 128, 255, 0, 0]),
        (np.array([[0.0, 100.0, 255.0]], dtype=np.float32), [0, 100, 255]),
        (np.array([[0.0, 32896.0, 65535.0]], dtype=np.float32), [0, 128, 255]),
        (np.array([[0, 100, 255]], dtype=np.int32), [0, 100, 255]),
        (np.array([[0, 0x8000, 0xFFFF]], dtype=np.int32), [0, 128, 255]),
        (np.array([[0, 1 << 30, (1 << 31) - 1]], dtype=np.int32), [0, 128, 255]),
        (np.array([[0, 100, 0xFFFF]], dtype=np.uint16), [0, 0, 255]),
        (np.array([[0, 100]], dtype=np.uint16), [0, 0]),
    ],
)
def test_deep_greys_use_the_complete_range(values: np.ndarray, expected: list[int]) -> None:
    """As TIFF files of scanners and of scientific programs have them; Pillow would show them black or white."""
    assert grey_levels(encode(Image.fromarray(values), "tiff")) == expected


@pytest.mark.parametrize("mode", ["1", "L", "RGB", "P", "I;16"])
def test_transparent_colour_of_a_png_becomes_white(mode: str) -> None:
    image = Image.new(mode, (2, 1))
    image.putpixel((1, 0), 1 if mode != "RGB" else (1, 1, 1))
    file = encode(image, transparency=0 if mode != "RGB" else (0, 0, 0))
    assert decode(file).getpixel((0, 0)) == (255, 255, 255)
    assert decode(file).getpixel((1, 0)) != (255, 255, 255) or mode == "1"


@pytest.mark.parametrize("mode", ["RGBa", "La"])
def test_premultiplied_modes(mode: str) -> None:
    image = Image.new(mode, (1, 1), 0)
    assert to_rgb(image).getpixel((0, 0)) == (255, 255, 255)


def test_lab_images_are_converted() -> None:
    red = to_rgb(Image.merge("LAB", [Image.new("L", (1, 1), level) for level in (136, 128 + 80, 128 + 67)]))
    assert np.abs(np.asarray(red)[0, 0].astype(int) - (255, 0, 0)).max() < 16


def wide_gamut() -> bytes:
    """Return the profile of linear light with the primaries of sRGB: the same red, another middle grey."""
    profile = bytearray(PROFILE)
    count = int.from_bytes(profile[128:132], "big")
    for number in range(count):
        entry = 132 + 12 * number
        if bytes(profile[entry : entry + 4]) in {b"rTRC", b"gTRC", b"bTRC"}:
            offset = int.from_bytes(profile[entry + 4 : entry + 8], "big")
            # A curve with no entries is the identity (ICC.1, section 10.6).
            profile[offset : offset + 12] = b"curv" + bytes(8)
        if profile[entry : entry + 4] == b"desc":
            offset = int.from_bytes(profile[entry + 4 : entry + 8], "big")
            size = int.from_bytes(profile[entry + 8 : entry + 12], "big")
            text = bytes(profile[offset : offset + size])
            profile[offset : offset + size] = text.replace(b"s\0R\0G\0B", b"l\0i\0n\0e").replace(b"sRGB", b"line")
    return bytes(profile)


@pytest.mark.parametrize(("mode", "kind"), [("RGB", "png"), ("RGB", "jpeg"), ("RGBA", "png"), ("RGB", "tiff")])
def test_colours_are_converted_from_the_profile_to_srgb(mode: str, kind: str) -> None:
    image = Image.new(mode, (8, 8), (55, 55, 55, 255)[: len(mode)])
    (level,) = set(pixel(decode(encode(image, kind, icc_profile=wide_gamut())), 4, 4))
    assert abs(level - 127) < 3
    assert decode(encode(image, kind, icc_profile=PROFILE)).getpixel((4, 4)) == (55, 55, 55)
    assert decode(encode(image, kind, icc_profile=b"no profile")).getpixel((4, 4)) == (55, 55, 55)


def test_cmyk_and_ycck_jpeg() -> None:
    for colour, expected in (((0, 0, 0, 0), (255, 255, 255)), ((0, 255, 255, 0), (255, 0, 0))):
        decoded = decode(encode(Image.new("CMYK", (16, 16), colour), "jpeg")).getpixel((8, 8))
        assert np.abs(np.array(decoded) - expected).max() < 4


@pytest.mark.parametrize("kind", ["gif", "png", "webp", "tiff", "avif"])
def test_first_picture_of_a_sequence_counts(kind: str) -> None:
    first, *others = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue", "green")]
    decoded = decode(encode(first, kind, save_all=True, append_images=others)).getpixel((4, 4))
    assert np.abs(np.array(decoded) - (255, 0, 0)).max() < 8


@pytest.mark.parametrize("kind", ["heif", "avif", "webp", "jpeg", "tiff", "png"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_all_orientations(kind: str, orientation: int) -> None:
    """A picture whose upper left quarter is white, after its orientation was applied."""
    upright = Image.new("L", (32, 16))
    upright.paste(255, (0, 0, 16, 8))
    undo = {
        2: [Image.Transpose.FLIP_LEFT_RIGHT],
        3: [Image.Transpose.ROTATE_180],
        4: [Image.Transpose.FLIP_TOP_BOTTOM],
        5: [Image.Transpose.TRANSPOSE],
        6: [Image.Transpose.ROTATE_90],
        7: [Image.Transpose.TRANSVERSE],
        8: [Image.Transpose.ROTATE_270],
    }
    stored = upright
    for step in undo.get(orientation, []):
        stored = stored.transpose(step)
    exif = Image.Exif()
    exif[0x0112] = orientation
    # HEIF has an own property for the orientation, which its encoder derives from the bytes.
    decoded = decode(encode(stored.convert("RGB"), kind, exif=exif.tobytes()))
    assert decoded.size == (32, 16)
    quarters = ((4, 4), (28, 4), (4, 12), (28, 12))
    assert [pixel(decoded, *place)[0] > 200 for place in quarters] == [True] + [False] * 3


@pytest.mark.filterwarnings("ignore:Corrupt EXIF", "ignore:Truncated File Read")
@pytest.mark.parametrize(
    "exif", [b"Exif\0\0garbage", b"Exif\0\0II*\0\x08\0\0\0\xff\xff", b"Exif\0\0MM\0*\0\0\0\x08\0\x01"]
)
def test_damaged_exif_data_is_ignored(exif: bytes) -> None:
    assert decode(encode(Image.new("RGB", (4, 2)), "jpeg", exif=exif)).size == (4, 2)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF", "ignore:Truncated File Read")
@pytest.mark.parametrize("kind", ["png", "jpeg", "webp", "gif", "tiff", "avif", "heif", "bmp"])
def test_each_truncation_is_reported_as_a_broken_image(kind: str) -> None:
    """Never as another error, whatever the decoder raises."""
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    data = encode(Image.fromarray(pixels), kind).getvalue()
    for end in range(0, len(data) - 1, max(1, len(data) // 40)):
        with contextlib.suppress(DataError), image_errors("a.png"):
            decode(io.BytesIO(data[:end]))
    with pytest.raises(DataError, match=r"a\.png is not a complete image"), image_errors("a.png"):
        decode(io.BytesIO(data[: len(data) // 3]))


def test_image_of_any_claimed_size_is_refused_before_it_uses_memory() -> None:
    header = b"\x89PNG\r\n\x1a\n"
    body = b"IHDR" + (40_000).to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0])
    data = header + (13).to_bytes(4, "big") + body + zlib.crc32(body).to_bytes(4, "big")
    with (
        pytest.raises(DataError, match=r"a\.png has more than 500 million pixels; scale it down"),
        image_errors("a.png"),
    ):
        decode(io.BytesIO(data + b"\0\0\0\x01IDAT\0"))


@pytest.mark.parametrize("size", [(1, 30_000), (30_000, 1), (1, 1), (3, 1)])
@pytest.mark.parametrize("left", [0.0, 0.5, 1.0])
def test_extreme_shapes_are_cropped_before_they_are_resized(size: tuple[int, int], left: float) -> None:
    ramp = np.linspace(0, 255, max(size)).astype(np.uint8).reshape(size[1], size[0])
    image = Image.fromarray(ramp).convert("RGB")
    tracemalloc.start()
    pixels = to_pixels(image, (64, 64), CropView(left, left))
    assert tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()
    assert pixels.shape == (3, 64, 64)
    if max(size) > 3:
        assert abs(float(pixels.mean()) - (2 * left - 1)) < 0.02


def test_crop_before_resizing_gives_almost_the_same_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 96, 3), dtype=np.uint8))
    plain = to_pixels(image, (32, 32), CropView(left=0.3))
    monkeypatch.setattr(decoding, "_MAX_RESIZED_PIXELS", 1)
    cropped = to_pixels(image, (32, 32), CropView(left=0.3))
    assert float((plain - cropped)[:, :, 3:-3].abs().max()) < 0.05
