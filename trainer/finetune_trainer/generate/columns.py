"""The columns of a grid: which weights draw each of them. The columns are opened one after another."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from finetune_contract.input_spec import ModelSpec
from finetune_contract.outputs.generation import DrawingDevice, GenerateRequest
from finetune_trainer.errors import ConfigError
from finetune_trainer.export.formats.files import DTYPES
from finetune_trainer.export.formats.merge import read_adapter
from finetune_trainer.generate import openvino, pipelines
from finetune_trainer.generate.found import FLAG, HAS_STRENGTH, IS_COMPLETE, FoundModel, Kind
from finetune_trainer.generate.origin import Origin
from finetune_trainer.models.base import open_base
from finetune_trainer.models.family import Family

_LOG = logging.getLogger(__name__)
BASE = "base"
_BASE_FLAG = "--base"


@dataclass(frozen=True)
class Column:
    """A column.

    Attributes:
        label: its label.
        pipeline: draws its pictures.
        options: arguments of the pipeline that only this column has.
    """

    label: str
    pipeline: Any
    options: dict[str, Any] = field(default_factory=dict)


def choose_device(request: GenerateRequest) -> tuple[torch.device, torch.dtype]:
    """Return the device and the number format.

    Raises:
        ConfigError: there is no GPU, or the CPU cannot draw in this format.
    """
    has_gpu = torch.cuda.is_available()
    if request.device is DrawingDevice.GPU and not has_gpu:
        raise ConfigError("--device: torch finds no GPU on this machine; write --device cpu")
    device = torch.device("cuda" if has_gpu and request.device is not DrawingDevice.CPU else "cpu")
    if request.precision is not None:
        return device, DTYPES[request.precision]
    return device, torch.float16 if device.type == "cuda" else torch.float32


def check(request: GenerateRequest, found: FoundModel, origin: Origin) -> None:
    """Refuse flags that the model has no use for, before anything is loaded.

    Raises:
        ConfigError: the message names the flag and the remedy.
    """
    if request.strengths and found.kind not in HAS_STRENGTH:
        raise ConfigError(
            f"--strength: {found.path} is {found.kind}, and only a LoRA and a ControlNet have a strength; leave "
            "--strength out"
        )
    if request.condition is not None and found.kind is not Kind.CONTROLNET:
        raise ConfigError(
            f"--condition: {found.path} is {found.kind}, and only a ControlNet reads a picture; leave --condition out"
        )
    if request.condition is None and found.kind is Kind.CONTROLNET:
        raise ConfigError(
            f"--condition: {found.path} is a ControlNet, which follows a picture; write its path as --condition"
        )
    needs_base = found.kind not in IS_COMPLETE or request.compare_base
    if needs_base and found.base is None and request.base is None and origin.base is None:
        raise ConfigError(
            f"--base: {found.path} is {found.kind}, and nothing next to it or in it names its base; write --base with "
            "the base it was trained on"
        )


class GridColumns:
    """Opens the columns of a request.

    Args:
        request: the request.
        found: what the path contains.
        origin: what it says about itself.
        cache_dir: folder for files that are fetched or converted.
    """

    def __init__(self, request: GenerateRequest, found: FoundModel, origin: Origin, cache_dir: Path) -> None:
        self._request, self._found, self._origin, self._cache = request, found, origin, cache_dir
        self.device, self.dtype = choose_device(request)
        self.device_name = pipelines.describe_device(self.device, self.dtype)

    def open(self) -> Iterator[Column]:
        """Yield the columns. Each is only valid until the next one is requested.

        Raises:
            ConfigError: the model or its base cannot be read.
        """
        kinds: dict[Kind, Callable[[], Iterator[Column]]] = {
            Kind.PIPELINE: self._complete,
            Kind.SINGLE_FILE: self._complete,
            Kind.OPENVINO: self._openvino,
            Kind.COMPILED: self._compiled,
            Kind.LORA: self._lora,
            Kind.EMBEDDING: self._embedding,
            Kind.CONTROLNET: self._controlnet,
        }
        yield from kinds[self._found.kind]()

    @cached_property
    def _base(self) -> Family:
        """The base."""
        if self._found.base is not None and self._request.base is None:
            with pipelines.named(FLAG):
                return pipelines.open_folder(self._found.base)
        given = self._request.base or self._origin.base
        assert given is not None
        with pipelines.named(_BASE_FLAG):
            return open_base(given, self._cache)

    def _load(self, family: Family, flag: str) -> Any:
        with pipelines.named(flag):
            return pipelines.load_pipeline(family, self.dtype, self.device)

    def _complete(self) -> Iterator[Column]:
        yield from self._compared()
        label = self._request.name or self._found.path.stem
        yield Column(label, self._load(self._open_complete(), FLAG))

    def _open_complete(self) -> Family:
        """Open a folder, or a file, whose configuration is that of its base if it is known."""
        given = self._request.base or self._origin.base
        with pipelines.named(FLAG):
            if self._found.kind is Kind.PIPELINE:
                return pipelines.open_folder(self._found.path)
            config = None if given is None else str(self._base.pipeline.folder)
            return open_base(ModelSpec(base=str(self._found.path), config=config), self._cache)

    def _openvino(self) -> Iterator[Column]:
        yield from self._compared()
        pipeline, self.device_name = openvino.load(self._found.path, self._request.device, self._request.precision)
        yield Column("OpenVINO", pipeline)

    def _compiled(self) -> Iterator[Column]:
        from finetune_trainer.export.formats import load_compiled  # noqa: PLC0415  slow to import

        yield from self._compared()
        try:
            pipeline = load_compiled.load(self._found.path)
        except RuntimeError as error:
            raise ConfigError(f"{FLAG}: {self._found.path}: {error}") from error
        pipeline.set_progress_bar_config(disable=True)
        self.device_name = f"{pipeline.unet.facts['machine']}, compiled"
        yield Column("compiled", pipeline)

    def _compared(self) -> Iterator[Column]:
        """Yield the column of the base of a complete model, and free its memory."""
        if self._request.compare_base:
            column = Column(BASE, self._load(self._base, _BASE_FLAG))
            yield column
            del column
            gc.collect()

    def _lora(self) -> Iterator[Column]:
        lora = read_adapter(self._found.path, self._base, FLAG)
        pipeline = self._load(self._base, _BASE_FLAG)
        if self._request.compare_base:
            yield Column(BASE, pipeline)
        for strength in self._strengths:
            with pipelines.named(FLAG):
                pipelines.set_strength(pipeline, lora, strength)
            yield Column(self._label(strength), pipeline)

    def _embedding(self) -> Iterator[Column]:
        pipeline = self._load(self._base, _BASE_FLAG)
        if self._request.compare_base:
            yield Column(BASE, pipeline)
        known = (self._origin.trigger_phrase,) if self._origin.trigger_phrase else ()
        words = pipelines.add_embedding(pipeline, self._found.path, self._base, known, FLAG)
        if not any(word in prompt for word in words for prompt in self._request.prompts):
            _LOG.warning(
                "--prompt: no prompt contains %s, so the embedding changes nothing; write it in a prompt",
                " or ".join(words),
            )
        yield Column(self._request.name or self._found.path.stem, pipeline)

    def _controlnet(self) -> Iterator[Column]:
        pipeline = self._load(self._base, _BASE_FLAG)
        if self._request.compare_base:
            yield Column(BASE, pipeline)
        with pipelines.named(FLAG):
            controlnet = pipelines.load_controlnet(self._found.path, self._base, pipeline.unet, FLAG)
        guided = pipelines.with_controlnet(pipeline, controlnet)
        picture = self._condition()
        for strength in self._strengths:
            options = {"image": picture, "controlnet_conditioning_scale": strength}
            yield Column(self._label(strength), guided, options)

    def _condition(self) -> Image.Image:
        assert self._request.condition is not None
        try:
            with Image.open(self._request.condition) as opened:
                return opened.convert("RGB")
        except OSError as error:
            raise ConfigError(
                f"--condition: {self._request.condition} cannot be read ({error}); write the path of a picture"
            ) from error

    @property
    def _strengths(self) -> Sequence[float]:
        return self._request.strengths or (1.0,)

    def _label(self, strength: float) -> str:
        name = self._request.name or self._found.path.stem
        return f"strength {strength:g}" if self._request.strengths else name
