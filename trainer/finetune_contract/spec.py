"""The parts of a FineTuneJob that the trainer reads, too: model, data set, training, outputs.

They stand here, and not in the operator, so that both sides hold one definition. The operator's `api` composes them
into the FineTuneJob and generates the CRD from it. Names are those of the diffusers flags, camelCased.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel

MAX_STEPS = 100_000_000
"""Most optimizer steps of a job."""
MAX_SEED = 2**32 - 1
"""Largest seed: every generator in use takes 32 bits."""


class SpecModel(BaseModel):
    """Base of everything that a person writes: camelCase outside, unknown fields refused, immutable."""

    model_config = ConfigDict(
        alias_generator=to_camel, populate_by_name=True, frozen=True, extra="forbid", allow_inf_nan=False
    )


# Every text and list has a bound: the API server refuses rules (CEL) on fields whose cost it cannot bound.
Location = Annotated[str, Field(min_length=1, max_length=1024)]
"""A hub id, path or URL."""
Word = Annotated[str, Field(min_length=1, max_length=128)]
"""A name: of a column, a split, a branch, a token."""
Prompt = Annotated[str, Field(min_length=1, max_length=2000)]
"""What a picture is described by."""
Argument = Annotated[str, Field(max_length=4096)]
"""One word of a command line; may be empty."""


class Method(StrEnum):
    """What is trained."""

    LORA = "LoRA"
    DREAMBOOTH = "DreamBooth"
    DREAMBOOTH_LORA = "DreamBoothLoRA"
    TEXTUAL_INVERSION = "TextualInversion"
    FULL = "Full"
    CONTROLNET = "ControlNet"


SHARDED_METHODS = (Method.FULL, Method.DREAMBOOTH, Method.CONTROLNET)
"""Methods that train whole models, which can be cut into slices."""


class LrScheduler(StrEnum):
    """Learning-rate schedules, by diffusers' names."""

    CONSTANT = "constant"
    CONSTANT_WITH_WARMUP = "constant_with_warmup"
    LINEAR = "linear"
    COSINE = "cosine"
    COSINE_WITH_RESTARTS = "cosine_with_restarts"
    POLYNOMIAL = "polynomial"


class Precision(StrEnum):
    """Number format of the frozen weights and of the forward pass; what is trained is kept in fp32."""

    FP32 = "fp32"
    FP16 = "fp16"
    BF16 = "bf16"


class Optimizer(StrEnum):
    """Optimizers."""

    ADAMW = "adamw"
    ADAMW_8BIT = "adamw8bit"
    ADAFACTOR = "adafactor"
    PRODIGY = "prodigy"


class Sharding(StrEnum):
    """What of the trained weights each rank holds."""

    NONE = "none"
    """All of them: gradients are summed, and any survivor can go on."""
    FULL = "full"
    """A slice of weights, gradients and optimizer (torch's FSDP2): for what does not fit one GPU."""


class Offload(StrEnum):
    """Where the slices of sharded training are kept."""

    NONE = "none"
    """Where they are computed with."""
    CPU = "cpu"
    """In the host's memory, where the optimizer steps, too (FSDP2's CPU offload)."""


class BiasStrategy(StrEnum):
    """Which timesteps are drawn more often."""

    EARLIER = "earlier"
    LATER = "later"
    RANGE = "range"


class LearnableProperty(StrEnum):
    """What a new token stands for."""

    OBJECT = "object"
    STYLE = "style"


class OutputFormat(StrEnum):
    """File formats of what was trained."""

    DIFFUSERS = "diffusers"
    WEBUI = "webui"
    KOHYA = "kohya"
    OPENVINO = "openvino"
    MERGED = "merged"


class Attention(StrEnum):
    """How attention is computed."""

    AUTO = "auto"
    FLASH = "flash"
    EFFICIENT = "efficient"
    MATH = "math"


class TrackerName(StrEnum):
    """Where curves and pictures are shown."""

    TENSORBOARD = "tensorboard"
    WANDB = "wandb"
    MLFLOW = "mlflow"


class ModelSpec(SpecModel):
    """The model to begin with."""

    base: Location = Field(description="hub id, folder, single-file checkpoint or s3:// URL of the base model")
    revision: Word | None = Field(default=None, description="branch, tag or commit on the hub")
    variant: Word | None = Field(default=None, description="weight variant of the base, e.g. fp16")
    config: Location | None = Field(
        default=None,
        description="folder or hub id in diffusers' layout that a single-file base takes its configuration from; "
        "default: by the file, from the hub",
    )
    vae: Location | None = Field(default=None, description="another VAE in place of the base's own, hub id or folder")


class Columns(SpecModel):
    """Names of the data set's columns."""

    image: Word = Field(default="image", description="column that holds the image")
    caption: Word = Field(default="text", description="column that holds the caption")
    conditioning: Word | None = Field(default=None, description="column that holds ControlNet's conditioning image")


