"""Rules of the outputs: formats and their settings."""

from __future__ import annotations

from typing import Any

from finetune_contract.methods import ADAPTER_METHODS, METHODS, TrainedPart
from finetune_contract.outputs.spec import FileContainer, OutputFormat, OutputLayout, OutputPrecision, OutputSpec
from finetune_contract.spec import Method
from finetune_operator.api.job import FineTuneJobSpec
from finetune_operator.api.rules.rule import Rule, Scope, cel_list, join_names
from finetune_operator.api.rules.training import SPEC

OUTPUT = Scope("spec.outputs[]", OutputSpec)
ADAPTER_FORMATS = (OutputFormat.KOHYA, OutputFormat.MERGED)
"""Output formats that are defined for adapters only."""
_ONE_FILE = (OutputFormat.SINGLE_FILE, OutputFormat.WEBUI, OutputFormat.COMFYUI)
_CONVERTED = (OutputFormat.OPENVINO, OutputFormat.COMPILED)
"""Formats of complete models for one kind of machine."""
_OF_LORA = (OutputFormat.MERGED, *_CONVERTED)
"""Formats that add a LoRA to its base."""
_COMPLETE = tuple(method for method, traits in METHODS.items() if traits.trains is TrainedPart.BASE)
_OPENVINO = tuple(method for method, traits in METHODS.items() if OutputFormat.OPENVINO in traits.formats)


def _only_for(methods: tuple[Method, ...], formats: tuple[OutputFormat, ...], message: str) -> Rule[FineTuneJobSpec]:
    """Return the rule that only these methods have outputs of these formats; a script may have any."""
    return Rule(
        SPEC,
        "outputs",
        f"!has(self.training.method) || self.outputs.all(output, !(output.format in {cel_list(formats)}))"
        f" || self.training.method in {cel_list(methods)}",
        lambda spec: (
            spec.training.method is None
            or spec.training.method in methods
            or all(output.format not in formats for output in spec.outputs)
        ),
        message,
    )


def _of_merged(field: str, formats: tuple[OutputFormat, ...], is_absent: str, holds: Any) -> Rule[OutputSpec]:
    return Rule(
        OUTPUT,
        field,
        f"self.format in {cel_list(formats)} || {is_absent}",
        lambda output: output.format in formats or holds(output),
        f"{field} is for merged models; write format: merged, or leave {field} out",
    )


def _of_converted(field: str, is_absent: str, holds: Any) -> Rule[OutputSpec]:
    return Rule(
        OUTPUT,
        field,
        f"self.format != 'asWritten' || {is_absent}",
        lambda output: output.format is not OutputFormat.AS_WRITTEN or holds(output),
        f"asWritten copies the files of the script unchanged; write format: diffusers, or leave {field} out",
    )


