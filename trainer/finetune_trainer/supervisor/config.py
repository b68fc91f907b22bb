"""Configuration of the supervisor: read once from the environment, at the start."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from finetune_contract import environment
from finetune_contract.cpu.spec import CpuSpec
from finetune_contract.heartbeat import NewWorld
from finetune_contract.run_spec import RunSpec
from finetune_contract.script_spec import ScriptSpec


class BadEnvironmentError(Exception):
    """A variable of the pod's environment is missing or invalid. The message names it and what it must be."""


@dataclass(frozen=True)
class Config:
    """Identity of this pod and its position in the job."""

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
    """Maximum time to wait for a new world without a reply of the coordinator; 0: the pod ends with its ranks."""
    is_standby: bool = False
    """Whether this is a standby pod: it starts no ranks before the coordinator names a world."""
    script: ScriptSpec | None = None
    """Script that the ranks run in place of a method, from the run specification."""
    model_base: str = ""
    """Location of the base model, from the run specification."""
    rendezvous: tuple[tuple[str, str], ...] = ()
    """Environment variables of a world that the coordinator has named."""
    cpu: CpuSpec = field(default_factory=CpuSpec)
    """Settings of CPU training, from the run specification."""
    master_addr: str = ""
    """Address of rank 0's pod; empty: not known yet."""
    named_addr: str = ""
    """The same, if the coordinator has named it."""
    master_name: str = ""
    """DNS name of rank 0's pod, if the manifest contains no address."""

    @property
    def must_join(self) -> bool:
        """Return whether the coordinator must name the address of rank 0 before the ranks can start."""
        return not self.master_addr and not self.is_standby

    @property
    def world_size(self) -> int:
        """Number of ranks of the complete gang."""
        return self.num_nodes * self.processes_per_node

    def for_world(self, world: NewWorld) -> Config:
        """Return the configuration of the same pod in the world that the coordinator has named."""
        variables = {
            environment.MASTER_ADDR: world.master_addr,
            environment.MASTER_PORT: str(world.master_port),
            environment.ATTEMPT: str(world.attempt),
            environment.NODE_RANK: str(world.node_rank),
            environment.NUM_NODES: str(world.num_nodes),
            **({environment.MTBF_SECONDS: f"{world.mtbf_seconds:g}"} if world.mtbf_seconds else {}),
            **({environment.TARGET: world.target} if world.target else {}),
            # Also where the pod was created for an attempt that checked them.
            environment.CHECK_DEVICES: "1" if world.check_devices else "",
        }
        return replace(
            self,
            attempt=world.attempt,
            node_rank=world.node_rank,
            num_nodes=world.num_nodes,
            rendezvous=tuple(variables.items()),
            master_addr=world.master_addr,
            named_addr=world.master_addr,
        )

    def with_master(self, name: str) -> Config:
        """Return the configuration of the same pod in its attempt, with a name of rank 0 that DNS knows."""
        return replace(self, rendezvous=((environment.MASTER_ADDR, name),), master_addr=name)

    def rank(self, local_rank: int) -> int:
        """Return the global rank of a local rank."""
        return self.node_rank * self.processes_per_node + local_rank


def read_config(env: Mapping[str, str]) -> Config:
    """Read the environment that the operator's pod manifest sets.

    Raises:
        BadEnvironmentError: a variable is missing or invalid, or the run specification cannot be read.
    """
    spec_path = Path(_text(env, environment.RUN_SPEC))
    try:
        spec = RunSpec.read(spec_path)
    except (OSError, ValueError) as error:
        raise BadEnvironmentError(f"{environment.RUN_SPEC}: cannot read {spec_path}: {error}") from error
    coordinator_url, master_addr = env.get(environment.COORDINATOR_URL, ""), env.get(environment.MASTER_ADDR, "")
    is_standby = env.get(environment.STANDBY) == "1"
    if not master_addr and not coordinator_url and not is_standby:
        raise BadEnvironmentError(
            f"neither {environment.MASTER_ADDR} nor {environment.COORDINATOR_URL} is set: nobody can name rank 0; "
            "the operator's pod manifest sets one of them"
        )
    return Config(
        namespace=spec.namespace,
        job=spec.job,
        job_uid=spec.uid,
        pod=_text(env, environment.POD_NAME),
        pod_uid=_text(env, environment.POD_UID),
        attempt=_count(env, environment.ATTEMPT),
        node_rank=_count(env, environment.NODE_RANK, minimum=0),
        num_nodes=_count(env, environment.NUM_NODES),
        processes_per_node=_count(env, environment.PROCESSES_PER_NODE),
        coordinator_url=coordinator_url,
        coordinator_token=_path(env, environment.COORDINATOR_TOKEN),
        coordinator_ca=_path(env, environment.COORDINATOR_CA),
        beat_seconds=_seconds(env, environment.BEAT_SECONDS, default=5.0),
        termination_log=_path(env, environment.TERMINATION_LOG),
        job_dir=_path(env, environment.CHECKPOINT_DIR),
        hold_seconds=_seconds(env, environment.HOLD_SECONDS, default=0.0, minimum=0.0),
        script=spec.training.script,
        model_base=spec.model.base,
        cpu=spec.cpu,
        is_standby=is_standby,
        master_addr=master_addr,
        master_name=env.get(environment.MASTER_NAME, ""),
    )


def _text(env: Mapping[str, str], name: str) -> str:
    value = env.get(name, "")
    if not value:
        raise BadEnvironmentError(f"{name} is not set; the operator's pod manifest sets it")
    return value


def _path(env: Mapping[str, str], name: str) -> Path | None:
    return Path(env[name]) if env.get(name) else None


def _count(env: Mapping[str, str], name: str, minimum: int = 1) -> int:
    text = _text(env, name)
    if not text.isdecimal() or int(text) < minimum:
        raise BadEnvironmentError(f"{name}={text!r} must be an integer of at least {minimum}")
    return int(text)


def _seconds(env: Mapping[str, str], name: str, default: float, minimum: float = 0.001) -> float:
    text = env.get(name) or str(default)
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if value < minimum:
        raise BadEnvironmentError(f"{name}={text!r} must be a number of seconds, at least {minimum:g}")
    return value
