"""The advice of each rule about outputs; see `advice`."""

from __future__ import annotations

from typing import Any

T = "spec.training"

OUTPUT_ADVICE: dict[str, dict[str, dict[str, Any]]] = {
    "outputs-overwrite-spelled-otherwise": {
        "a different to for each": {
            "spec.outputs": [{"format": "merged", "to": "/out"}, {"format": "diffusers", "to": "out/"}],
        },
    },
    **{
        f"{name}-of-lora": {
            "format: merged": {"spec.outputs": [{"format": "merged", "to": "out", name: value}]},
            f"leave {name} out": {"spec.outputs": [{"format": "kohya", "to": "out"}]},
        }
        for name, value in {
            "layout": "single-file",
            "strength": 0.5,
            "adapters": [{"source": "me/lora"}],
        }.items()
    },
    "openvino-of-controlnet": {"format: diffusers": {"spec.outputs": [{"format": "diffusers", "to": "out"}]}},
    "compiled-of-embedding": {"format: diffusers": {"spec.outputs": [{"format": "diffusers", "to": "out"}]}},
    "bf16-of-openvino": {
        "precision: fp16": {"spec.outputs": [{"format": "openvino", "to": "out", "precision": "fp16"}]},
        "leave precision out": {"spec.outputs": [{"format": "openvino", "to": "out"}]},
    },
    "quantization-of-kohya": {
        "format: openvino": {"spec.outputs": [{"format": "openvino", "to": "out", "quantization": "int8"}]},
        "leave quantization out": {"spec.outputs": [{"format": "kohya", "to": "out"}]},
    },
    "strength-of-full": {"leave strength and adapters out": {"spec.outputs": [{"format": "openvino", "to": "out"}]}},
    "full-of-kohya": {
        "format: diffusers": {"spec.outputs": [{"format": "diffusers", "to": "out", "full": True}]},
        "leave full out": {"spec.outputs": [{"format": "kohya", "to": "out"}]},
    },
    "ckpt-of-folder": {
        "format: single-file": {"spec.outputs": [{"format": "single-file", "to": "out", "container": "ckpt"}]},
        "leave container out": {"spec.outputs": [{"format": "diffusers", "to": "out"}]},
    },
    "rank-of-full": {
        "leave rank out": {"spec.outputs": [{"format": "diffusers", "to": "out"}]},
    },
    "ckpt-of-lora": {"leave container out": {"spec.outputs": [{"format": "webui", "to": "out"}]}},
    "average-of-none": {
        "training.ema: true": {f"{T}.ema": True},
        "leave ema out": {"spec.outputs": [{"format": "diffusers", "to": "out"}]},
    },
    **{
        f"{name}-as-written": {
            "format: diffusers": {"spec.outputs": [{"format": "diffusers", "to": "out", field: value}]},
            f"leave {field} out": {"spec.outputs": [{"format": "asWritten", "to": "out"}]},
        }
        for name, (field, value) in {
            "precision": ("precision", "bf16"),
            "rank": ("rank", 4),
            "trigger": ("triggerPhrase", "sks"),
        }.items()
    },
}
