"""Loads a pipeline whose denoiser is compiled. This file is next to each one; it needs diffusers and torch only.

    from load_compiled import load
    pipeline = load("FOLDER")
    pipeline("a photo of a cat").images[0].save("cat.png")

The package contains machine code: load only folders that you trust.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput

FACTS, PACKAGE = "compiled.json", "unet.pt2"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class CompiledUNet(UNet2DConditionModel):  # type: ignore[misc]
    """A UNet without weights that calls the package, which contains them."""

    @classmethod
    def load(cls, folder: Path, facts: dict[str, Any]) -> Any:
        """Return the denoiser of a folder."""
        with torch.device("meta"):
            unet = cls.from_config(cls.load_config(folder / "unet"))
        for module in unet.modules():
            module._parameters.clear()
            module._buffers.clear()
        unet.facts = facts
        unet.run = torch._inductor.aoti_load_package(str(folder / "unet" / PACKAGE))
        return unet.eval()

    @property
    def dtype(self) -> torch.dtype:
        """Number format of the weights."""
        return DTYPES[self.facts["precision"]]

    @property
    def device(self) -> torch.device:
        """Device of the package."""
        return torch.device(self.facts["device"])

    def forward(  # the parameters are those of diffusers
        self, sample: Any, timestep: Any, encoder_hidden_states: Any, return_dict: bool = True, **others: Any
    ) -> Any:
        """Return the prediction, as the original UNet."""
        added = others.pop("added_cond_kwargs", None) or {}
        if used := [name for name, value in others.items() if value is not None]:
            raise ValueError(f"the compiled denoiser has no {', '.join(used)}; use the output of format diffusers")
        size = [self.facts["height"], self.facts["width"]]
        scale = self.facts["pixelsPerLatent"]
        if [side * scale for side in sample.shape[2:]] != size:
            raise ValueError(f"the denoiser is compiled for pictures of {size[1]} x {size[0]}; draw them in this size")
        if len(sample) > self.facts["maxBatch"]:
            raise ValueError(
                f"the denoiser is compiled for {self.facts['maxBatch']} inputs at most; draw fewer pictures"
            )
        times = torch.as_tensor(timestep, device=sample.device).reshape(-1).expand(len(sample)).contiguous()
        states = [sample, encoder_hidden_states, *(added[name] for name in self.facts["conditions"])]
        first, *rest = (value.to(self.dtype).contiguous() for value in states)
        result = self.run(first, times.to(torch.float32), *rest)
        return UNet2DConditionOutput(sample=result) if return_dict else (result,)


def check(facts: dict[str, Any]) -> None:
    """Refuse a package that this machine cannot run."""
    here = describe_machine(facts["device"])
    if here != facts["machine"]:
        raise RuntimeError(
            f"the denoiser is compiled for {facts['machine']}, and this machine has {here}; use such a machine, or "
            "compile it here: finetune export JOB --format compiled"
        )


def describe_machine(device: str) -> str:
    """Return what must be equal on the machine that compiles and on the one that runs."""
    release = torch.__version__.partition("+")[0]
    if device == "cuda":
        if not torch.cuda.is_available():
            return "no GPU"
        major, minor = torch.cuda.get_device_capability()
        return f"a GPU of compute capability {major}.{minor} and torch {release}"
    return f"a CPU with {torch.backends.cpu.get_cpu_capability()} and torch {release}"


def load(folder: str | Path) -> Any:
    """Return the pipeline in a folder. Pictures have the size in compiled.json unless the call names another one."""
    path = Path(folder)
    facts = json.loads((path / FACTS).read_text(encoding="utf-8"))
    check(facts)
    index = json.loads((path / "model_index.json").read_text(encoding="utf-8"))
    options = {"safety_checker": None} if "safety_checker" in index else {}
    pipeline = DiffusionPipeline.from_pretrained(
        path, unet=CompiledUNet.load(path, facts), torch_dtype=DTYPES[facts["precision"]], **options
    )
    # Pipelines draw in the sample size of the denoiser by default.
    sizes = [facts[side] // facts["pixelsPerLatent"] for side in ("height", "width")]
    pipeline.unet.register_to_config(sample_size=sizes[0] if sizes[0] == sizes[1] else sizes)
    return pipeline.to(facts["device"])
