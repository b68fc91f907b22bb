"""Draws pictures with one model and writes them as one grid. `finetune generate` starts it.

Usage: python -m finetune_trainer.generate.main REQUEST CACHE

REQUEST is a `GenerateRequest` as JSON. The result is printed as JSON.

Equal requests give equal pictures on a machine: the noise of a picture depends on its seed
only, and is drawn on the CPU.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from finetune_contract import environment
from finetune_contract.bucket import is_bucket_url
from finetune_contract.exit_codes import ExitCode
from finetune_contract.outputs.generation import MAX_PICTURES, DrawnColumn, GenerateRequest, GenerateResult
from finetune_contract.outputs.spec import OutputFormat, OutputSpec
from finetune_contract.run_spec import RunSpec
from finetune_trainer import libraries
from finetune_trainer.errors import ConfigError, RankError, StorageError
from finetune_trainer.export.from_checkpoint import export_checkpoint
from finetune_trainer.fetched import fetch
from finetune_trainer.generate.columns import Column, GridColumns, check
from finetune_trainer.generate.found import FLAG, find
from finetune_trainer.generate.grid import build_grid
from finetune_trainer.generate.origin import Origin, read_origin
from finetune_trainer.models.hub import limit_waits

_LOG = logging.getLogger(__name__)
_STEP = 8
"""Pipelines need sizes that are multiples of it."""
_SIZE_FLAG = "--size"


def generate(request: GenerateRequest, cache_dir: Path) -> GenerateResult:
    """Draw the pictures and write the grid.

    Args:
        request: the request.
        cache_dir: folder for files that are fetched or converted.

    Raises:
        ConfigError: a flag, the model or its base does not fit.
        NetworkError: the hub or a bucket does not answer.
        StorageError: a file cannot be read, or the grid cannot be written.
    """
    _check_request(request)
    result, pictures = draw(request, cache_dir)
    _save(build_grid([each.label for each in result.columns], _row_labels(request), pictures), Path(request.grid))
    return result


def draw(request: GenerateRequest, cache_dir: Path) -> tuple[GenerateResult, list[list[Image.Image]]]:
    """Return what was drawn, and the pictures of each column; see `generate`."""
    with _model(request, cache_dir) as path:
        found = find(path, request.name)
        origin = read_origin(found.path)
        check(request, found, origin)
        columns = GridColumns(_with_fetched_base(request, origin, cache_dir), found, origin, cache_dir)
        drawn: list[DrawnColumn] = []
        pictures: list[list[Image.Image]] = []
        try:
            for column in columns.open():
                images, seconds = _draw_column(column, request, origin)
                drawn.append(DrawnColumn(label=column.label, seconds=tuple(seconds)))
                pictures.append(images)
                # The next column may need the memory of this one.
                del column
        except torch.OutOfMemoryError as error:
            raise ConfigError(
                f"--device: the memory of the GPU is too small ({str(error)[:120]}); write a smaller {_SIZE_FLAG}, "
                "--precision fp16 or --device cpu"
            ) from error
    width, height = pictures[0][0].size
    result = GenerateResult(
        grid=request.grid, device=columns.device_name, width=width, height=height, columns=tuple(drawn)
    )
    return result, pictures


@contextlib.contextmanager
def _model(request: GenerateRequest, cache_dir: Path) -> Iterator[Path]:
    """Yield the path of the model; a checkpoint is written as the output `diffusers` of its job first."""
    if request.checkpoint is None:
        assert request.model is not None
        yield Path(fetch(request.model, FLAG, cache_dir, _LOG.info))
        return
    with tempfile.TemporaryDirectory(prefix="generate-") as name:
        folder = Path(name) / "model"
        spec = RunSpec.read(Path(request.checkpoint.run))
        output = OutputSpec(format=OutputFormat.DIFFUSERS, to=str(folder))
        export_checkpoint(spec, Path(request.checkpoint.folder), output, cache_dir)
        yield folder


def _with_fetched_base(request: GenerateRequest, origin: Origin, cache_dir: Path) -> GenerateRequest:
    """Return the request with a base on this machine if the base is in an object store."""
    base = request.base or origin.base
    if base is None or not is_bucket_url(base.base):
        return request
    fetched = fetch(base.base, "--base", cache_dir, _LOG.info)
    return request.model_copy(update={"base": base.model_copy(update={"base": fetched})})


def _check_request(request: GenerateRequest) -> None:
    """Refuse what does not depend on the model.

    Raises:
        ConfigError: the message names the flag and the remedy.
    """
    count = len(request.prompts) * len(request.seeds) * (len(request.strengths or (1.0,)) + request.compare_base)
    if count > MAX_PICTURES:
        raise ConfigError(
            f"--prompt: {count} pictures do not fit into a grid of {MAX_PICTURES}; write fewer prompts, seeds or "
            "strengths"
        )
    for size in (request.width, request.height):
        if size is not None and size % _STEP:
            raise ConfigError(
                f"{_SIZE_FLAG}: {size} is not a multiple of {_STEP}; write e.g. {-(-size // _STEP) * _STEP}"
            )
    folder = Path(request.grid).absolute().parent
    if not folder.is_dir():
        raise ConfigError(f"--grid: the folder {folder} does not exist; create it, or write another path")
    if Path(request.grid).suffix.lower() not in Image.registered_extensions():
        raise ConfigError(f"--grid: {request.grid} has no suffix of an image format; write e.g. grid.png")
    if request.condition is not None and not Path(request.condition).is_file():
        raise ConfigError(f"--condition: {request.condition} does not exist; write the path of a picture")


def _draw_column(column: Column, request: GenerateRequest, origin: Origin) -> tuple[list[Image.Image], list[float]]:
    """Return the pictures of a column, and the seconds of each."""
    images, seconds = [], []
    options = {**_options(column.pipeline, request, origin), **column.options}
    for prompt in request.prompts:
        for seed in request.seeds:
            started = time.monotonic()
            images.append(_draw(column.pipeline, prompt, seed, options))
            seconds.append(time.monotonic() - started)
            _LOG.info("%s: %.2f s for %r with seed %d", column.label, seconds[-1], prompt, seed)
    return images, seconds


@torch.no_grad()
def _draw(pipeline: Any, prompt: str, seed: int, options: dict[str, Any]) -> Image.Image:
    generator = torch.Generator().manual_seed(seed)
    picture: Image.Image = pipeline(prompt, generator=generator, **options).images[0].convert("RGB")
    return picture


def _options(pipeline: Any, request: GenerateRequest, origin: Origin) -> dict[str, Any]:
    """Return the arguments of the pipeline for all pictures of a column."""
    default = _default_size(pipeline, origin)
    sizes = {"width": request.width or default, "height": request.height or default}
    skipped = {"clip_skip": origin.clip_skip} if origin.clip_skip else {}
    return {
        "num_inference_steps": request.steps,
        "guidance_scale": request.guidance,
        "negative_prompt": request.negative_prompt,
        **{name: size for name, size in sizes.items() if size is not None},
        **skipped,
    }


def _default_size(pipeline: Any, origin: Origin) -> int | None:
    """Return the size of the training images, or else that of the base; None to leave it to the pipeline."""
    if origin.resolution is not None:
        return origin.resolution // _STEP * _STEP
    size = getattr(getattr(pipeline.unet, "config", None), "sample_size", None)
    return size * int(pipeline.vae_scale_factor) if isinstance(size, int) else None


def _row_labels(request: GenerateRequest) -> list[str]:
    several = len(request.seeds) > 1
    return [f"{prompt} (seed {seed})" if several else prompt for prompt in request.prompts for seed in request.seeds]


def _save(grid: Image.Image, path: Path) -> None:
    temporary = path.with_name(f".{path.stem}.writing{path.suffix}")
    try:
        grid.save(temporary)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise StorageError(
            f"--grid: {path} cannot be written ({error.strerror or error}); write another path"
        ) from error


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw as the command line says; print the result as JSON, and return an exit code of the contract."""
    given, cache = sys.argv[1:] if arguments is None else arguments
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(message)s")
    libraries.prepare({environment.CACHE_DIR: cache, **os.environ})
    limit_waits()
    try:
        result = generate(GenerateRequest.model_validate_json(given), Path(cache))
    except RankError as error:
        _LOG.error("%s", error)
        return error.code
    sys.stdout.write(f"{result.model_dump_json(by_alias=True)}\n")
    return ExitCode.DONE


if __name__ == "__main__":
    sys.exit(main())
