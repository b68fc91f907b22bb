"""Turns the flags of a script of diffusers into a manifest for a method of this operator. Pure; see `convert`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from finetune_contract.spec import Method
from finetune_operator.api import crd
from finetune_operator.api.flags import FLAGS
from finetune_operator.api.job import API_VERSION, KIND
from finetune_operator.cli.errors import UsageError

SCRIPTS = {
    "train_text_to_image": Method.FULL,
    "train_text_to_image_sdxl": Method.FULL,
    "train_text_to_image_lora": Method.LORA,
    "train_text_to_image_lora_sdxl": Method.LORA,
    "train_dreambooth": Method.DREAMBOOTH,
    "train_dreambooth_lora": Method.DREAMBOOTH_LORA,
    "train_dreambooth_lora_sdxl": Method.DREAMBOOTH_LORA,
    "textual_inversion": Method.TEXTUAL_INVERSION,
    "textual_inversion_sdxl": Method.TEXTUAL_INVERSION,
    "train_controlnet": Method.CONTROLNET,
    "train_controlnet_sdxl": Method.CONTROLNET,
}
"""Method that trains what a script trains."""
_PRECISIONS = {"no": "fp32"}
_ADAPTERS = (Method.LORA, Method.DREAMBOOTH_LORA)
_SPECIAL: dict[str, tuple[str, Any]] = {
    "use_8bit_adam": ("training.optimizer", "adamw8bit"),
    "offset_noise": ("training.noiseOffset", 0.1),
    "enable_xformers_memory_efficient_attention": ("training.attention", "auto"),
}
"""Flags without a value, and the field and value that replace each."""
_BY_OTHERS = {
    "with_prior_preservation": "dreambooth.classPrompt enables it",
    "resume_from_checkpoint": "a job resumes by itself; the checkpoints of scripts cannot be read",
}
"""Flags that need no field."""


def method_of(script: str) -> Method | None:
    """Return the method that trains what a script trains; None if there is none."""
    return SCRIPTS.get(Path(script).stem)


def to_recipe(script: str, args: dict[str, Any], topology: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return a manifest for a method, and what became of each flag.

    Raises:
        UsageError: no method trains what the script trains.
    """
    method = method_of(script)
    if method is None:
        known = ", ".join(SCRIPTS)
        raise UsageError(
            f"no method trains what {Path(script).name} trains (--recipe knows {known}); leave --recipe out"
        )
    spec: dict[str, Any] = {"training": {"method": method.value}, "topology": topology}
    report: list[str] = []
    formats = ["diffusers"]
    for name, value in args.items():
        if name == "output_dir":
            report.append("--output_dir: spec.outputs")
        elif name == "output_kohya_format":
            formats.append("kohya")
            report.append(f"--{name}: spec.outputs")
        else:
            report.append(f"--{name}: {_apply(spec, name, value, method)}")
    folder = Path(str(args.get("output_dir", "out"))).name or "out"
    spec["outputs"] = [
        {"format": each, "to": folder if each == "diffusers" else f"{folder}-{each}"} for each in formats
    ]
    spec["checkpoint"] = {
        **spec.get("checkpoint", {}),
        "storage": {"persistentVolumeClaim": {"claimName": "checkpoints"}},
    }
    report.append("spec.checkpoint.storage: write the volume that the pods share")
    return {"apiVersion": API_VERSION, "kind": KIND, "metadata": {}, "spec": spec}, report


def _apply(spec: dict[str, Any], name: str, value: Any, method: Method) -> str:
    """Write the field that replaces a flag; return what became of the flag."""
    if name in _SPECIAL:
        path, fixed = _SPECIAL[name]
        _put(spec, path, fixed)
        return f"spec.{path}"
    if name in _BY_OTHERS:
        return f"left out; {_BY_OTHERS[name]}"
    flag = FLAGS.get(name)
    if flag is None:
        return "left out; no field replaces it"
    if flag.field is None:
        return f"left out; {flag.note}"
    path = flag.field.removeprefix("spec.")
    if name == "train_text_encoder" and method in _ADAPTERS:
        path = "training.lora.trainTextEncoder"
    _put(spec, path, _typed(path, name, value))
    return f"spec.{path}" + (f" ({flag.note})" if flag.note else "")


def _typed(path: str, name: str, value: Any) -> Any:
    """Return the value of a flag with the type of its field."""
    if name == "mixed_precision":
        return _PRECISIONS.get(value, value)
    if name == "optimizer":
        return str(value).lower()
    schema = crd.find(f"spec.{path}")
    if schema.get("type") == "array":
        return value if isinstance(value, list) else [value]
    if schema.get("type") == "string":
        return str(value)
    if schema.get("type") == "number" and isinstance(value, str):
        return float(value)
    return value


def _put(spec: dict[str, Any], path: str, value: Any) -> None:
    *parents, last = path.split(".")
    for parent in parents:
        spec = spec.setdefault(parent, {})
    spec[last] = value