OUTPUT_RULES = (
    _only_for(
        ADAPTER_METHODS,
        ADAPTER_FORMATS,
        f"outputs has a format for {join_names(ADAPTER_METHODS)} only ({join_names(ADAPTER_FORMATS)}); write format: "
        "diffusers",
    ),
    _only_for(
        _OPENVINO,
        _CONVERTED,
        f"outputs has a format ({join_names(_CONVERTED)}) for complete models and LoRA ({join_names(_OPENVINO)}) only; "
        "write format: diffusers",
    ),
    Rule(
        OUTPUT,
        "precision",
        "self.format != 'openvino' || !has(self.precision) || self.precision != 'bf16'",
        lambda output: output.format is not OutputFormat.OPENVINO or output.precision is not OutputPrecision.BF16,
        "OpenVINO stores weights in fp32 or fp16; write precision: fp16, or leave precision out",
    ),
    Rule(
        OUTPUT,
        "quantization",
        "self.format == 'openvino' || !has(self.quantization)",
        lambda output: output.format is OutputFormat.OPENVINO or output.quantization is None,
        "quantization is for OpenVINO; write format: openvino, or leave quantization out",
    ),
    Rule(
        SPEC,
        "outputs",
        f"!has(self.training.method) || self.training.method in {cel_list(ADAPTER_METHODS)} || "
        f"self.outputs.all(output, !(output.format in {cel_list(_CONVERTED)}) || ((!has(output.strength) || "
        "double(output.strength) == 1.0) && (!has(output.adapters) || size(output.adapters) == 0)))",
        lambda spec: (
            spec.training.method is None
            or spec.training.method in ADAPTER_METHODS
            or all(
                output.format not in _CONVERTED or (output.strength == 1.0 and not output.adapters)
                for output in spec.outputs
            )
        ),
        f"outputs has a strength or adapters, which only the LoRA of {join_names(ADAPTER_METHODS)} has; leave strength "
        "and adapters out",
    ),
    _of_merged("layout", (OutputFormat.MERGED,), "!has(self.layout)", lambda output: output.layout is None),
    _of_merged(
        "strength",
        _OF_LORA,
        "!has(self.strength) || double(self.strength) == 1.0",
        lambda output: output.strength == 1.0,
    ),
    _of_merged(
        "adapters",
        _OF_LORA,
        "!has(self.adapters) || size(self.adapters) == 0",
        lambda output: not output.adapters,
    ),
    _of_converted("precision", "!has(self.precision)", lambda output: output.precision is None),
    _of_converted("rank", "!has(self.rank)", lambda output: output.rank is None),
    _of_converted("triggerPhrase", "!has(self.triggerPhrase)", lambda output: output.trigger_phrase is None),
    Rule(
        OUTPUT,
        "full",
        "self.format == 'diffusers' || !has(self.full) || !self.full",
        lambda output: output.format is OutputFormat.DIFFUSERS or not output.full,
        "full is for format diffusers; write format: diffusers, or leave full out",
    ),
    Rule(
        OUTPUT,
        "container",
        f"!has(self.container) || self.container == 'safetensors' || self.format in {cel_list(_ONE_FILE)} || "
        "(self.format == 'merged' && has(self.layout) && self.layout == 'single-file')",
        lambda output: (
            output.container in (None, FileContainer.SAFETENSORS)
            or output.format in _ONE_FILE
            or (output.format is OutputFormat.MERGED and output.layout is OutputLayout.SINGLE_FILE)
        ),
        "ckpt is for single files; write format: single-file, or leave container out",
    ),
    Rule(
        SPEC,
        "outputs",
        f"!has(self.training.method) || self.training.method in {cel_list(ADAPTER_METHODS)} || "
        "self.outputs.all(output, !has(output.rank))",
        lambda spec: (
            spec.training.method is None
            or spec.training.method in ADAPTER_METHODS
            or all(output.rank is None for output in spec.outputs)
        ),
        f"outputs has a rank, which only the LoRA of {join_names(ADAPTER_METHODS)} has; leave rank out",
    ),
    Rule(
        SPEC,
        "outputs",
        f"!has(self.training.method) || self.training.method in {cel_list(_COMPLETE)} || self.outputs.all(output, "
        "!has(output.container) || output.container == 'safetensors' || output.format == 'merged')",
        lambda spec: (
            spec.training.method is None
            or spec.training.method in _COMPLETE
            or all(
                output.container in (None, FileContainer.SAFETENSORS) or output.format is OutputFormat.MERGED
                for output in spec.outputs
            )
        ),
        "outputs has a ckpt, which only complete models can be; leave container out",
    ),
    Rule(
        SPEC,
        "outputs",
        "(has(self.training.ema) && self.training.ema) || self.outputs.all(output, !has(output.ema) || !output.ema)",
        lambda spec: spec.training.ema or all(not output.ema for output in spec.outputs),
        "outputs has ema: true, and training keeps no average; write training.ema: true, or leave ema out",
    ),
)