class DatasetSpec(SpecModel):
    """The images and captions to learn from."""

    source: Location = Field(description="hub id, folder with metadata.jsonl, .jsonl, .parquet, .tar or s3:// URL")
    split: Word = Field(default="train", description="split of the data set to train on")
    columns: Columns = Field(default=Columns(), description="names of the columns")
    max_samples: int | None = Field(default=None, ge=1, le=2**53, description="use only the first so many samples")
    streaming: bool = Field(
        default=False,
        description="read the samples one after the other, where they lie, and keep only what training needs of them: "
        "for what is too large to be copied first",
    )
    max_broken: int = Field(
        default=0, ge=0, le=2**53, description="go on without broken images where they are no more than this"
    )


class LoraSpec(SpecModel):
    """Low-rank adapters (https://arxiv.org/abs/2106.09685)."""

    rank: int = Field(default=4, ge=1, le=1024, description="rank of the update matrices")
    alpha: float | None = Field(
        default=None, gt=0, description="scale of the update is alpha / rank; default: the rank"
    )
    dropout: float = Field(default=0.0, ge=0, lt=1, description="dropout on the input of the adapters")
    target_modules: tuple[Word, ...] = Field(
        default=("to_k", "to_q", "to_v", "to_out.0"),
        min_length=1,
        max_length=64,
        description="suffixes of the UNet's modules to adapt",
    )
    use_dora: bool = Field(default=False, description="DoRA (https://arxiv.org/abs/2402.09353): learn magnitudes, too")
    train_text_encoder: bool = Field(default=False, description="adapt the text encoders besides the UNet")


class DreamBoothSpec(SpecModel):
    """DreamBooth (https://arxiv.org/abs/2208.12242)."""

    instance_prompt: Prompt = Field(description="prompt that names the subject, e.g. 'a photo of sks dog'")
    class_prompt: Prompt | None = Field(
        default=None, description="prompt of the subject's class, for prior preservation"
    )
    num_class_images: int = Field(default=100, ge=1, le=100_000, description="class images for prior preservation")
    prior_loss_weight: float = Field(default=1.0, ge=0, description="weight of the prior preservation loss")
    train_text_encoder: bool = Field(default=False, description="train the text encoders besides the UNet")


class TextualInversionSpec(SpecModel):
    """Textual inversion (https://arxiv.org/abs/2208.01618)."""

    placeholder_token: Word = Field(description="new token, e.g. <cat-toy>")
    initializer_token: Word = Field(description="word whose embedding the new token starts from")
    num_vectors: int = Field(default=1, ge=1, le=64, description="vectors learnt for the token")
    learnable_property: LearnableProperty = Field(
        default=LearnableProperty.OBJECT,
        description="object or style: the sentences that a caption without the token is replaced by",
    )


class ControlNetSpec(SpecModel):
    """ControlNet (https://arxiv.org/abs/2302.05543)."""

    base: Location | None = Field(
        default=None, description="ControlNet to begin with; default: a copy of the UNet's encoder"
    )
    conditioning_dropout: float = Field(default=0.0, ge=0, le=1, description="share of samples without the condition")


class TimestepBiasSpec(SpecModel):
    """Timesteps that are drawn more often than the others."""

    strategy: BiasStrategy = Field(description="earlier, later, or the range from begin to end")
    multiplier: float = Field(default=2.0, gt=0, le=1000, description="how much more often they are drawn")
    portion: float = Field(default=0.25, gt=0, le=1, description="share of the timesteps that earlier and later mean")
    begin: int = Field(default=0, ge=0, le=100_000, description="first timestep of the range")
    end: int = Field(default=1000, ge=1, le=100_000, description="timestep after the last of the range")


class ValidationSpec(SpecModel):
    """How to look at what is learnt."""

    prompts: tuple[Prompt, ...] = Field(
        default=(), max_length=64, description="prompts drawn into one grid, before and after"
    )
    split: Word | None = Field(default=None, description="held-out split; its loss with fixed noise is reported")
    steps: int | None = Field(
        default=None, ge=1, le=MAX_STEPS, description="steps between validations; default: at the start and the end"
    )
    num_inference_steps: int = Field(default=25, ge=1, le=1000, description="denoising steps for each picture")
    guidance_scale: float = Field(default=7.5, ge=0, le=100, description="classifier-free guidance")
    seed: int = Field(default=0, ge=0, le=MAX_SEED, description="seed of the pictures and of the held-out noise")


class ScriptSpec(SpecModel):
    """An unmodified training script in place of a method."""

    path: Location = Field(description="file of the script inside the image or a volume")
    args: tuple[Argument, ...] = Field(default=(), max_length=256, description="its command line arguments")


