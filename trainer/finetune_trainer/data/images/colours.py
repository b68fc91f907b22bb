"""Converts images of any mode and colour space to sRGB with 8 bits per channel."""

from __future__ import annotations

import contextlib
import io
from typing import Any

import numpy as np
from PIL import Image, ImageCms

_SIXTEEN_BIT = ("I;16", "I;16B", "I;16L", "I;16N")
_WITH_ALPHA = ("RGBA", "LA", "PA", "RGBa", "La")
_PROFILE_MODES = {"RGB ": "RGB", "GRAY": "L", "CMYK": "CMYK"}
"""Mode of the pixels that a profile describes, by its colour space (https://www.color.org/specification/ICC.1-2022-05.pdf,
table 19)."""


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image to RGB with 8 bits per channel, in sRGB, with transparent parts on white."""
    profile = image.info.get("icc_profile")
    if image.mode in (*_SIXTEEN_BIT, "I", "F"):
        image = _to_eight_bits(image)
    if image.mode == "LAB":
        return _from_lab(image)
    if image.mode in _WITH_ALPHA or "transparency" in image.info:
        rgba = _to_rgba(image)
        opaque = _to_srgb(rgba.convert("RGB"), profile)
        opaque.putalpha(rgba.getchannel("A"))
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), opaque)
        return image.convert("RGB")
    return _to_srgb(image, profile).convert("RGB")


def _to_eight_bits(image: Image.Image) -> Image.Image:
    """Scale the values of a grey image with 16 or 32 bits. Pillow would clip them at 255."""
    values = np.asarray(image)
    if image.mode in _SIXTEEN_BIT:
        scaled = values.astype(np.uint32) >> 8
    elif image.mode == "I":
        scaled = _scale_integers(values.astype(np.int64))
    else:
        scaled = _scale_floats(np.nan_to_num(values.astype(np.float64), posinf=0.0, neginf=0.0))
    result = Image.fromarray(scaled.clip(0, 255).astype(np.uint8))
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        result.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
    return result


def _scale_integers(values: Any) -> Any:
    """Scale integers whose number of bits the file does not tell: 8, 16 or 32, whichever their maximum needs."""
    largest = int(values.max(initial=0))
    if largest <= 0xFF:
        return values
    return values >> (8 if largest <= 0xFFFF else 23)


def _scale_floats(values: Any) -> Any:
    """Scale floats with a range of 1, 255, 65535 or any larger maximum."""
    largest = float(values.max(initial=0.0))
    top = next((end for end in (1.0, 255.0, 65535.0) if largest <= end), largest)
    return np.round(values * (255.0 / top))


def _to_rgba(image: Image.Image) -> Image.Image:
    if image.mode == "La":
        image = Image.merge("RGBa", [*[image.getchannel(0)] * 3, image.getchannel(1)])
    return image.convert("RGBA")


def _to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """Convert the colours of an image with a profile to sRGB; keep them without a profile, or with a damaged one."""
    if not profile:
        return image
    with contextlib.suppress(ImageCms.PyCMSError, OSError, ValueError):
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        mode = _PROFILE_MODES.get(source.profile.xcolor_space)
        if mode is None or _is_srgb(source):
            return image
        pixels = image if image.mode == mode else image.convert("RGB")
        if pixels.mode == mode:
            converted = ImageCms.profileToProfile(pixels, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
            return converted or image
    return image


def _is_srgb(profile: Any) -> bool:
    return "srgb" in str(ImageCms.getProfileDescription(profile)).lower()


def _from_lab(image: Image.Image) -> Image.Image:
    profiles = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    return ImageCms.applyTransform(image, ImageCms.buildTransform(*profiles, "LAB", "RGB")) or image
