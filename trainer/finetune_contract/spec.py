"""The parts of a FineTuneJob that the trainer reads, too: training, checkpoints, outputs; see also `input_spec`.

They are defined here, not in the operator, so that both sides share one definition. The operator's `api` composes them
into the FineTuneJob and generates the CRD from it. Names are those of the diffusers flags in camelCase.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

from pydantic import BeforeValidator, Field, WithJsonSchema

from finetune_contract.script_spec import ScriptSpec
from finetune_contract.spec_model import Location, Prompt, SpecModel, Word
from finetune_contract.validation_spec import MAX_SEED, MAX_STEPS, TimestepBiasSpec, ValidationSpec


class Method(StrEnum):
    """Fine-tuning methods; `finetune_contract.methods` holds their traits."""

    LORA = "LoRA"
    DREAMBOOTH = "DreamBooth"
    DREAMBOOTH_LORA = "DreamBoothLoRA"
    TEXTUAL_INVERSION = "TextualInversion"
    FULL = "Full"
    CONTROLNET = "ControlNet"


class LrScheduler(StrEnum):
    """Learning-rate schedules, with diffusers' names."""

    CONSTANT = "constant"
    CONSTANT_WITH_WARMUP = "constant_with_warmup"
    LINEAR = "linear"
    COSINE = "cosine"
    COSINE_WITH_RESTARTS = "cosine_with_restarts"
    POLYNOMIAL = "polynomial"


class Precision(StrEnum):
    """Number format of the frozen weights and of the forward pass; trained weights are kept in fp32."""

    FP32 = "fp32"
    FP16 = "fp16"
    BF16 = "bf16"


class WeightPrecision(StrEnum):
    """Number format in which trained weights are stored."""

    FP32 = "fp32"
    """The forward pass uses a copy of them in its own number format."""
    BF16 = "bf16"
    """No fp32 weights: updates are rounded stochastically, so that small ones are kept on average."""


class ExchangePrecision(StrEnum):
    """Number format of the gradients that the ranks send to each other."""

    FP32 = "fp32"
    BF16 = "bf16"
    """Half of the bytes. Every rank rounds its gradients to 8 significant bits before they are added."""


class Optimizer(StrEnum):
    """Optimizers."""

    ADAMW = "adamw"
    ADAMW_8BIT = "adamw8bit"
    ADAFACTOR = "adafactor"
    PRODIGY = "prodigy"


class Sharding(StrEnum):
    """Part of the trained weights that each rank holds."""

    NONE = "none"
    """All of them: gradients are summed, and any surviving rank can continue."""
    FULL = "full"
    """A slice of the weights, gradients and optimizer state (torch's FSDP2): for models that do not fit one GPU."""


class Offload(StrEnum):
    """Memory that holds the slices of sharded training."""

    NONE = "none"
    """The memory of the device that computes."""
    CPU = "cpu"
    """The host's memory; the optimizer runs there, too (FSDP2's CPU offload)."""


class LongCaptions(StrEnum):
    """What becomes of captions that are longer than the text encoder's input of 75 tokens."""

    TRUNCATE = "truncate"
    """Their end is cut."""
    CHUNK = "chunk"
    """They are read in three chunks of 75 tokens, as kohya's scripts do with max_token_length 225."""


class LearnableProperty(StrEnum):
    """Meaning of a new token."""

    OBJECT = "object"
    STYLE = "style"


class Attention(StrEnum):
    """Attention kernels."""

    AUTO = "auto"
    FLASH = "flash"
    CUDNN = "cudnn"
    EFFICIENT = "efficient"
    MATH = "math"


class SwitchMode(StrEnum):
    """Whether an optimization is used."""

    AUTO = "auto"
    """Where it helps."""
    ON = "on"
    """Always; the run fails where it is not possible."""
    OFF = "off"


def _read_switch(value: object) -> object:
    """Return the text of a boolean: YAML 1.1 reads on and off as booleans."""
    if isinstance(value, bool):
        return SwitchMode.ON if value else SwitchMode.OFF
    return value


