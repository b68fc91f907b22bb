"""Makes the passes of a run. Called by `build`, and by benches that measure the loop."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable

from finetune_contract.spec import TrainingSpec
from finetune_trainer.distributed.world import World
from finetune_trainer.train.passes.choice import GraphChoice, GraphFacts, choose_graphs
from finetune_trainer.train.passes.cuda import CudaGraphs
from finetune_trainer.train.passes.eager import EagerPasses, Passes, PassWork
from finetune_trainer.train.passes.graphed import GraphDevice, GraphedPasses

_LOG = logging.getLogger(__name__)


def make_passes(
    training: TrainingSpec,
    work: PassWork,
    world: World,
    note: Callable[[str], None],
    graphs: GraphDevice | None = None,
) -> Passes:
    """Return the passes of a rank: graphs where the manifest and the run allow them.

    Args:
        training: the settings, after the choice of a memory preset.
        work: the computation of a pass.
        world: the ranks.
        note: receives messages for the user.
        graphs: captures computations; default: the rank's GPU, if it has one.

    Raises:
        ConfigError: the manifest requires graphs, and the run cannot use them.
    """
    parameters = list(work.method.parameters().values())
    choice = choose_graphs(
        training,
        GraphFacts(
            is_gpu=graphs is not None or world.device.type == "cuda",
            num_ranks=world.size,
            num_nodes=-(-world.size // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))),
            exchange_bytes=4 * sum(parameter.numel() for parameter in parameters) if world.size > 1 else 0,
        ),
    )
    _tell(choice, world, note)
    if not choice.enabled:
        return EagerPasses(work, choice)
    return GraphedPasses(work, parameters, graphs or CudaGraphs(world.device), choice, note)


def _tell(choice: GraphChoice, world: World, note: Callable[[str], None]) -> None:
    """Report why passes are not replayed. On CPUs nobody expects it."""
    if not choice.reason or not world.is_first:
        return
    if world.device.type == "cuda":
        note(choice.reason)
    else:
        _LOG.debug("%s", choice.reason)
