"""Packages and programs that settings of a run need. Torch-free.

`finetune validate --here`, `finetune run` and the trainer share these checks: the trainer repeats them before it loads
anything, because its image may lack what the machine of the user has.
"""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable, Iterable, Iterator

from finetune_contract.outputs.spec import OutputFormat, OutputSpec
from finetune_contract.spec import Optimizer, SwitchMode, TrackerName, TrainingSpec

PACKAGES = {TrackerName.TENSORBOARD: "tensorboard", TrackerName.WANDB: "wandb", TrackerName.MLFLOW: "mlflow"}
"""Package of each tracker."""
COMPILERS = ("c++", "g++", "clang++", "gcc", "cc")
"""Programs of which `training.compile` needs one."""
_INSTALL_EXPORT = "install finetune-operator[trainer,export] in an environment of its own and use its finetune command"


def has_package(name: str) -> bool:
    """Return whether a package is installed; it is not imported."""
    return importlib.util.find_spec(name) is not None


def has_compiler(which: Callable[[str], str | None] = shutil.which) -> bool:
    """Return whether a C++ compiler is installed."""
    return any(which(name) for name in COMPILERS)


def find_missing_software(
    training: TrainingSpec,
    has: Callable[[str], bool] = has_package,
    which: Callable[[str], str | None] = shutil.which,
) -> Iterator[str]:
    """Yield a message, with the field at its start, for each package or program that this machine lacks.

    Args:
        training: the settings.
        has: returns whether a package is installed.
        which: returns the path of a program, or None.
    """
    for name in training.trackers:
        if not has(PACKAGES[name]):
            yield (
                f"training.trackers: {name.value} needs the package {PACKAGES[name]}, which is not installed here; "
                "install it, or leave the tracker out: losses and pictures are in the job's folder anyway"
            )
    if training.optimizer is Optimizer.ADAMW_8BIT and not has("bitsandbytes"):
        yield (
            "training.optimizer: adamw8bit needs the package bitsandbytes, which is not installed here; install it, or "
            "write adamw"
        )
    if training.compile is SwitchMode.ON and not has_compiler(which):
        yield "training.compile: no C++ compiler is installed here; install one, or write compile: off"


def find_missing_export(
    outputs: Iterable[OutputSpec],
    has: Callable[[str], bool] = has_package,
    which: Callable[[str], str | None] = shutil.which,
) -> Iterator[str]:
    """Yield a message, with the field at its start, for each output that this machine cannot write.

    Args:
        outputs: the outputs.
        has: returns whether a package is installed.
        which: returns the path of a program, or None.
    """
    for number, output in enumerate(outputs):
        if output.format is OutputFormat.COMPILED and not has_compiler(which):
            yield (
                f"outputs[{number}].format: compiled needs a C++ compiler, which is not installed here; install g++, "
                "or write format: diffusers"
            )
        if output.format is not OutputFormat.OPENVINO:
            continue
        if not all(has(name) for name in ("openvino", "optimum", "optimum.intel")):
            yield (
                f"outputs[{number}].format: openvino needs the packages openvino and optimum-intel, which are not "
                f"installed here; {_INSTALL_EXPORT}, or write format: diffusers"
            )
        elif output.quantization is not None and not has("nncf"):
            yield (
                f"outputs[{number}].quantization: int8 needs the package nncf, which is not installed here; "
                f"{_INSTALL_EXPORT}, or leave quantization out"
            )
