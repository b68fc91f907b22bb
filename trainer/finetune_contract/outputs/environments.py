"""Which Python environment writes an output. Pure; the operator and the trainer read it."""

from __future__ import annotations

from finetune_contract.outputs.spec import OutputFormat, OutputSpec

EXPORT_FORMATS = frozenset({OutputFormat.OPENVINO})
"""Formats that need the packages of the extra `export`, which the images of the trainer do not contain."""


def needs_export_image(output: OutputSpec) -> bool:
    """Return whether an output is written with the packages of the extra `export`."""
    return output.format in EXPORT_FORMATS
