"""Decides which passes are replayed as CUDA graphs. Pure: `build` collects the facts, and `graphed` applies the choice.

A replayed pass costs the host one launch instead of thousands, so that the GPU is never idle. A pass cannot be captured
if other ranks take part in it, or if it reads random state that is saved and restored.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from finetune_contract.spec import Offload, Sharding, SwitchMode, TrainingSpec
from finetune_trainer.errors import ConfigError

WARM_UP_PASSES = 2
"""Passes of each shape before its capture: libraries choose kernels and allocate workspaces in them."""
MAX_GRAPHS = 32
"""Most graphs of a run: each one takes memory of the driver. Further shapes are computed without a graph."""
SMALL_EXCHANGE_BYTES = 256 * 2**20
"""Up to this size the exchange of gradients is shorter than the launches of a pass without a graph."""
_OFF = "cudaGraphs is off because"


@dataclass(frozen=True)
class GraphFacts:
    """What the choice depends on besides the manifest.

    Attributes:
        is_gpu: whether the ranks compute on GPUs.
        num_ranks: number of ranks.
        num_nodes: number of machines.
        exchange_bytes: size of the gradients that the ranks exchange in a step.
    """

    is_gpu: bool
    num_ranks: int = 1
    num_nodes: int = 1
    exchange_bytes: int = 0


@dataclass(frozen=True)
class GraphChoice:
    """Whether passes are replayed as CUDA graphs, and why not.

    Attributes:
        enabled: whether they are.
        reason: why they are not, or which passes are not: one sentence, empty if all are.
        requested: the manifest's setting.
        is_last_eager: whether the last pass of a step runs without a graph, so that the ranks exchange gradients while
            it computes.
    """

    enabled: bool
    reason: str = ""
    requested: SwitchMode = SwitchMode.AUTO
    is_last_eager: bool = False

    def turned_off(self, cause: str) -> GraphChoice:
        """Return the choice after a failure: no graphs, with the cause as the reason."""
        return GraphChoice(False, f"{_OFF} {cause}", self.requested)


def choose_graphs(training: TrainingSpec, facts: GraphFacts) -> GraphChoice:
    """Return whether the passes of a run are replayed.

    Raises:
        ConfigError: the manifest requires graphs, and the run cannot use them.
    """
    requested = training.cuda_graphs
    if requested is SwitchMode.OFF:
        return GraphChoice(False, f"{_OFF} the manifest says so", requested)
    obstacle = find_obstacle(training, facts)
    if obstacle is not None:
        cause, remedy = obstacle
        if requested is SwitchMode.ON:
            raise ConfigError(f"training.cudaGraphs: on is not possible because {cause}; write auto, or {remedy}")
        return GraphChoice(False, f"{_OFF} {cause}", requested)
    # Within a machine, GPUs exchange gradients in less time than the host needs to launch a pass.
    overlaps = facts.num_ranks > 1 and facts.num_nodes > 1 and facts.exchange_bytes > SMALL_EXCHANGE_BYTES
    if not overlaps:
        return GraphChoice(True, "", requested)
    reason = (
        "the last pass of a step runs without a CUDA graph, so that the ranks exchange "
        f"{facts.exchange_bytes / 2**30:.1f} GiB of gradients while it computes"
    )
    if training.gradient_accumulation == 1:
        reason += "; with gradientAccumulation 1 it is the only one"
    return GraphChoice(True, reason, requested, is_last_eager=True)


def find_obstacle(training: TrainingSpec, facts: GraphFacts) -> tuple[str, str] | None:
    """Return why the passes of a run cannot be captured, and what to change; None if they can."""
    if not facts.is_gpu:
        return "the ranks compute on CPUs", "request GPUs with topology.accelerator: gpu"
    if training.offload is not Offload.NONE:
        return "offload copies weights from host memory in each pass", "leave offload out"
    if training.sharding is not Sharding.NONE:
        return "sharding gathers weights from other ranks in each pass", "leave sharding out"
    lora = training.lora
    has_dropout = lora is not None and lora.dropout > 0
    if has_dropout and training.gradient_checkpointing and training.compile is SwitchMode.ON:
        return (
            "gradientCheckpointing repeats the dropout of compiled adapters with saved random state",
            "leave compile, lora.dropout or gradientCheckpointing out",
        )
    return None


class Turn(Enum):
    """What to do with the next pass of a shape."""

    EAGER = "eager"
    """Compute it where the others are computed. It prepares the capture, or there are too many shapes."""
    CAPTURE = "capture"
    REPLAY = "replay"


class GraphSchedule:
    """Decides for each pass, by its shape, whether to compute, capture or replay it."""

    def __init__(self, warm_up: int = WARM_UP_PASSES, most: int = MAX_GRAPHS) -> None:
        self._warm_up, self._most = warm_up, most
        self._seen: dict[object, int] = {}
        self._captured: set[object] = set()

    @property
    def is_full(self) -> bool:
        """Return whether no further shape can be captured."""
        return len(self._captured) >= self._most

    def next_turn(self, shape: object) -> Turn:
        """Return what to do with the next pass of a shape, and count it."""
        if shape in self._captured:
            return Turn.REPLAY
        seen = self._seen.get(shape, 0)
        self._seen[shape] = seen + 1
        if seen < self._warm_up or self.is_full:
            return Turn.EAGER
        self._captured.add(shape)
        return Turn.CAPTURE

    def drop(self) -> None:
        """Forget all captures, because what they refer to has moved. Nothing needs to be prepared again."""
        self._captured.clear()


def must_make_room(free_bytes: int, held_bytes: int) -> bool:
    """Return whether memory of graphs must be freed before models run without them, e.g. for a validation.

    Args:
        free_bytes: memory that models can use.
        held_bytes: memory that only replayed passes can use. A forward pass of the same batch needs less.
    """
    return held_bytes > 0 and free_bytes < max(held_bytes, _ROOM_BYTES)


_ROOM_BYTES = 8 * 2**30
"""Memory in which a VAE decodes an image."""
