"""Measures what each output format costs, beside a plain copy of the same weights.

A base of the size of SDXL with random weights in fp16 is written to disk. Then each format is written by a process of
its own, in turn with a plain copy in such a process: seconds until the files are durable, seconds of CPU time, which
other processes of the machine change less, and the peak of the resident memory. Both processes have imported the same
libraries, so that the difference is what the format needs.

Usage: python -m bench.outputs [--folder FOLDER] [--size real|tiny] [--repeats N]
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

FORMATS = ("diffusers", "single-file", "kohya", "merged")
COPY_BLOCK = 1 << 20
RANK = 64
_SHOWN = ("seconds", "CPU s", "MiB")
_RATIOS = {"seconds": "over_copy", "cpu_seconds": "cpu_over_copy", "peak_mib": "memory_over_copy"}
_LAYERS = ("to_q", "to_k", "to_v", "to_out.0")


@dataclass(frozen=True)
class Cost:
    """What one process has used.

    Attributes:
        seconds: until its files are durable.
        cpu_seconds: of the processor, for the same.
        peak_mib: peak of its resident memory.
        size: bytes written.
    """

    seconds: float
    cpu_seconds: float
    peak_mib: float
    size: int


def main() -> int:
    """Measure all formats and print a table, and JSON as the last line."""
    parser = argparse.ArgumentParser(prog="python -m bench.outputs", description=main.__doc__)
    parser.add_argument("--folder", type=Path, help="folder for about 14 GB of files; default: a temporary one")
    parser.add_argument("--size", choices=("real", "tiny"), default="real", help="size of the base")
    parser.add_argument("--repeats", type=int, default=1, help="number of measurements of each format")
    parser.add_argument("--child", nargs=4, metavar=("FORMAT", "BASE", "LORA", "OUT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        run_child(*options.child)
        return 0
    with tempfile.TemporaryDirectory(prefix="bench-outputs-", dir=options.folder) as name:
        base, lora = Path(name) / "base", Path(name) / "lora.safetensors"
        print("writing a base with random weights", flush=True)
        _write_inputs(base, lora, options.size)
        report(base, lora, Path(name) / "out", options.repeats)
    return 0


def report(base: Path, lora: Path, out: Path, repeats: int) -> None:
    """Measure each format between two copies of its inputs, and print the results."""
    figures: dict[str, float] = {}
    print(f"{'format':<12} {'GB':>6}" + "".join(f" {each:>8} {'copy':>6} {'ratio':>6}" for each in _SHOWN), flush=True)
    for format_name in FORMATS:
        own: list[Cost] = []
        copies: list[Cost] = []
        for _ in range(repeats):
            source = lora if format_name == "kohya" else base
            for kind in ("copy", format_name, "copy"):
                cost = measure(kind, source if kind == "copy" else base, lora, out)
                (copies if kind == "copy" else own).append(cost)
        found, copy = _summary(own), _summary(copies)
        key, line = format_name.replace("-", "_"), f"{format_name:<12} {found.size / 1e9:6.2f}"
        for name in ("seconds", "cpu_seconds", "peak_mib"):
            value, plain = getattr(found, name), getattr(copy, name)
            line += f" {value:8.2f} {plain:6.2f} {value / plain:6.2f}"
            figures |= {f"{key}_{name}": value, f"{key}_copy_{name}": plain, f"{key}_{_RATIOS[name]}": value / plain}
        print(line, flush=True)
    keys = [name.replace("-", "_") for name in FORMATS]
    worst = {f"worst_{ratio}": max(figures[f"{key}_{ratio}"] for key in keys) for ratio in _RATIOS.values()}
    print(json.dumps({name: round(value, 3) for name, value in (worst | figures).items()}))


def _summary(costs: Sequence[Cost]) -> Cost:
    """Return the median of the times, and the highest peak."""
    return Cost(
        statistics.median(each.seconds for each in costs),
        statistics.median(each.cpu_seconds for each in costs),
        max(each.peak_mib for each in costs),
        costs[-1].size,
    )


def measure(kind: str, base: Path, lora: Path, out: Path) -> Cost:
    """Return what one process costs; what it wrote is deleted."""
    command = [sys.executable, "-m", "bench.outputs", "--child", kind, str(base), str(lora), str(out)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True)
    shutil.rmtree(out)
    return Cost(**json.loads(result.stdout.splitlines()[-1]))


def run_child(kind: str, base: str, lora: str, out: str) -> None:
    """Write one format, or a plain copy, and print its figures."""
    write = _writer(kind, Path(base), Path(lora))
    folder = Path(out)
    folder.mkdir()
    started, started_cpu = time.monotonic(), time.process_time()
    files = write(folder)
    for path in files:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    seconds, cpu_seconds = time.monotonic() - started, time.process_time() - started_cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps(asdict(Cost(seconds, cpu_seconds, peak, sum(path.stat().st_size for path in files)))))


def _writer(kind: str, base: Path, lora: Path) -> Callable[[Path], list[Path]]:
    """Return the function that writes into a folder, with everything imported and opened."""
    from finetune_contract.input_spec import ModelSpec  # noqa: PLC0415
    from finetune_contract.outputs.spec import OutputFormat, OutputSpec  # noqa: PLC0415
    from finetune_trainer.export.formats.about import About  # noqa: PLC0415
    from finetune_trainer.export.formats.merge import read_adapter  # noqa: PLC0415
    from finetune_trainer.export.formats.write import write_format  # noqa: PLC0415
    from finetune_trainer.models.base import open_base  # noqa: PLC0415
    from finetune_trainer.models.layouts.trained import Trained, TrainedPipeline  # noqa: PLC0415

    if kind == "copy":
        return lambda folder: _copy(base, folder)
    family = open_base(ModelSpec(base=str(base)))
    trained: Trained = TrainedPipeline(family, {})
    if kind in ("kohya", "merged"):
        trained = read_adapter(lora, family, "lora")
    return lambda folder: write_format(trained, OutputSpec(format=OutputFormat(kind), to="."), folder, About("bench"))


def _copy(source: Path, folder: Path) -> list[Path]:
    """Copy a file, or all files of a folder."""
    files = [source] if source.is_file() else sorted(path for path in source.rglob("*") if path.is_file())
    written = []
    for path in files:
        target = folder / (path.name if source.is_file() else path.relative_to(source))
        target.parent.mkdir(parents=True, exist_ok=True)
        with path.open("rb") as read, target.open("wb") as write:
            shutil.copyfileobj(read, write, COPY_BLOCK)
        written.append(target)
    return written


def _write_inputs(base: Path, lora: Path, size: str) -> None:
    """Write a base, and a LoRA for its attention, with random weights, in a process that ends with its memory."""
    script = f"from bench.outputs import write_inputs; write_inputs({str(base)!r}, {str(lora)!r}, {size!r})"
    subprocess.run([sys.executable, "-c", script], check=True, stderr=subprocess.DEVNULL)


def write_inputs(base: str, lora: str, size: str) -> None:
    """Write a base of the size of SDXL, tensor by tensor, and a LoRA for its attention."""
    import torch  # noqa: PLC0415

    from finetune_trainer.tensor_file import write_tensors  # noqa: PLC0415
    from finetune_trainer.weights.files import write_safetensors  # noqa: PLC0415
    from finetune_trainer.weights.lazy import LazyTensor  # noqa: PLC0415
    from testing.trainer import tiny  # noqa: PLC0415
    from testing.trainer.real_sizes import make_parts  # noqa: PLC0415

    folder = tiny.write_base(Path(base), family="sdxl")
    pool = torch.randn(1 << 22, generator=torch.Generator().manual_seed(0)).mul_(0.02).half()

    def random(value: torch.Tensor) -> LazyTensor:
        width = value[0].numel() if value.dim() else 1

        def rows(start: int, stop: int) -> torch.Tensor:
            count = (stop - start) * width
            return pool.repeat(-(-count // len(pool)))[:count].view(-1, *value.shape[1:])

        return LazyTensor(torch.float16, tuple(value.shape), rows)

    if size == "real":
        for name, module in make_parts("sdxl").items():
            for old in (folder / name).glob("*.safetensors"):
                old.unlink()
            is_text = name.startswith("text")
            (module.config.save_pretrained if is_text else module.save_config)(folder / name)
            stem = "model" if is_text else "diffusion_pytorch_model"
            state = {key: random(value) for key, value in module.state_dict().items()}
            write_safetensors(folder / name / f"{stem}.safetensors", state, {"format": "pt"})
    from finetune_trainer.models.layouts.folder import PipelineFolder  # noqa: PLC0415

    layers: dict[str, torch.Tensor] = {}
    for name, tensor in PipelineFolder(folder, folder / "vae").tensors("unet").items():
        module_name = name.removesuffix(".weight")
        if name.endswith(".weight") and ".attn" in name and module_name.endswith(_LAYERS):
            layers[f"unet.{module_name}.lora_A.weight"] = torch.randn(RANK, tensor.shape[1])
            layers[f"unet.{module_name}.lora_B.weight"] = torch.randn(tensor.shape[0], RANK)
    write_tensors(Path(lora), layers, {"format": "pt"})


if __name__ == "__main__":
    sys.exit(main())
