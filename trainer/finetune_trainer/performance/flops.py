"""Floating-point operations of the model in one training step, by the shapes of its micro-batches.

A second copy of the method without weights (on torch's meta device) runs one forward and one backward pass, and
torch's formulas add up what each operation computes. The training itself is not touched. The count is that of the
model: activations that gradient checkpointing computes twice count once, and a compiler or a CUDA graph hides nothing.

This takes a few seconds for SDXL. The count is stored in the job's folder, so later attempts take no time for it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from finetune_contract.spec import Attention, SwitchMode, TrainingSpec, WeightPrecision
from finetune_trainer.data.batches import Batch
from finetune_trainer.data.sampling.draws import Draws
from finetune_trainer.files import write_atomically
from finetune_trainer.methods.method import Method, MethodContext
from finetune_trainer.methods.registry import method_class
from finetune_trainer.models.family import Family

_LOG = logging.getLogger(__name__)
FLOPS_FILE = "flops.json"
"""File in the job's folder: {"settings": hash, "perSample": {shape: operations}}."""
META = torch.device("meta")

_ATEN = torch.ops.aten
_FORMULAS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    # The adapters add in place; torch lists only the operations that return a new tensor.
    _ATEN.addmm_: flop_registry[_ATEN.addmm],
    _ATEN.baddbmm_: flop_registry[_ATEN.baddbmm],
}


class OperationFlops(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the floating-point operations of all operations in its block."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run one operation, and count it."""
        kwargs = dict(kwargs or {})
        result = func(*args, **kwargs)
        formula = _FORMULAS.get(getattr(func, "overloadpacket", None))
        if formula is not None:
            self.total += formula(*args, **kwargs, out_val=result)
        return result


def count_pass(method: Method, batch: Batch) -> int:
    """Return the operations of a forward and a backward pass; a method on the meta device computes nothing."""
    counter = OperationFlops()
    with counter:
        loss = method.losses(batch).sum()
        torch.autograd.grad(loss, list(method.leaves()), allow_unused=True)
    return counter.total


class _WeightlessFamily:
    """A base without weights; everything else is that of the real one."""

    def __init__(self, family: Family) -> None:
        self._family = family

    def __getattr__(self, name: str) -> Any:
        return getattr(self._family, name)

    def load_denoiser(self, dtype: torch.dtype) -> Any:
        """Return the denoiser in fp32, from its configuration."""
        del dtype
        return weightless_denoiser(self._family)

    def load_text_encoder(self, device: torch.device, dtype: torch.dtype = torch.float32) -> Any:
        """Return the text encoders, from their configurations."""
        del device
        return self._family.load_text_encoder(META, dtype)

    def load_controlnet(self, denoiser: Any, folder: Path | None) -> Any:
        """Return the ControlNet. All of a base have the same size, so a file of weights is not read."""
        del folder
        with META:
            return self._family.load_controlnet(denoiser, None)


def weightless_denoiser(family: Family) -> Any:
    """Return the denoiser of a base without weights, in fp32, from its configuration."""
    import diffusers  # noqa: PLC0415  slow to import

    path = next(path for path in family.denoiser_files() if path.name == "config.json")
    config = json.loads(path.read_text(encoding="utf-8"))
    with META:
        return getattr(diffusers, config["_class_name"]).from_config(config)


def weightless_method(family: Family, training: TrainingSpec) -> Method:
    """Return the method of a run without weights, in fp32 and without anything that changes only the speed."""
    plain: dict[str, Any] = {
        "compile": SwitchMode.OFF,
        "cuda_graphs": SwitchMode.OFF,
        "weight_precision": WeightPrecision.FP32,
        "gradient_checkpointing": False,
        "attention": Attention.AUTO,
    }
    if training.lora is not None:
        plain["lora"] = training.lora.model_copy(update={"base": None})
    base: Any = _WeightlessFamily(family)
    context = MethodContext(base, training.model_copy(update=plain), Draws(training.seed), META, torch.float32)
    return method_class(training.method)(context)


def without_data(batch: Batch) -> Batch:
    """Return a batch of the same shapes on the meta device."""

    def strip(value: Any) -> Any:
        if isinstance(value, Tensor):
            return torch.empty(value.shape, dtype=value.dtype, device=META)
        if isinstance(value, dict):
            return {name: strip(each) for name, each in value.items()}
        return value

    values = {field.name: strip(getattr(batch, field.name)) for field in dataclasses.fields(batch)}
    return dataclasses.replace(batch, **values)


class SampleFlops:
    """Operations of one sample by the shape of its latents, forward and backward.

    Args:
        family: the base model.
        training: the settings of the run.
        file: where counts are stored; None: nowhere.
        device: the device of the training, whose random state a count leaves as it is.
    """

    def __init__(self, family: Family, training: TrainingSpec, file: Path | None, device: torch.device) -> None:
        self._family, self._training, self._file = family, training, file
        self._seeded = [torch.cuda.current_device()] if device.type == "cuda" else []
        self._settings = hashlib.sha256(training.model_dump_json().encode()).hexdigest()
        self._method: Method | None = None
        self._is_possible = True
        self._counts = self._read()

    def known(self, shape: str) -> float | None:
        """Return the operations of one sample of a shape; None if they are not counted."""
        return self._counts.get(shape)

    def count(self, batch: Batch) -> None:
        """Count the operations of one sample of a batch, unless those of its shape are known or cannot be counted."""
        key = shape_key(batch)
        if key not in self._counts and self._is_possible:
            try:
                self._counts[key] = self._count(batch)
            except Exception as error:
                # A figure for users is no reason to stop the training.
                _LOG.warning("no share of the peak is reported: operations cannot be counted: %r", error)
                self._is_possible = False
            else:
                self._write()

    def _count(self, batch: Batch) -> float:
        with torch.random.fork_rng(devices=self._seeded):
            if self._method is None:
                self._method = weightless_method(self._family, self._training)
            return count_pass(self._method, without_data(batch)) / len(batch.latents)

    def _read(self) -> dict[str, float]:
        if self._file is None:
            return {}
        try:
            stored = json.loads(self._file.read_text(encoding="utf-8"))
            if stored["settings"] != self._settings:
                return {}
            return {str(shape): float(count) for shape, count in stored["perSample"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return {}

    def _write(self) -> None:
        if self._file is not None:
            text = json.dumps({"settings": self._settings, "perSample": self._counts})
            # Without the file the next attempt counts again.
            with contextlib.suppress(OSError):
                write_atomically(self._file, text.encode())


def shape_key(batch: Batch) -> str:
    """Return the shape of one sample as text, e.g. '4x128x128'."""
    return "x".join(map(str, batch.latents.shape[1:]))
