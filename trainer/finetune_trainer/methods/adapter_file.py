"""LoRA files that a run starts from, with the names of diffusers, peft or kohya's scripts."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from finetune_contract.spec import LoraSpec
from finetune_trainer.errors import ConfigError
from finetune_trainer.methods.kohya import SUFFIXES
from finetune_trainer.models.family import Family
from finetune_trainer.models.layouts.trained import LowRank
from finetune_trainer.models.text_names import portable_text_name
from finetune_trainer.weights.lazy import LazyTensor, read_file

FIELD = "training.lora.base"
_DOWN, _UP, _MAGNITUDE, _ALPHA = "lora_A", "lora_B", "lora_magnitude_vector", "alpha"
_KINDS: dict[str, str] = {
    **{suffix: suffix.split(".")[1] for suffix in SUFFIXES},
    **{kohya: suffix.split(".")[1] for suffix, kohya in SUFFIXES.items()},
    ".lora.down.weight": _DOWN,
    ".lora.up.weight": _UP,
    ".lora_linear_layer.down.weight": _DOWN,
    ".lora_linear_layer.up.weight": _UP,
    "_lora.down.weight": _DOWN,
    "_lora.up.weight": _UP,
    ".alpha": _ALPHA,
}
"""Tensors of an adapter, by the ends of their names: of peft, kohya's scripts and older releases of diffusers."""
_PROCESSOR = re.compile(r"\.processor\.(to_\w+)$")
_METADATA = "lora_adapter_metadata"
_NUM_NAMED = 3


@dataclass
class Adapter:
    """One layer of a LoRA file.

    Attributes:
        tensors: its tensors by kind; they are read later.
        alpha: its alpha; None if the file has none, so that it is the rank.
    """

    tensors: dict[str, LazyTensor] = field(default_factory=dict)
    alpha: float | None = None

    @property
    def rank(self) -> int:
        """Return its rank."""
        return int(self.tensors[_DOWN].shape[0])

    def low_rank(self) -> LowRank:
        """Return the matrices with the alpha that applies to them, float32."""
        down, up = self.tensors[_DOWN].to(torch.float32), self.tensors[_UP].to(torch.float32)
        magnitude = self.tensors.get(_MAGNITUDE)
        alpha = float(self.rank) if self.alpha is None else self.alpha
        return LowRank(down, up, alpha, None if magnitude is None else magnitude.read().float())


def find_adapter_file(folder: Path, name: str, field: str = FIELD) -> Path:
    """Return the LoRA file in a folder: the one with diffusers' name, or else the only one.

    Args:
        folder: the folder, or the file itself.
        name: diffusers' name.
        field: the field of the manifest that names it, for messages.

    Raises:
        ConfigError: there is none, or more than one.
    """
    if folder.is_file():
        return folder
    files = sorted(folder.glob("*.safetensors"))
    if (folder / name).is_file():
        return folder / name
    if len(files) == 1:
        return files[0]
    found = ", ".join(path.name for path in files[:10])
    raise ConfigError(
        f"{field}: {folder} contains {len(files)} .safetensors files{f' ({found})' if files else ''}; write the path "
        "of a single LoRA file"
    )


def check_adapter_file(path: Path, spec: LoraSpec) -> None:
    """Check a LoRA file against the settings, as far as this is possible without the base.

    Raises:
        ConfigError: it is not a LoRA, or has another rank.
    """
    _check_settings(read_adapters(path), path, spec)


def load_adapters(path: Path, spec: LoraSpec, adapted: Mapping[str, Any], family: Family) -> None:
    """Initialize the adapters of a run with those of a file, with the same effect on the base.

    Layers that the file lacks keep their initialization, which has no effect.

    Args:
        path: the file.
        spec: the settings of the run's adapters.
        adapted: modules with adapters, by the names of their folders.
        family: the base.

    Raises:
        ConfigError: the file is not a LoRA for this base and these settings.
    """
    found = read_adapters(path)
    _check_settings(found, path, spec)
    layers = {name: layer for part, module in adapted.items() for name, layer in _layers(part, module, family)}
    if unknown := [name for name in found if name not in layers]:
        raise ConfigError(f"{FIELD}: {path} {_describe_unknown(unknown, adapted, family)}")
    alpha = spec.alpha if spec.alpha is not None else float(spec.rank)
    for name, adapter in found.items():
        _load(layers[name], adapter, alpha, f"{FIELD}: {path}: {name}")


