"""One reconcile against the simulated API server, which refuses one of its actions."""

from __future__ import annotations

from finetune_operator.cluster.reconcile import apply_actions
from finetune_operator.plan.model.types import Create, DeletePod
from testing.simulated.cluster import SimulatedCluster
from testing.simulated.engine import SimulatedTask
from testing.simulated.model import Workload
from testing.simulated.server import RefusedError, SimulatedApiError
from tests.simulation.invariants import Invariants


def test_refused_creation_does_not_prevent_deletions() -> None:
    watchdog = Invariants()
    watchdog.cluster = cluster = SimulatedCluster("seed", watchdog, num_nodes=2)
    cluster.make_job("j", Workload())
    cluster.engine.run(60)
    operator, job = cluster.operator, cluster.server.jobs["j"]
    assert operator is not None
    cluster.server.jobs["j"] = job.model_copy(
        update={"status": job.status.model_copy(update={"attempts": (), "attempt": 1})}
    )
    pod = cluster.server.pods["j-a1-n0"]
    metadata = {"name": "j-a2-n0", "labels": {}}
    refused = Create({"kind": "Pod", "metadata": metadata, "spec": {"containers": [{"env": []}]}})
    cluster.server.quota = 0
    ends: list[Exception | None] = []
    actions = (refused, DeletePod(pod.observed.name, pod.observed.uid, 0))
    task = SimulatedTask(
        cluster.engine, apply_actions(operator, job, actions), lambda error, _: ends.append(error), SimulatedApiError
    )
    task.step()
    cluster.engine.run(cluster.engine.time + 5)
    assert [type(error) for error in ends] == [RefusedError]
    assert pod.observed.name not in cluster.server.pods