class TrainingSpec(SpecModel):
    """What is trained, for how long and how."""

    method: Method | None = Field(default=None, description="fine-tuning method; required unless script is given")
    script: ScriptSpec | None = Field(
        default=None, description="unmodified accelerate-style script, in place of method"
    )
    steps: int | None = Field(default=None, ge=1, le=MAX_STEPS, description="optimizer steps to train; or give epochs")
    epochs: int | None = Field(default=None, ge=1, le=1_000_000, description="passes over the data set; or give steps")
    batch_size: int = Field(default=1, ge=1, le=4096, description="samples in one forward pass of one rank")
    gradient_accumulation: int = Field(
        default=1, ge=1, le=4096, description="forward passes of one rank in one optimizer step"
    )
    learning_rate: float = Field(
        default=1e-4, gt=0, le=10, description="peak learning rate; with prodigy a factor, write 1"
    )
    lr_scheduler: LrScheduler = Field(default=LrScheduler.CONSTANT, description="learning-rate schedule")
    lr_warmup_steps: int = Field(
        default=0, ge=0, le=MAX_STEPS, description="steps in which the learning rate rises from zero"
    )
    adam_beta1: float = Field(default=0.9, ge=0, lt=1, description="AdamW's beta 1")
    adam_beta2: float = Field(default=0.999, ge=0, lt=1, description="AdamW's beta 2")
    adam_weight_decay: float = Field(default=1e-2, ge=0, description="AdamW's weight decay")
    adam_epsilon: float = Field(default=1e-8, gt=0, lt=1, description="AdamW's epsilon")
    max_grad_norm: float = Field(default=1.0, ge=0, description="gradient clipping by global norm; 0 switches it off")
    precision: Precision = Field(default=Precision.FP32, description="number format of forward and backward pass")
    gradient_checkpointing: bool = Field(default=False, description="recompute activations to save memory")
    attention: Attention = Field(
        default=Attention.AUTO,
        description="auto lets torch take the fastest kernel that fits, which needs little memory; or one is named",
    )
    compile: bool = Field(default=False, description="compile the transformer blocks: slower to start, faster to step")
    resolution: int = Field(
        default=512, ge=8, le=4096, multiple_of=8, description="side of the square images, in pixels"
    )
    center_crop: bool = Field(default=False, description="crop the centre; default: a random place")
    aspect_buckets: bool = Field(
        default=False,
        description="cut each image, at its centre, to the nearest of a few shapes of the area of the square",
    )
    random_flip: bool = Field(default=False, description="mirror half of the images")
    optimizer: Optimizer = Field(
        default=Optimizer.ADAMW, description="adamw, adamw8bit (GPUs, needs bitsandbytes), adafactor or prodigy"
    )
    sharding: Sharding = Field(
        default=Sharding.NONE,
        description="none: every rank holds all that is trained; full: each holds a slice of it, of its gradients and "
        "of its optimizer (FSDP2), for what does not fit one GPU",
    )
    offload: Offload = Field(
        default=Offload.NONE,
        description="cpu: with sharding full, the slices of weights, gradients and AdamW's moments lie in the host's "
        "memory, and the optimizer steps there; on one GPU, too, where the slice is the whole",
    )
    snr_gamma: float | None = Field(
        default=None, gt=0, description="Min-SNR loss weighting (https://arxiv.org/abs/2303.09556)"
    )
    noise_offset: float | None = Field(
        default=None, gt=0, le=1, description="noise that is the same all over a channel, added to the noise"
    )
    input_perturbation: float | None = Field(
        default=None, gt=0, le=1, description="noise added to the input only (https://arxiv.org/abs/2301.11706)"
    )
    caption_dropout: float | None = Field(
        default=None, gt=0, le=1, description="share of samples whose caption is replaced by the empty one"
    )
    timestep_bias: TimestepBiasSpec | None = Field(default=None, description="timesteps that are drawn more often")
    ema: bool = Field(default=False, description="keep an exponential moving average of what is trained")
    seed: int = Field(default=0, ge=0, le=MAX_SEED, description="seed of every draw")
    memory_preset: Word | None = Field(
        default=None,
        description="chooses precision, gradientCheckpointing, optimizer, sharding, offload and batchSize, where they "
        "are left out, for the memory that is there (auto, cpu) or that is named (8GB, 12GB, ...)",
    )
    lora: LoraSpec | None = Field(default=None, description="settings of the LoRA methods")
    dreambooth: DreamBoothSpec | None = Field(default=None, description="settings of the DreamBooth methods")
    textual_inversion: TextualInversionSpec | None = Field(default=None, description="settings of TextualInversion")
    controlnet: ControlNetSpec | None = Field(default=None, description="settings of ControlNet")
    validation: ValidationSpec | None = Field(default=None, description="pictures and held-out loss")
    trackers: tuple[TrackerName, ...] = Field(
        default=(),
        max_length=3,
        description="tensorboard, wandb, mlflow: where losses and pictures are shown besides the job's folder",
    )


class CheckpointInterval(SpecModel):
    """How often to save. Leave both out for `auto`."""

    steps: int | None = Field(default=None, ge=1, le=MAX_STEPS, description="optimizer steps between checkpoints")
    seconds: int | None = Field(default=None, ge=1, le=604_800, description="seconds between checkpoints")


class OutputSpec(SpecModel):
    """A file or folder to write when all steps are trained."""

    format: OutputFormat = Field(description="file format")
    to: Location = Field(description="folder, s3:// URL or hub id (hub://owner/name) to write to")