def read_adapters(path: Path, origin: str = FIELD) -> dict[str, Adapter]:
    """Return the adapters of a file by the names of their layers in the file.

    Args:
        path: the file.
        origin: the field of the manifest that names it, for messages.

    Raises:
        ConfigError: it is not a LoRA file.
    """
    if path.suffix != ".safetensors":
        raise ConfigError(f"{origin}: {path} is not a .safetensors file; convert it, or write another file")
    adapters: dict[str, Adapter] = {}
    try:
        # The library checks that the file is complete, and reads no values.
        with safe_open(path, framework="pt") as file:
            metadata = json.loads((file.metadata() or {}).get(_METADATA, "{}"))
        for name, tensor in read_file(path).items():
            suffix = _suffix_of(name)
            if suffix is None:
                raise ConfigError(f"{origin}: {path} contains {name}, which is not a part of a LoRA; write a LoRA file")
            layer = _layer_name(name.removesuffix(suffix))
            adapter = adapters.setdefault(layer, Adapter(alpha=_alpha_of(layer, metadata)))
            if _KINDS[suffix] == _ALPHA:
                adapter.alpha = float(tensor.read())
            else:
                adapter.tensors[_KINDS[suffix]] = tensor
    except (OSError, SafetensorError, ValueError) as error:
        raise ConfigError(
            f"{origin}: {path} cannot be read: {' '.join(str(error).split())[:200]}; write a complete .safetensors file"
        ) from error
    incomplete = [name for name, adapter in adapters.items() if not {_DOWN, _UP} <= adapter.tensors.keys()]
    if incomplete or not adapters:
        what = f"{incomplete[0]} lacks one of its matrices" if incomplete else "it contains no adapters"
        raise ConfigError(f"{origin}: {path} is not a complete LoRA: {what}; write another file")
    return adapters


def _suffix_of(name: str) -> str | None:
    return next((suffix for suffix in sorted(_KINDS, key=len, reverse=True) if name.endswith(suffix)), None)


def _layer_name(name: str) -> str:
    """Return the name of a layer without the attention processors of older releases of diffusers."""
    match = _PROCESSOR.search(name)
    if match is None:
        return name
    return f"{name[: match.start()]}.{'to_out.0' if match[1] == 'to_out' else match[1]}"


def _alpha_of(layer: str, metadata: Mapping[str, Any]) -> float | None:
    """Return the alpha of a layer by the metadata that newer releases of diffusers write; None if there is none."""
    part, _, module = layer.partition(".")
    pattern = metadata.get(f"{part}.alpha_pattern") or {}
    own = [value for name, value in pattern.items() if module == name or module.endswith(f".{name}")]
    value = own[0] if own else metadata.get(f"{part}.lora_alpha")
    return None if value is None else float(value)


def _check_settings(found: Mapping[str, Adapter], path: Path, spec: LoraSpec) -> None:
    ranks = sorted({adapter.rank for adapter in found.values()})
    if len(ranks) > 1:
        raise ConfigError(
            f"{FIELD}: the layers of {path} have different ranks ({', '.join(map(str, ranks))}); write a LoRA with a "
            "single rank"
        )
    if ranks[0] != spec.rank:
        raise ConfigError(
            f"{FIELD}: {path} has rank {ranks[0]}, and training.lora.rank is {spec.rank}; write rank: {ranks[0]}"
        )
    has_magnitudes = {_MAGNITUDE in adapter.tensors for adapter in found.values()}
    if has_magnitudes != {spec.use_dora}:
        is_dora = True in has_magnitudes
        raise ConfigError(
            f"{FIELD}: {path} {'has' if is_dora else 'lacks'} the magnitudes of DoRA; write useDora: "
            f"{'true' if is_dora else 'false'}"
        )


