"""What `finetune generate` draws: the command writes it, the trainer reads it."""

from __future__ import annotations

from enum import StrEnum

from pydantic import Field

from finetune_contract.input_spec import ModelSpec
from finetune_contract.outputs.spec import OutputPrecision
from finetune_contract.spec_model import SpecModel

MAX_PICTURES = 400
"""Most pictures of one grid."""


class DrawingDevice(StrEnum):
    """Devices that can draw."""

    AUTO = "auto"
    """The GPU if there is one."""
    CPU = "cpu"
    GPU = "gpu"


class DrawnCheckpoint(SpecModel):
    """A checkpoint to draw with.

    Attributes:
        run: file with the run specification.
        folder: folder of the checkpoint.
    """

    run: str
    folder: str


class GenerateRequest(SpecModel):
    """Pictures to draw with one model, and the grid to write."""

    model: str | None = Field(default=None, description="Folder, file or URL of the model")
    checkpoint: DrawnCheckpoint | None = Field(default=None, description="Instead of a model, a checkpoint of a job")
    name: str | None = Field(default=None, description="Name of the job, after which its files are named")
    base: ModelSpec | None = Field(default=None, description="Base; default: what the model says about itself")
    prompts: tuple[str, ...] = Field(min_length=1, description="Prompts, one per row and seed")
    negative_prompt: str | None = Field(default=None, description="What the pictures shall not show")
    seeds: tuple[int, ...] = Field(default=(0,), min_length=1, description="Seeds of the initial noise")
    grid: str = Field(description="Image file to write")
    condition: str | None = Field(default=None, description="Conditioning image of a ControlNet")
    compare_base: bool = Field(default=False, description="Add a column with the base")
    strengths: tuple[float, ...] = Field(default=(), description="Strengths of the LoRA or ControlNet, one per column")
    steps: int = Field(default=25, ge=1, le=1000, description="Denoising steps")
    guidance: float = Field(default=7.5, ge=0, le=100, description="Scale of the classifier-free guidance")
    width: int | None = Field(default=None, ge=8, description="Width in pixels")
    height: int | None = Field(default=None, ge=8, description="Height in pixels")
    device: DrawingDevice = Field(default=DrawingDevice.AUTO, description="Device")
    precision: OutputPrecision | None = Field(default=None, description="Number format; fp32 on CPUs, fp16 on GPUs")


class DrawnColumn(SpecModel):
    """A column of a grid.

    Attributes:
        label: its label.
        seconds: seconds of each picture, in the order of the rows.
    """

    label: str
    seconds: tuple[float, ...]

    @property
    def seconds_per_image(self) -> float:
        """Return the mean time of a picture. The first one, which also warms up, does not count if there are others."""
        counted = self.seconds[1:] or self.seconds
        return sum(counted) / len(counted)


class GenerateResult(SpecModel):
    """What was drawn.

    Attributes:
        grid: the image file.
        device: the device, in words.
        width: width of a picture in pixels.
        height: height of a picture in pixels.
        columns: the columns.
    """

    grid: str
    device: str
    width: int
    height: int
    columns: tuple[DrawnColumn, ...]
