"""All parts of the simulation together, with the actions of users and of the infrastructure."""

from __future__ import annotations

from typing import Any

from finetune_contract.heartbeat import Heartbeat, Reply
from finetune_operator.api.job import FineTuneJob
from finetune_operator.api.status import FineTuneJobStatus
from finetune_operator.settings import Settings
from testing.simulated.engine import Engine
from testing.simulated.kubelet import Kubelets
from testing.simulated.model import SimulatedStorage, Watchdog, Workload
from testing.simulated.operator import ApiConditions, SimulatedOperator
from testing.simulated.server import SimulatedApiServer
from testing.simulated.supervisor import SimulatedSupervisor, Trainers

SIMULATED = Settings(
    coordinator_url="https://coordinator:8443", require_storage=False, kueue=True, gangs=True, resize_pods=True
)
"""The administrator's settings."""


class SimulatedCluster:
    """A cluster, its jobs, and an operator that may be stopped at the moment."""

    def __init__(
        self,
        seed: int | str,
        watchdog: Watchdog,
        num_nodes: int,
        settings: Settings = SIMULATED,
        num_on_demand: int = 0,
    ) -> None:
        self.engine = Engine(seed)
        self.settings = settings
        self.watchdog = watchdog
        self.server = SimulatedApiServer(self.engine, watchdog)
        self.trainers = Trainers(self.engine, self.server.storage, watchdog, self._post)
        self.kubelets = Kubelets(self.engine, self.server, self.trainers.start)
        self.trainers.kubelets = self.kubelets
        self.api = ApiConditions()
        self.operator: SimulatedOperator | None = None
        self.num_nodes = num_nodes
        """Intended number of spot nodes."""
        self.num_on_demand = num_on_demand
        """Intended number of other nodes."""
        self.num_reconciles = 0
        """Number of reconciles of earlier operator processes."""
        self.failures_injected: dict[str, int] = {}
        """Number of injected failures of the program or the network, by job."""
        self.partition_until = 0.0
        """Time until which a share of the heartbeats does not reach the operator."""
        self.partition_share = 0.0
        self.normal_num_nodes = num_nodes
        self._num_created = 0
        self.add_missing_nodes()
        self._start_operator()

    # -- jobs ---------------------------------------------------------------------------------------------------------

    def make_job(self, name: str, workload: Workload, **spec: Any) -> None:
        """Create a job with empty storage."""
        self._num_created += 1
        manifest = {
            "metadata": {"name": name, "uid": f"uid-{name}"},
            "spec": {
                "model": {"base": "base"},
                "dataset": {"source": "data"},
                "training": {"method": "LoRA", "steps": workload.total_steps},
                "topology": {"accelerator": "cpu", "nodes": 2},
            }
            | spec,
        }
        self.server.storage[name] = SimulatedStorage(workload)
        self.failures_injected[name] = 0
        self.server.put_job(FineTuneJob.model_validate(manifest))

    def replace_job(self, name: str) -> None:
        """Delete a job, and create another one with the same spec under a new name."""
        job = self.server.jobs[name]
        workload = self.server.storage[name].workload
        self.server.delete_job(name)
        new_name = f"{name.partition('x')[0]}x{self._num_created}"
        spec = job.spec.model_copy(update={"suspend": False})
        self.make_job(new_name, workload, **spec.model_dump(by_alias=True, exclude_none=True))

    def set_suspend(self, name: str, value: bool) -> None:
        """Suspend or resume a job."""
        job = self.server.jobs.get(name)
        if job is not None and job.spec.suspend != value:
            meta = job.metadata.model_copy(update={"generation": job.metadata.generation + 1})
            spec = job.spec.model_copy(update={"suspend": value})
            self.server.put_job(job.model_copy(update={"spec": spec, "metadata": meta}))

    def edit_template(self, name: str) -> None:
        """Change the podTemplate of a job."""
        job = self.server.jobs[name]
        meta = job.metadata.model_copy(update={"generation": job.metadata.generation + 1})
        template = {"metadata": {"annotations": {"edit": str(meta.generation)}}}
        spec = job.spec.model_copy(update={"pod_template": template})
        self.server.put_job(job.model_copy(update={"spec": spec, "metadata": meta}))

    def random_supervisor(self) -> SimulatedSupervisor | None:
        """Return a random running supervisor; None if there is none."""
        running = list(self.trainers.supervisors.values())
        return self.engine.rng.choice(running) if running else None

    def count_failure(self, job: str) -> None:
        """Count a failure that is about to be injected."""
        self.failures_injected[job] = self.failures_injected.get(job, 0) + 1

    # -- nodes --------------------------------------------------------------------------------------------------------

    def add_missing_nodes(self) -> None:
        """Add nodes until the intended number of each kind exists."""
        for spot, wanted in ((True, self.num_nodes), (False, self.num_on_demand)):
            num_up = sum(node.up and node.spot is spot for node in self.server.nodes.values())
            for _ in range(wanted - num_up):
                self.kubelets.add_node(spot=spot, skew_seconds=self.engine.rng.gauss(0, 5))

    def replace_node_later(self) -> None:
        """Replace a lost node after a random delay."""
        self.engine.after(self.engine.rng.choice([30.0, 120.0, 1200.0]), self.add_missing_nodes)

    # -- the operator -------------------------------------------------------------------------------------------------

    def restart_operator(self, seconds: float) -> None:
        """Stop the operator; start another process after this delay."""
        if self.operator is not None:
            self.num_reconciles += self.operator.num_reconciles
            self.operator.close()
            self.operator = None
            self.engine.after(seconds, self._start_operator)

    def _start_operator(self) -> None:
        # The new process reads statuses that went through JSON: only what JSON can represent survives.
        for name, job in self.server.jobs.items():
            text = job.status.model_dump_json(by_alias=True, exclude_none=True)
            status = FineTuneJobStatus.model_validate_json(text)
            self.server.jobs[name] = job.model_copy(update={"status": status})
        skew = self.engine.rng.uniform(-2, 2)
        self.operator = SimulatedOperator(self.engine, self.server, self.settings, self.api, skew)

    def restore_api(self) -> None:
        """Let calls to the API server succeed."""
        self.api.seconds, self.api.failing, self.api.lost = 0.02, 0.0, 0.0

    def _post(self, supervisor: SimulatedSupervisor, beat: Heartbeat) -> Reply | None:
        """Deliver a heartbeat to the operator and return its reply; None if either is lost."""
        node = supervisor.pod.node
        if self.operator is None or node is None or not node.connected:
            return None
        partitioned = self.engine.time < self.partition_until
        if partitioned and self.engine.chance(self.partition_share):
            return None
        reply = self.operator.post(beat)
        return None if partitioned and self.engine.chance(0.1) else reply

    def stop_faults(self) -> None:
        """Stop all faults and repair everything that is broken. The remaining steps are short."""
        self.restore_api()
        self.server.quota = None
        self.server.queue.set_quota(None)
        self.partition_until = 0.0
        if self.operator is not None:
            self.operator.watch.lag_seconds = 0.1
        for name in list(self.server.jobs):
            self.set_suspend(name, False)
        for storage in self.server.storage.values():
            storage.workload = storage.workload.faster()
        for node in list(self.server.nodes.values()):
            node.refuses = False
            if not node.up:
                self.kubelets.remove_node(node)
        self.num_nodes = max(self.num_nodes, self.normal_num_nodes) + 10
        self.add_missing_nodes()
