"""Writes tensors into the containers that an output can have. Called by the writers of the formats."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from finetune_contract.outputs.spec import FileContainer, OutputPrecision, OutputSpec
from finetune_trainer.weights.files import write_ckpt, write_safetensors
from finetune_trainer.weights.lazy import LazyTensor

DTYPES = {
    OutputPrecision.FP32: torch.float32,
    OutputPrecision.BF16: torch.bfloat16,
    OutputPrecision.FP16: torch.float16,
}


def dtype_of(output: OutputSpec) -> torch.dtype | None:
    """Return the number format of the weights; None to keep that of each tensor."""
    return None if output.precision is None else DTYPES[output.precision]


def convert(tensors: Mapping[str, LazyTensor], output: OutputSpec) -> dict[str, LazyTensor]:
    """Return tensors in the number format of an output."""
    dtype = dtype_of(output)
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


def write_model_file(
    folder: Path, name: str, tensors: Mapping[str, LazyTensor], output: OutputSpec, metadata: Mapping[str, str]
) -> Path:
    """Write a single file into a folder and return its path.

    Args:
        folder: the folder.
        name: name of the file without its suffix.
        tensors: the tensors by name.
        output: the output, for its container.
        metadata: written into the header of safetensors files. A .ckpt file has no place that programs read.
    """
    if output.container is FileContainer.CKPT:
        path = folder / f"{name}.ckpt"
        write_ckpt(path, tensors)
    else:
        path = folder / f"{name}.safetensors"
        write_safetensors(path, tensors, {"format": "pt", **metadata})
    return path
