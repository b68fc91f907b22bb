"""Reads the parameters of a rank from the environment that the supervisor sets."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError

from finetune_contract import environment
from finetune_contract.interval import DEFAULT_MTBF_SECONDS
from finetune_contract.run_spec import RunSpec, RunTarget, SpeedSettings
from finetune_trainer.checkpoint.split import MIN_PART_BYTES
from finetune_trainer.delivery.open import DeliveryPlace
from finetune_trainer.distributed.world import World
from finetune_trainer.errors import ConfigError
from finetune_trainer.phases import Phases
from finetune_trainer.report import Reporter
from finetune_trainer.train.preemption_notice import PreemptionNotice

Settings = TypeVar("Settings", RunTarget, SpeedSettings)


@dataclass(frozen=True)
class RankContext:
    """Parameters of a rank.

    Attributes:
        spec: the run specification.
        attempt: number of this attempt, from 1.
        job_dir: the job's folder on the shared storage.
        cache_dir: folder shared by all jobs.
        notice: the preemption notice (SIGTERM).
        reporter: sends reports to the supervisor.
        on_save_stage: see CheckpointStore.
        scratch: the job's folder on this node's own disk; None if checkpoints do not go to scratch first.
        bucket: URL of the job's folder in an object store; None if checkpoints go to `job_dir`.
        output_secrets: folder with the Secrets of the outputs; None outside of a cluster.
        min_part_bytes: see SaveOptions.
        mtbf_seconds: see SaveOptions.
        phases: durations of the phases of the start.
    """

    spec: RunSpec
    attempt: int
    job_dir: Path
    cache_dir: Path
    notice: PreemptionNotice
    reporter: Reporter
    on_save_stage: Callable[[str], None] = lambda _: None
    scratch: Path | None = None
    bucket: str | None = None
    output_secrets: Path | None = None
    min_part_bytes: int = MIN_PART_BYTES
    mtbf_seconds: float = DEFAULT_MTBF_SECONDS
    phases: Phases = field(default_factory=Phases)

    @property
    def delivery(self) -> DeliveryPlace:
        """Where the outputs of the job go."""
        spec = self.spec
        return DeliveryPlace(self.job_dir, spec.namespace, spec.job, self.bucket, self.output_secrets)


def read_context(
    env: Mapping[str, str],
    notice: PreemptionNotice,
    reporter: Reporter,
    on_save_stage: Callable[[str], None],
    phases: Phases | None = None,
) -> RankContext:
    """Read the variables that the supervisor sets.

    Raises:
        ConfigError: a variable is missing, or the run specification is invalid.
    """
    try:
        spec_file = Path(env[environment.RUN_SPEC])
        job_dir = Path(env[environment.CHECKPOINT_DIR])
        cache_dir = Path(env[environment.CACHE_DIR])
        attempt = int(env[environment.ATTEMPT])
        target = _read_variable(env, environment.TARGET, RunTarget)
        speed = _read_variable(env, environment.SPEED, SpeedSettings)
    except KeyError as error:
        raise ConfigError(f"{error.args[0]} is not set; start ranks by the supervisor") from error
    except ValueError as error:
        raise ConfigError(f"{environment.ATTEMPT} is not a number: {error}") from error
    spec = _read_spec(spec_file)
    if speed is not None:
        spec = spec.with_speed(speed)
    return RankContext(
        spec if target is None else spec.with_target(target),
        attempt,
        job_dir,
        cache_dir,
        notice,
        reporter,
        on_save_stage,
        scratch=Path(env[environment.SCRATCH_DIR]) if env.get(environment.SCRATCH_DIR) else None,
        bucket=env.get(environment.BUCKET) or None,
        output_secrets=Path(env[environment.OUTPUT_SECRETS]) if env.get(environment.OUTPUT_SECRETS) else None,
        min_part_bytes=int(env.get(environment.MIN_PART_BYTES, MIN_PART_BYTES)),
        mtbf_seconds=float(env.get(environment.MTBF_SECONDS) or DEFAULT_MTBF_SECONDS),
        phases=phases or Phases(),
    )


def share_target(context: RankContext, world: World) -> RankContext:
    """Return the context with the target of rank 0: an edit of the job may reach some pods of a gang only."""
    target = world.share(context.spec.target.to_json())
    return replace(context, spec=context.spec.with_target(RunTarget.model_validate_json(target)))


def _read_variable(env: Mapping[str, str], name: str, kind: type[Settings]) -> Settings | None:
    """Return settings that the operator passes as JSON; None if the variable is not set.

    Raises:
        ConfigError: the JSON is invalid.
    """
    if not env.get(name):
        return None
    try:
        return kind.model_validate_json(env[name])
    except ValidationError as error:
        raise ConfigError(f"{name}: {error.errors()[0]['msg']}") from error


def _read_spec(path: Path) -> RunSpec:
    """Read the run specification.

    Raises:
        ConfigError: the file cannot be read, or is invalid; the message names the first wrong field.
    """
    try:
        return RunSpec.read(path)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or environment.RUN_SPEC
        raise ConfigError(f"{where}: {first['msg']} (in the run specification {path})") from error
    except OSError as error:
        raise ConfigError(f"{environment.RUN_SPEC}: {path} cannot be read: {error.strerror}") from error
