"""What the supervisor reads from its environment, once, at the start."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from finetune_contract import environment
from finetune_contract.heartbeat import NewWorld
from finetune_contract.run_spec import RunSpec


class BadEnvironmentError(Exception):
    """The pod's environment lacks or garbles something; the message is a sentence."""


@dataclass(frozen=True)
class Config:
    """The place of this pod in its job."""

    namespace: str
    job: str
    job_uid: str
    pod: str
    pod_uid: str
    attempt: int
    node_rank: int
    num_nodes: int
    processes_per_node: int
    coordinator_url: str
    coordinator_token: Path | None
    coordinator_ca: Path | None
    beat_seconds: float
    termination_log: Path | None
    job_dir: Path | None = None
    """The job's folder on the shared storage."""
    hold_seconds: float = 0.0
    """How long to wait for a new world while nobody answers; 0: not at all."""
    stands_by: bool = False
    """Whether it has no ranks to start before a world is named."""
    model_base: str = ""
    """The base model, as the run specification names it."""
    rendezvous: tuple[tuple[str, str], ...] = ()
    """Variables of a world that was named later than the pod's manifest."""

    @property
    def world_size(self) -> int:
        """Number of ranks of the whole gang."""
        return self.num_nodes * self.processes_per_node

    def moved(self, world: NewWorld) -> Config:
        """The same pod in a later attempt."""
        where = {
            environment.MASTER_ADDR: world.master_addr,
            environment.MASTER_PORT: str(world.master_port),
            environment.ATTEMPT: str(world.attempt),
            environment.NODE_RANK: str(world.node_rank),
            environment.NUM_NODES: str(world.num_nodes),
            **({environment.MTBF_SECONDS: f"{world.mtbf_seconds:g}"} if world.mtbf_seconds else {}),
        }
        return replace(
            self,
            attempt=world.attempt,
            node_rank=world.node_rank,
            num_nodes=world.num_nodes,
            rendezvous=tuple(where.items()),
        )

    def rank(self, local_rank: int) -> int:
        """Global rank of a local one."""
        return self.node_rank * self.processes_per_node + local_rank


def read_config(env: Mapping[str, str]) -> Config:
    """Read the environment that the operator's pod manifest sets.

    Raises:
        BadEnvironmentError: a variable is missing or no number, or the run specification cannot be read.
    """
    spec_path = Path(_text(env, environment.RUN_SPEC))
    try:
        spec = RunSpec.read(spec_path)
    except (OSError, ValueError) as error:
        raise BadEnvironmentError(f"{environment.RUN_SPEC}: cannot read {spec_path}: {error}") from error
    return Config(
        namespace=spec.namespace,
        job=spec.job,
        job_uid=spec.uid,
        pod=_text(env, environment.POD_NAME),
        pod_uid=_text(env, environment.POD_UID),
        attempt=_count(env, environment.ATTEMPT),
        node_rank=_count(env, environment.NODE_RANK, least=0),
        num_nodes=_count(env, environment.NUM_NODES),
        processes_per_node=_count(env, environment.PROCESSES_PER_NODE),
        coordinator_url=env.get(environment.COORDINATOR_URL, ""),
        coordinator_token=_path(env, environment.COORDINATOR_TOKEN),
        coordinator_ca=_path(env, environment.COORDINATOR_CA),
        beat_seconds=_seconds(env, environment.BEAT_SECONDS, default=5.0),
        termination_log=_path(env, environment.TERMINATION_LOG),
        job_dir=_path(env, environment.CHECKPOINT_DIR),
        hold_seconds=_seconds(env, environment.HOLD_SECONDS, default=0.0, least=0.0),
        model_base=spec.model.base,
        stands_by=env.get(environment.STANDBY) == "1",
    )


def _text(env: Mapping[str, str], name: str) -> str:
    value = env.get(name, "")
    if not value:
        raise BadEnvironmentError(f"{name} is not set; the operator's pod manifest sets it")
    return value


def _path(env: Mapping[str, str], name: str) -> Path | None:
    return Path(env[name]) if env.get(name) else None


def _count(env: Mapping[str, str], name: str, least: int = 1) -> int:
    text = _text(env, name)
    if not text.isdecimal() or int(text) < least:
        raise BadEnvironmentError(f"{name}={text!r} is not a whole number of {least} or more")
    return int(text)


def _seconds(env: Mapping[str, str], name: str, default: float, least: float = 0.001) -> float:
    text = env.get(name) or str(default)
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if value < least:
        raise BadEnvironmentError(f"{name}={text!r} is not a number of seconds of {least:g} or more")
    return value
