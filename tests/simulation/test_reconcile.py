"""One pass against the simulated API server: what is carried out when some of it is refused."""

from __future__ import annotations

from finetune_operator.cluster.reconcile import act
from finetune_operator.plan.model.types import Create, DeletePod
from testing.simulated.engine import Task
from testing.simulated.model import Workload
from testing.simulated.server import ApiError
from testing.simulated.world import World
from tests.simulation.invariants import Invariants


def test_a_pod_that_a_quota_refuses_keeps_no_other_from_being_deleted() -> None:
    watchdog = Invariants()
    watchdog.world = world = World("seed", watchdog, num_nodes=2)
    world.make_job("j", Workload())
    world.engine.run(60)
    operator, job = world.operator, world.server.jobs["j"]
    assert operator is not None
    world.server.jobs["j"] = job.model_copy(
        update={"status": job.status.model_copy(update={"attempts": (), "attempt": 1})}
    )
    pod = world.server.pods["j-a1-n0"]
    metadata = {"name": "j-a2-n0", "labels": {}}
    refused = Create({"kind": "Pod", "metadata": metadata, "spec": {"containers": [{"env": []}]}})
    world.server.quota = 0
    ends: list[Exception | None] = []
    actions = (refused, DeletePod(pod.seen.name, pod.seen.uid, 0))
    task = Task(world.engine, act(operator, job, actions), lambda error, _: ends.append(error), ApiError)
    task.step()
    world.engine.run(world.engine.time + 5)
    assert [type(error) for error in ends] == [ApiError]
    assert pod.seen.name not in world.server.pods