Switch = Annotated[
    SwitchMode,
    BeforeValidator(_read_switch),
    # A boolean or a string. Structural schemas can express this only without a type.
    WithJsonSchema({"enum": ["auto", "on", "off", True, False], "x-kubernetes-preserve-unknown-fields": True}),
]
"""auto, on or off; true and false mean on and off."""


class TrackerName(StrEnum):
    """Services that show losses and images."""

    TENSORBOARD = "tensorboard"
    WANDB = "wandb"
    MLFLOW = "mlflow"


class LoraSpec(SpecModel):
    """Low-rank adapters (https://arxiv.org/abs/2106.09685)."""

    rank: int = Field(default=4, ge=1, le=1024, description="Rank of the update matrices")
    alpha: float | None = Field(
        default=None, gt=0, description="Numerator of the update's scale alpha / rank; default: the rank"
    )
    dropout: float = Field(default=0.0, ge=0, lt=1, description="Dropout on the input of the adapters")
    target_modules: tuple[Word, ...] = Field(
        default=("to_k", "to_q", "to_v", "to_out.0"),
        min_length=1,
        max_length=64,
        description="Suffixes of the names of the UNet's modules to adapt",
    )
    use_dora: bool = Field(
        default=False, description="Use DoRA (https://arxiv.org/abs/2402.09353), which also trains magnitudes"
    )
    train_text_encoder: bool = Field(default=False, description="Also adapt the text encoders")
    base: Location | None = Field(
        default=None,
        description="LoRA to start from, with the names of diffusers or kohya: .safetensors file, folder, hub id or "
        "s3:// URL",
    )


class DreamBoothSpec(SpecModel):
    """DreamBooth (https://arxiv.org/abs/2208.12242)."""

    instance_prompt: Prompt = Field(description="Prompt that names the subject, e.g. 'a photo of sks dog'")
    class_prompt: Prompt | None = Field(
        default=None, description="Prompt of the subject's class; enables prior preservation"
    )
    num_class_images: int = Field(
        default=100, ge=1, le=100_000, description="Number of class images for prior preservation"
    )
    class_images: Location | None = Field(
        default=None,
        description="Own class images: folder, file, hub id or s3:// URL, as dataset.source; default: none. The base "
        "generates those that are missing up to numClassImages",
    )
    prior_loss_weight: float = Field(default=1.0, ge=0, description="Weight of the prior preservation loss")
    train_text_encoder: bool = Field(default=False, description="Also train the text encoders")


class TextualInversionSpec(SpecModel):
    """Textual inversion (https://arxiv.org/abs/2208.01618)."""

    placeholder_token: Word = Field(description="New token, e.g. <cat-toy>")
    initializer_token: Word | None = Field(
        default=None, description="Word whose embedding initializes the new token; required without base"
    )
    base: Location | None = Field(
        default=None,
        description="Embedding to start from, as diffusers or the web UIs write it: file, folder, hub id or s3:// URL",
    )
    num_vectors: int = Field(default=1, ge=1, le=64, description="Number of vectors to train for the token")
    learnable_property: LearnableProperty = Field(
        default=LearnableProperty.OBJECT,
        description="Kind of prompts that replace captions without the token: object or style",
    )


class ControlNetSpec(SpecModel):
    """ControlNet (https://arxiv.org/abs/2302.05543)."""

    base: Location | None = Field(
        default=None, description="ControlNet to start from; default: a copy of the UNet's encoder"
    )
    conditioning_dropout: float = Field(
        default=0.0, ge=0, le=1, description="Share of samples that are trained without their conditioning image"
    )


