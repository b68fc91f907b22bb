"""The outputs of a FineTuneJob: formats, their settings, and where they go. The trainer reads them, too."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

from pydantic import Field

from finetune_contract.spec_model import Location, SpecModel


class OutputFormat(StrEnum):
    """File formats of trained weights."""

    DIFFUSERS = "diffusers"
    """Folders and files of diffusers."""
    SINGLE_FILE = "single-file"
    """One file by the names of Stable Diffusion's original code."""
    WEBUI = "webui"
    """What the web UIs load: kohya for a LoRA, single-file for everything else."""
    KOHYA = "kohya"
    """A LoRA by the names of kohya's scripts."""
    COMFYUI = "comfyui"
    """What ComfyUI loads: kohya for a LoRA, single-file for everything else."""
    MERGED = "merged"
    """A LoRA that is added to its base."""
    OPENVINO = "openvino"
    """A pipeline for OpenVINO."""
    COMPILED = "compiled"
    """A pipeline whose denoiser is machine code."""
    AS_WRITTEN = "asWritten"
    """The files that a script has written to its output folder."""


class OutputPrecision(StrEnum):
    """Number formats of written weights."""

    FP32 = "fp32"
    BF16 = "bf16"
    FP16 = "fp16"


class WeightQuantization(StrEnum):
    """Formats of quantized weights."""

    INT8 = "int8"
    """Integers of 8 bits with a scale and a zero point for each output channel."""


class OutputLayout(StrEnum):
    """Layouts of a complete model."""

    DIFFUSERS = "diffusers"
    SINGLE_FILE = "single-file"


class FileContainer(StrEnum):
    """Containers of a single file."""

    SAFETENSORS = "safetensors"
    CKPT = "ckpt"


class MergedAdapter(SpecModel):
    """A further LoRA of a merge."""

    source: Location = Field(description="LoRA file, or folder or hub id that contains one")
    weight: float = Field(default=1.0, ge=-10, le=10, description="Factor of what it adds to the base")


class OutputSecret(SpecModel):
    """A Secret in the job's namespace with the credentials of one target."""

    name: Annotated[str, Field(min_length=1, max_length=253)] = Field(description="Name of the Secret")


class OutputSpec(SpecModel):
    """A file or folder to write after the last step."""

    format: OutputFormat = Field(
        description="File format; webui and comfyui are what these programs load (kohya for a LoRA, single-file for "
        "all other methods); openvino is a complete model for OpenVINO; compiled is one whose denoiser is machine code "
        "for the GPU or CPU that writes it; asWritten copies what a script has written"
    )
    precision: OutputPrecision | None = Field(
        default=None,
        description="Number format of the weights; default: fp32 for trained weights and all of openvino and compiled, "
        "and that of the base for its other parts",
    )
    quantization: WeightQuantization | None = Field(
        default=None,
        description="With format openvino, quantize the weights: int8 needs half the space of fp16",
    )
    ema: bool | None = Field(
        default=None,
        description="Write the moving average of the weights (true) or the weights of the last step (false); default: "
        "the average if training.ema keeps one",
    )
    full: bool = Field(
        default=False, description="With format diffusers, write a complete pipeline: the base with what was trained"
    )
    layout: OutputLayout | None = Field(
        default=None, description="Layout of a merged model: diffusers (default) or single-file"
    )
    container: FileContainer | None = Field(
        default=None,
        description="Container of a single file: safetensors (default), or ckpt for programs that read nothing else",
    )
    strength: float = Field(
        default=1.0,
        ge=-10,
        le=10,
        description="With format merged, or openvino or compiled of a LoRA, factor of what the LoRA adds to the base",
    )
    adapters: tuple[MergedAdapter, ...] = Field(
        default=(),
        max_length=8,
        description="With format merged, or openvino or compiled of a LoRA, further LoRAs for the same kind of base to "
        "add",
    )
    rank: int | None = Field(
        default=None,
        ge=1,
        le=1024,
        description="Rank of the written LoRA, at most lora.rank: the closest matrices of this rank (by SVD)",
    )
    trigger_phrase: Annotated[str, Field(min_length=1, max_length=200)] | None = Field(
        default=None,
        description="Words that prompts need, in the metadata of the file; default: dreambooth.instancePrompt or "
        "textualInversion.placeholderToken",
    )
    to: Location = Field(
        description="Folder to write to. A relative path is in the job's own folder on its storage or in its bucket; "
        "an absolute path must be on a volume of the pods. In a local run it is a folder of the machine, relative to "
        "the manifest. s3://, gs:// and az:// URLs name a folder of an object store, hub://owner/name a model "
        "repository of the hub, which is created private"
    )
    secret: OutputSecret | None = Field(
        default=None,
        description="Secret with the credentials of this target: HF_TOKEN for the hub, the variables of the store's "
        "own tools for object stores. Only the pod that writes the outputs can read it; default: the variables of "
        "spec.secrets, or the workload identity of the pods",
    )