def _layers(part: str, model: Any, family: Family) -> Iterator[tuple[str, nn.Module]]:
    """Yield the adapted layers of a module under each name that a file may have for them."""
    for module, layer in model.named_modules():
        if "default" in getattr(layer, _DOWN, {}):
            for name in layer_names(part, module, family):
                yield name, layer


def layer_names(part: str, module: str, family: Family) -> set[str]:
    """Return the names that files have for a layer."""
    is_denoiser = part == family.denoiser_name
    portable = module if is_denoiser else portable_text_name(module)
    kohya = family.kohya_name(part, portable)
    # Some scripts do not use the names of the original code for SDXL.
    plain = f"{re.match(r'lora_[a-z]+[0-9]*', kohya)[0]}_{portable.replace('.', '_')}"  # type: ignore[index]
    names = {f"{part}.{module}", f"{part}.{portable}", kohya, plain}
    return names | {module, f"base_model.model.{module}"} if is_denoiser else names


def _describe_unknown(unknown: list[str], adapted: Mapping[str, Any], family: Family) -> str:
    """Return why layers of a file have no adapter in this run, with the remedy."""
    if all(name.startswith(("text_encoder", "lora_te")) for name in unknown):
        return describe_text_layers(unknown)
    denoiser = adapted[family.denoiser_name]
    known = {
        name: module.removesuffix(".base_layer")
        for module, layer in denoiser.named_modules()
        if isinstance(layer, (nn.Linear, nn.Conv2d))
        for name in layer_names(family.denoiser_name, module.removesuffix(".base_layer"), family)
    }
    modules = [known[name] for name in unknown if name in known]
    if not modules:
        return f"has adapters for layers that the base lacks ({_list(unknown)}); write a LoRA of the same kind of base"
    return describe_left_out(unknown, modules)


def describe_text_layers(names: Sequence[str]) -> str:
    """Return why layers of a text encoder have no adapter in this run, with the remedy."""
    return f"also has adapters for the text encoder ({_list(names)}); write training.lora.trainTextEncoder: true"


def describe_left_out(names: Sequence[str], modules: Iterable[str]) -> str:
    """Return why layers of the denoiser have no adapter in this run, with the remedy.

    Args:
        names: the layers, for the message.
        modules: their names in the denoiser.
    """
    targets = sorted({_target_of(module) for module in modules})
    return (
        f"also adapts layers that training.lora.targetModules leaves out ({_list(names)}); add {', '.join(targets)} to "
        "targetModules"
    )


def _list(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NUM_NAMED} more" if len(names) > _NUM_NAMED else ""
    return f"{', '.join(names[:_NUM_NAMED])}{more}"


def _target_of(module: str) -> str:
    """Return the shortest end of a layer's name that is not only a number."""
    parts = module.split(".")
    return ".".join(parts[-2:]) if parts[-1].isdigit() else parts[-1]


@torch.no_grad()
def _load(layer: Any, adapter: Adapter, alpha: float, where: str) -> None:
    """Copy one adapter. B takes up the ratio of the alphas, because the run's own alpha applies to it."""
    scale = 1.0 if adapter.alpha is None else adapter.alpha / adapter.rank
    factors = {_DOWN: 1.0, _UP: scale * adapter.rank / alpha, _MAGNITUDE: 1.0}
    for kind, tensor in adapter.tensors.items():
        value = tensor.read()
        target = getattr(layer, kind)["default"].weight
        if _squeezed(value) != _squeezed(target):
            raise ConfigError(
                f"{where} has the shape {list(value.shape)}, and the base needs {list(target.shape)}; write a LoRA of "
                "the same kind of base"
            )
        # The adapters still have the format of the frozen weights; trained weights are in fp32.
        target.data = (value.float() * factors[kind]).reshape(target.shape).to(target.device)


def _squeezed(tensor: Tensor) -> list[int]:
    """Return the sizes of a tensor without those of 1: a 1x1 convolution and a linear layer have the same matrix."""
    return [size for size in tensor.shape if size != 1]