class TrainingSpec(SpecModel):
    """Method, length and hyperparameters of the training."""

    method: Method | None = Field(default=None, description="Fine-tuning method; required")
    script: ScriptSpec | None = Field(
        default=None,
        description="Unmodified training script in place of a method; its command line replaces the other "
        "fields of training",
    )
    steps: int | None = Field(
        default=None, ge=1, le=MAX_STEPS, description="Number of optimizer steps to train; alternatively write epochs"
    )
    epochs: int | None = Field(
        default=None, ge=1, le=1_000_000, description="Number of passes over the data set; alternatively write steps"
    )
    batch_size: int = Field(default=1, ge=1, le=4096, description="Samples in one forward pass of one rank")
    gradient_accumulation: int = Field(
        default=1, ge=1, le=4096, description="Forward passes of one rank in one optimizer step"
    )
    learning_rate: float | None = Field(
        default=None,
        gt=0,
        le=10,
        description="Peak learning rate; default: 1.0e-4, for DreamBooth and ControlNet 5.0e-6, and with optimizer "
        "prodigy, where it is a factor, 1",
    )
    lr_scheduler: LrScheduler = Field(default=LrScheduler.CONSTANT, description="Learning-rate schedule")
    lr_warmup_steps: int = Field(
        default=0, ge=0, le=MAX_STEPS, description="Number of steps in which the learning rate rises from zero"
    )
    lr_num_cycles: int | None = Field(
        default=None,
        ge=1,
        le=MAX_STEPS,
        description="Number of cycles of lrScheduler cosine_with_restarts; default: 1, which never restarts",
    )
    lr_power: float | None = Field(
        default=None, gt=0, le=100, description="Power of lrScheduler polynomial; default: 1, a straight line"
    )
    adam_beta1: float = Field(default=0.9, ge=0, lt=1, description="Beta 1 of AdamW")
    adam_beta2: float = Field(default=0.999, ge=0, lt=1, description="Beta 2 of AdamW")
    adam_weight_decay: float = Field(default=1e-2, ge=0, description="Weight decay of AdamW")
    adam_epsilon: float = Field(default=1e-8, gt=0, lt=1, description="Epsilon of AdamW")
    max_grad_norm: float = Field(
        default=1.0, ge=0, description="Global norm at which gradients are clipped; 0 disables clipping"
    )
    precision: Precision | None = Field(
        default=None,
        description="Number format of the forward and backward pass; default: on GPUs bf16, or fp16 on those without "
        "bf16; on CPUs fp32, or bf16 where it is measured to be faster",
    )
    weight_precision: WeightPrecision = Field(
        default=WeightPrecision.FP32,
        description="Number format in which trained weights are stored: fp32, or bf16 with stochastic rounding of "
        "their updates, which saves 4 bytes of memory per weight and learns slightly less precisely; needs precision "
        "bf16 and a method that trains whole modules (Full, DreamBooth, ControlNet)",
    )
    gradient_checkpointing: bool = Field(
        default=False, description="Recompute activations in the backward pass to save memory"
    )
    attention: Attention = Field(
        default=Attention.AUTO,
        description="Attention kernel; auto measures them on GPUs when the first attempt starts, and lets torch choose "
        "on CPUs",
    )
    cuda_graphs: Switch = Field(
        default=SwitchMode.AUTO,
        description="Capture forward and backward pass once per shape and replay them, so that the GPU does not wait "
        "for its host: auto (on GPUs, where possible), on or off",
    )
    compile: Switch = Field(
        default=SwitchMode.AUTO,
        description="Compile the transformer blocks: auto (on GPUs, if enough steps remain to save more time than it "
        "takes), on or off",
    )
    resolution: int = Field(
        default=512, ge=8, le=4096, multiple_of=8, description="Side of the square images, in pixels"
    )
    center_crop: bool | None = Field(
        default=None,
        description="Crop images at the centre instead of at a random position; default: true for ControlNet, false "
        "for other methods",
    )
    aspect_buckets: bool = Field(
        default=False,
        description="Crop each image, at its centre, to the nearest of several aspect ratios with the area of the "
        "square",
    )
    random_flip: bool = Field(default=False, description="Mirror half of the images horizontally")
    optimizer: Optimizer = Field(
        default=Optimizer.ADAMW, description="Optimizer; adamw8bit needs a GPU and bitsandbytes"
    )
    sharding: Sharding = Field(
        default=Sharding.NONE,
        description="Part of the trained weights, gradients and optimizer state that each rank holds: none (all of it) "
        "or full (a slice, with FSDP2, for models that do not fit one GPU)",
    )
    offload: Offload = Field(
        default=Offload.NONE,
        description="Memory for the slices of sharding full: none (the GPU) or cpu (the host, where the optimizer "
        "runs, "
        "too); also works on a single GPU",
    )
    exchange_precision: ExchangePrecision = Field(
        default=ExchangePrecision.FP32,
        description="Number format of the gradients on the network: fp32, or bf16, which halves the bytes of the "
        "exchange and rounds the gradients; the sums are kept in fp32",
    )
    snr_gamma: float | None = Field(
        default=None,
        gt=0,
        description="Gamma of Min-SNR loss weighting (https://arxiv.org/abs/2303.09556); the prior preservation loss "
        "is not weighted",
    )
    noise_offset: float | None = Field(
        default=None, gt=0, le=1, description="Scale of an additional noise that is constant over each channel"
    )
    input_perturbation: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="Scale of noise that is added to the input only (https://arxiv.org/abs/2301.11706)",
    )
    caption_dropout: float | None = Field(
        default=None, gt=0, le=1, description="Share of samples whose caption is replaced by the empty caption"
    )
    long_captions: LongCaptions = Field(
        default=LongCaptions.TRUNCATE,
        description="Captions of more than 75 tokens: truncate cuts their end, chunk reads up to 225 tokens in three "
        "parts, for all captions of the job",
    )
    clip_skip: int = Field(
        default=0,
        ge=0,
        le=31,
        description="Number of last layers of the text encoders to skip, as clip_skip of diffusers' pipelines; the web "
        "UIs count from 1, so that their clip skip 2 is 1 here",
    )
    text_encoder_learning_rate: float | None = Field(
        default=None,
        gt=0,
        le=10,
        description="Peak learning rate of trained text encoders; default: learningRate",
    )
    timestep_bias: TimestepBiasSpec | None = Field(default=None, description="Timesteps that are drawn more often")
    ema: bool = Field(default=False, description="Keep an exponential moving average of the trained weights")
    seed: int = Field(default=0, ge=0, le=MAX_SEED, description="Seed of all random draws")
    memory_preset: Word | None = Field(
        default=None,
        description="Choose precision, gradientCheckpointing, optimizer, sharding, offload and batchSize, if they are "
        "left out, for the available memory (auto, cpu) or for the given memory of a GPU (8GB, 12GB, ...)",
    )
    lora: LoraSpec | None = Field(default=None, description="Settings of the LoRA methods")
    dreambooth: DreamBoothSpec | None = Field(default=None, description="Settings of the DreamBooth methods")
    textual_inversion: TextualInversionSpec | None = Field(default=None, description="Settings of TextualInversion")
    controlnet: ControlNetSpec | None = Field(default=None, description="Settings of ControlNet")
    validation: ValidationSpec | None = Field(default=None, description="Validation images and held-out loss")
    trackers: tuple[TrackerName, ...] = Field(
        default=(),
        max_length=3,
        description="Services that receive losses and images, in addition to the job's folder",
    )


class CheckpointInterval(SpecModel):
    """Interval between checkpoints. Without steps and seconds it is chosen automatically."""

    steps: int | None = Field(default=None, ge=1, le=MAX_STEPS, description="Optimizer steps between checkpoints")
    seconds: int | None = Field(default=None, ge=1, le=604_800, description="Seconds between checkpoints")


class CheckpointSource(SpecModel):
    """A checkpoint of another job to start from: exactly one of job, path and url."""

    job: Annotated[str, Field(max_length=63)] | None = Field(
        default=None,
        description="Name of a job in the same namespace whose checkpoints are on the same storage; it may be deleted",
    )
    path: Location | None = Field(
        default=None, description="Folder of a job, of its checkpoints or of one checkpoint, as the pods see it"
    )
    url: Location | None = Field(
        default=None, description="The same in an object store, e.g. s3://models/checkpoints/default/circles-1f0c3a2b"
    )
