"""Writes a pipeline whose denoiser is an AOTInductor package: machine code for the local GPU or CPU, with its weights.

A loader next to it puts the package into a pipeline of diffusers.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from finetune_contract.outputs.spec import OutputPrecision, OutputSpec
from finetune_contract.requirements import find_missing_export
from finetune_trainer.errors import ConfigError
from finetune_trainer.export.formats.about import About
from finetune_trainer.export.formats.diffusers_folder import write_pipeline
from finetune_trainer.export.formats.metadata import resolution_of
from finetune_trainer.models.layouts.trained import TrainedPipeline

_LOG = logging.getLogger(__name__)
MODULE = "finetune_trainer.export.formats.compile_denoiser"
LOADER = "load_compiled.py"
FACTS = "compiled.json"
_STEP = 8
"""Pipelines need sizes that are multiples of it."""
_TAIL = 400


def write_compiled(trained: TrainedPipeline, output: OutputSpec, folder: Path, about: About) -> list[Path]:
    """Write the pipeline without the weights of its denoiser, the package, its facts and the loader.

    Args:
        trained: the pipeline.
        output: the output; its precision is that of all weights, fp32 by default.
        folder: an empty local folder.
        about: the origin, for the size of the pictures.

    Raises:
        ConfigError: there is no compiler, the denoiser cannot be compiled, or the package is not accurate.
        OSError: a file cannot be read or written.
    """
    for message in find_missing_export((output,)):
        raise ConfigError(f"outputs: {message.partition(': ')[2]}")
    precision = output.precision or OutputPrecision.FP32
    write_pipeline(trained, output.model_copy(update={"precision": precision}), folder)
    side = resolution_of(trained.family, about) // _STEP * _STEP
    compile_folder(folder, side, precision)
    for path in (folder / "unet").glob("*.safetensors*"):
        path.unlink()
    shutil.copyfile(Path(__file__).with_name(LOADER), folder / LOADER)
    facts = read_facts(folder)
    _LOG.info("%s", describe(facts))
    if not facts["isAccurate"]:
        raise ConfigError(
            f"outputs: the compiled denoiser differs from eager mode by {facts['maxDifference']:.2g} of the largest "
            "value; write precision: fp32 for this output, or format: diffusers"
        )
    return sorted(path for path in folder.rglob("*") if path.is_file())


def read_facts(folder: Path) -> dict[str, object]:
    """Return what is known about the package in a folder."""
    facts: dict[str, object] = json.loads((folder / FACTS).read_text(encoding="utf-8"))
    return facts


def describe(facts: dict[str, object]) -> str:
    """Return the measured speed as one phrase."""
    return (
        f"a call of the compiled denoiser takes {facts['compiledSeconds']:.3g} s, and {facts['eagerSeconds']:.3g} s in "
        f"eager mode: {facts['speedUp']} times as fast ({facts['machine']}, {facts['precision']}, two inputs of "
        f"{facts['width']} x {facts['height']})"
    )


def compile_folder(folder: Path, side: int, precision: OutputPrecision) -> None:
    """Compile the denoiser of a folder in another process, whose temporary files are removed.

    Raises:
        ConfigError: it fails; the message has the end of its output.
    """
    with tempfile.TemporaryDirectory(prefix="compile-") as cache:
        result = subprocess.run(
            [sys.executable, "-m", MODULE, str(folder), str(side), str(side), precision.value],
            env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            check=False,
        )
    if result.returncode:
        last = " ".join(result.stderr.split())[-_TAIL:]
        raise ConfigError(
            f"outputs: the denoiser cannot be compiled on this machine (exit code {result.returncode}): {last}; write "
            "format: diffusers"
        )
