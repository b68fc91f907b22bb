"""The example scripts of diffusers, unmodified, each on a tiny base: start, notice, resume, finish, load the output.

The scripts are read from the folder that FINETUNE_DIFFUSERS_EXAMPLES names, for example the folder `examples` of the
source archive of a release. They are not part of this repository. A script whose imports are not installed, for example
torchvision, is skipped.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from finetune_contract import environment
from finetune_contract.exit_codes import ExitCode
from testing.trainer.script_ranks import At, ScriptRanks
from testing.trainer.scripts import script_spec

EXAMPLES = os.environ.get(environment.EXAMPLES, "")
pytestmark = [
    pytest.mark.trainer,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(not EXAMPLES, reason=f"{environment.EXAMPLES} does not name the folder of diffusers' examples"),
]
STEPS = 4
COMMON: dict[str, Any] = {
    "resolution": 64,
    "train_batch_size": 1,
    "max_train_steps": STEPS,
    "checkpointing_steps": 100,
    "seed": 1,
    "report_to": "tensorboard",
}
VALIDATION = {"validation_prompt": "a dog", "num_validation_images": 1}


@dataclass(frozen=True)
class Example:
    """One script.

    Attributes:
        path: below the folder of examples.
        family: of its base.
        data: flag of its data set: a folder with captions, of pictures only, or of conditioning images.
        args: further flags.
        output: file that it writes.
    """

    path: str
    family: str
    data: str
    args: Mapping[str, Any] = field(default_factory=dict)
    output: str = "pytorch_lora_weights.safetensors"

    @property
    def name(self) -> str:
        return Path(self.path).stem


DREAMBOOTH = {"instance_prompt": "a photo of sks dog"}
INVERSION = {
    "placeholder_token": "<toy>",
    "initializer_token": "a",
    "learnable_property": "object",
    "repeats": 2,
}
EXAMPLES_OF_DIFFUSERS = (
    Example("text_to_image/train_text_to_image.py", "sd1", "captions", {"use_ema": True}, "unet/config.json"),
    Example("text_to_image/train_text_to_image_lora.py", "sd1", "captions", {"rank": 2, **VALIDATION}),
    Example("text_to_image/train_text_to_image_sdxl.py", "sdxl", "captions", {}, "unet/config.json"),
    Example("text_to_image/train_text_to_image_lora_sdxl.py", "sdxl", "captions", {"rank": 2}),
    Example("dreambooth/train_dreambooth.py", "sd1", "pictures", DREAMBOOTH, "unet/config.json"),
    Example("dreambooth/train_dreambooth_lora.py", "sd1", "pictures", {**DREAMBOOTH, "rank": 2}),
    Example("dreambooth/train_dreambooth_lora_sdxl.py", "sdxl", "pictures", {**DREAMBOOTH, "rank": 2}),
    Example(
        "dreambooth/train_dreambooth_lora_flux.py",
        "flux",
        "pictures",
        {**DREAMBOOTH, "rank": 2, "guidance_scale": 1, "max_sequence_length": 16},
    ),
    Example("textual_inversion/textual_inversion.py", "sd1", "pictures", INVERSION, "learned_embeds.safetensors"),
    Example("controlnet/train_controlnet.py", "sd1", "conditioned", {}, "config.json"),
    Example("controlnet/train_controlnet_sdxl.py", "sdxl", "conditioned", {}, "config.json"),
)


@pytest.fixture(scope="module", name="inputs")
def _inputs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Example], dict[str, Any]]:
    """Return the flags that name the base and the data set of an example."""
    from testing.trainer import tiny  # noqa: PLC0415  slow to import

    folder = tmp_path_factory.mktemp("inputs")
    source = sorted((tiny.write_data(folder / "source", 8) / "train").glob("?.png"))
    data, pictures = folder / "data", folder / "pictures"
    for each in (data, pictures):
        each.mkdir()
        for picture in source:
            shutil.copy(picture, each)
    rows = [json.dumps({"file_name": picture.name, "text": f"picture {picture.stem}"}) for picture in source]
    (data / "metadata.jsonl").write_text("\n".join(rows), encoding="utf-8")
    written: dict[str, Path] = {}

    def flags(example: Example) -> dict[str, Any]:
        if example.family not in written:
            written[example.family] = _write_base(folder / example.family, example.family)
        values: dict[str, Any] = {"pretrained_model_name_or_path": str(written[example.family])}
        if example.data == "pictures":
            flag = "train_data_dir" if example.name == "textual_inversion" else "instance_data_dir"
            return values | {flag: str(pictures)}
        values |= {"train_data_dir": str(data)}
        if example.data == "conditioned":
            return values | {"conditioning_image_column": "image", "image_column": "image", "caption_column": "text"}
        return values | {"caption_column": "text"}

    return flags


def _write_base(folder: Path, family: str) -> Path:
    from testing.trainer import tiny, tiny_flux  # noqa: PLC0415  slow to import

    if family == "flux":
        return tiny_flux.write_flux_base(folder)
    base = tiny.write_base(folder, family=family)
    write_vae(base / "vae")
    return base


def write_vae(folder: Path) -> None:
    """Write a VAE with the factor 8 that the scripts for ControlNet expect."""
    import torch  # noqa: PLC0415  slow to import
    from diffusers import AutoencoderKL  # noqa: PLC0415

    torch.manual_seed(0)
    AutoencoderKL(
        sample_size=64,
        block_out_channels=(8,) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=4,
    ).save_pretrained(folder)


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("example", EXAMPLES_OF_DIFFUSERS, ids=lambda example: example.name)
def test_an_example_survives_a_notice(
    example: Example, world_size: int, inputs: Callable[[Example], dict[str, Any]], tmp_path: Path
) -> None:
    path = _find(example)
    if missing := _missing_packages(path):
        pytest.skip(f"{path.name} imports {', '.join(missing)}, which is not installed; install it next to torch")
    spec = script_spec(path, {**COMMON, **inputs(example), **example.args})
    whole = ScriptRanks(spec, tmp_path / "whole", world_size=world_size)
    assert whole.run() == [0] * world_size, whole.stderr()
    run = ScriptRanks(spec, tmp_path / "run", world_size=world_size, at=(At("backward", 2, 0, signal.SIGTERM),))
    assert run.run() == [ExitCode.SAVED] * world_size, run.stderr()
    again = ScriptRanks(spec, run.folder, attempt=2, world_size=world_size)
    assert again.run() == [0] * world_size, again.stderr()
    assert again.reports()[-1]["restoredStep"] >= 2
    assert (again.reports()[-1]["step"], again.reports()[-1]["totalSteps"]) == (STEPS, STEPS)
    assert again.output(example.output)
    assert _weights(again.job_dir) == _weights(whole.job_dir)


def _find(example: Example) -> Path:
    """Return the path of a script."""
    path = Path(EXAMPLES) / example.path
    assert path.is_file(), f"{environment.EXAMPLES}={EXAMPLES} has no {example.path}; name diffusers' folder examples"
    return path


def _missing_packages(path: Path) -> list[str]:
    """Return the packages that a script imports unconditionally and that are not installed."""
    names: set[str] = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module)
    packages = {name.partition(".")[0] for name in names} - set(sys.stdlib_module_names)
    return sorted(name for name in packages if importlib.util.find_spec(name) is None)


def _weights(job_dir: Path) -> dict[str, tuple[dict[str, Any], bytes]]:
    """Return the weights that a script has written: names, types and positions, and the values."""
    folder = job_dir / "script"
    paths = [
        path for path in folder.rglob("*.safetensors") if not path.relative_to(folder).parts[0].startswith("check")
    ]
    assert paths
    return {str(path.relative_to(folder)): _read(path) for path in paths}


def _read(path: Path) -> tuple[dict[str, Any], bytes]:
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    # It contains the names of layers in the order of a set, which differs between processes.
    header.pop("__metadata__", None)
    return header, content[start:]
