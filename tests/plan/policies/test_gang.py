"""All pods of an attempt or none: what is created, and when the gang counts as complete."""

from __future__ import annotations

import pytest

from finetune_operator.plan.model.types import Create
from tests.plan.harness import World, make_job


def names(world: World) -> list[str]:
    return [a.manifest["metadata"]["name"] for a in world.decide().actions if isinstance(a, Create)]


@pytest.mark.parametrize(
    ("topology", "num_pods"),
    [
        ({"accelerator": "cpu"}, 1),
        ({"accelerator": "cpu", "nodes": 3}, 3),
        ({"accelerator": "gpu", "nodes": 2, "processesPerNode": 8}, 2),
        ({"accelerator": "cpu", "minNodes": 4, "maxNodes": 4}, 4),
    ],
)
def test_one_pod_for_each_node(topology: dict[str, object], num_pods: int) -> None:
    world = World(make_job(topology=topology))
    world.settle()
    assert sorted(world.pods) == sorted(f"circles-a1-n{rank}" for rank in range(num_pods))
    assert world.job.status.attempts[-1].gang_complete


def test_the_gang_is_complete_only_once_all_pods_were_there() -> None:
    world = World().created()
    world.hidden = {world.pod(0).uid}
    assert not world.decide().status.attempts[-1].gang_complete
    world.hidden = set()
    assert world.decide().status.attempts[-1].gang_complete


def test_a_complete_gang_gets_no_new_pod() -> None:
    world = World().running()
    world.vanish("circles-a1-n1")
    assert names(world) == []


@pytest.mark.parametrize("kind", ["services", "configs"])
def test_service_and_run_specification_come_back_while_the_attempt_is_open(kind: str) -> None:
    world = World().running()
    getattr(world, kind).clear()
    assert names(world) == ["circles" if kind == "services" else "circles-run"]
