"""All parts of the simulation together, and what a person or fate may do to them."""

from __future__ import annotations

from typing import Any

from finetune_contract.heartbeat import Heartbeat, Reply
from finetune_operator.api.job import FineTuneJob, FineTuneJobStatus
from finetune_operator.settings import Settings
from testing.simulated.engine import Engine
from testing.simulated.kubelet import Kubelets
from testing.simulated.model import Storage, Watchdog, Workload
from testing.simulated.operator import SimOperator, Weather
from testing.simulated.server import Server
from testing.simulated.trainers import Supervisor, Trainers

SIMULATED = Settings(coordinator_url="https://coordinator:8443", require_storage=False)
"""An administrator's settings."""


class World:
    """A cluster, its jobs, and an operator that may be dead at the moment."""

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
        self.server = Server(self.engine, watchdog)
        self.trainers = Trainers(self.engine, self.server.storage, watchdog, self._post)
        self.kubelets = Kubelets(self.engine, self.server, self.trainers.start)
        self.trainers.kubelets = self.kubelets
        self.weather = Weather()
        self.operator: SimOperator | None = None
        self.num_nodes = num_nodes
        """Spot nodes that there should be."""
        self.num_on_demand = num_on_demand
        """Other nodes that there should be."""
        self.num_passes = 0
        """Of operators that have died."""
        self.failures_caused: dict[str, int] = {}
        """Failures of the program or the fabric that were brought about, by job."""
        self.deaf_until = 0.0
        """Until then, a share of the beats does not reach the operator."""
        self.deaf_share = 0.0
        self.calm = False
        """Nothing more goes wrong."""
        self.normal_num_nodes = num_nodes
        self._num_made = 0
        self.fill_up()
        self._start_operator()

    # -- jobs ---------------------------------------------------------------------------------------------------------

    def make_job(self, name: str, workload: Workload, **spec: Any) -> None:
        """Apply a job; its storage is empty."""
        self._num_made += 1
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
        self.server.storage[name] = Storage(workload)
        self.failures_caused[name] = 0
        self.server.put_job(FineTuneJob.model_validate(manifest))

    def remake_job(self, name: str) -> None:
        """Delete a job; another one of the same spec comes under another name."""
        job = self.server.jobs[name]
        workload = self.server.storage[name].workload
        self.server.delete_job(name)
        again = f"{name.partition('x')[0]}x{self._num_made}"
        spec = job.spec.model_copy(update={"suspend": False})
        self.make_job(again, workload, **spec.model_dump(by_alias=True, exclude_none=True))

    def set_suspend(self, name: str, value: bool) -> None:
        """Suspend or resume a job."""
        job = self.server.jobs.get(name)
        if job is not None and job.spec.suspend != value:
            meta = job.metadata.model_copy(update={"generation": job.metadata.generation + 1})
            spec = job.spec.model_copy(update={"suspend": value})
            self.server.put_job(job.model_copy(update={"spec": spec, "metadata": meta}))

    def some_supervisor(self) -> Supervisor | None:
        """Any living supervisor."""
        living = list(self.trainers.supervisors.values())
        return self.engine.rng.choice(living) if living else None

    def count_failure(self, job: str) -> None:
        """A failure is about to be caused."""
        self.failures_caused[job] = self.failures_caused.get(job, 0) + 1

    # -- nodes --------------------------------------------------------------------------------------------------------

    def fill_up(self) -> None:
        """Nodes come until there are as many of each kind as there should be."""
        for spot, wanted in ((True, self.num_nodes), (False, self.num_on_demand)):
            num_there = sum(node.up and node.spot is spot for node in self.server.nodes.values())
            for _ in range(wanted - num_there):
                self.kubelets.add_node(spot=spot, skew_seconds=self.engine.rng.gauss(0, 5))

    def replace_node_later(self) -> None:
        """A lost node is replaced, sooner or later."""
        self.engine.after(self.engine.rng.choice([30.0, 120.0, 1200.0]), self.fill_up)

    # -- the operator -------------------------------------------------------------------------------------------------

    def restart_operator(self, seconds: float) -> None:
        """The operator dies; so many seconds later there is another."""
        if self.operator is not None:
            self.num_passes += self.operator.num_passes
            self.operator.close()
            self.operator = None
            self.engine.after(seconds, self._start_operator)

    def _start_operator(self) -> None:
        # What it reads went through the API: nothing lives on that JSON cannot hold.
        for name, job in self.server.jobs.items():
            text = job.status.model_dump_json(by_alias=True, exclude_none=True)
            status = FineTuneJobStatus.model_validate_json(text)
            self.server.jobs[name] = job.model_copy(update={"status": status})
        skew = self.engine.rng.uniform(-2, 2)
        self.operator = SimOperator(self.engine, self.server, self.settings, self.weather, skew)

    def good_weather(self) -> None:
        """Calls work."""
        self.weather.seconds, self.weather.failing, self.weather.lost = 0.02, 0.0, 0.0

    def _post(self, supervisor: Supervisor, beat: Heartbeat) -> Reply | None:
        """A beat on its way to the operator, if it gets there, and the answer, if it gets back."""
        node = supervisor.pod.node
        if self.operator is None or node is None or not node.connected:
            return None
        deaf = self.engine.time < self.deaf_until
        if deaf and self.engine.chance(self.deaf_share):
            return None
        reply = self.operator.post(beat)
        return None if deaf and self.engine.chance(0.1) else reply

    def calm_down(self) -> None:
        """From now on nothing goes wrong, and all that is broken is mended."""
        self.calm = True
        self.good_weather()
        self.server.quota = None
        self.deaf_until = 0.0
        if self.operator is not None:
            self.operator.watch.lag_seconds = 0.1
        for name in list(self.server.jobs):
            self.set_suspend(name, False)
        for node in list(self.server.nodes.values()):
            if not node.up:
                self.kubelets.remove_node(node)
        self.num_nodes = max(self.num_nodes, self.normal_num_nodes) + 10
        self.fill_up()
