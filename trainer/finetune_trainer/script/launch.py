"""Runs a script in this process, with the environment of `accelerate launch` and the hook."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import runpy
import sys
import tempfile
import zlib
from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from finetune_contract import environment
from finetune_contract.cpu.backend import CCL_BINDING
from finetune_contract.exit_codes import ExitCode
from finetune_contract.heartbeat import RankState
from finetune_contract.methods import needs_whole_base
from finetune_contract.outputs.request import written_in_training
from finetune_contract.script_spec import ScriptSpec
from finetune_trainer.checkpoint.store.base import storage_errors
from finetune_trainer.checkpoint.store.fence import Fence
from finetune_trainer.distributed.cpus import communication_cpus
from finetune_trainer.distributed.device_check import check_devices, multiply
from finetune_trainer.distributed.world import World, read_backend, wait_for_rank_0
from finetune_trainer.errors import ConfigError, FabricError, RankError, StorageError
from finetune_trainer.export.formats.about import About
from finetune_trainer.export.outputs import Export, check_targets
from finetune_trainer.models.hub import limit_waits
from finetune_trainer.script import arguments, hook
from finetune_trainer.script.accelerate_config import USE_CPU, read_environment
from finetune_trainer.script.agreement.boards import open_board
from finetune_trainer.script.agreement.peers import WAIT, Peers
from finetune_trainer.script.agreement.votes import Agreement
from finetune_trainer.script.checkpoints import ScriptCheckpoints
from finetune_trainer.script.figures import Figures
from finetune_trainer.script.outputs import ScriptRecord, ScriptResult, check_formats, write_script_outputs
from finetune_trainer.script.requirements import install
from finetune_trainer.script.saver import Saver
from finetune_trainer.script.session import SavedExit, Session, SessionOptions
from finetune_trainer.script.source import ScriptFacts, read_facts
from finetune_trainer.train.context import RankContext

_LOG = logging.getLogger(__name__)
RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")
CPU_BACKENDS = ("auto", "gloo", "ccl")
PROBE_BYTES = 4096
USAGE_ERROR = 2
"""Exit code of argparse."""
SCRIPT_FOLDER = "script"
"""Folder, below the job's folder, of what a script writes to relative paths of its output flags."""
WITHOUT_ACCELERATE = (
    "the script does not use accelerate: it is started, watched and restarted, and its steps are counted, but it has "
    "to save and resume by itself"
)


@dataclass(frozen=True)
class Place:
    """This rank's place among the ranks."""

    rank: int
    size: int
    local_rank: int
    local_size: int

    @classmethod
    def read(cls, env: Mapping[str, str]) -> Place:
        """Read torch's variables."""
        values = (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"), ("LOCAL_WORLD_SIZE", "1"))
        return cls(*(int(env.get(name, default)) for name, default in values))


def run_script(context: RankContext, env: MutableMapping[str, str] = os.environ) -> ExitCode:
    """Run the script of a job from start to end.

    Returns:
        DONE, or SAVED after a preemption notice.

    Raises:
        RankError: the script cannot run or continue.
        Exception: an error of the script itself.
    """
    script = context.spec.training.script
    assert script is not None
    env.update(script.env or {})
    if packages := install(script.requirements, context.cache_dir):
        sys.path.insert(0, str(packages))
        env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(packages), env.get("PYTHONPATH", "")]))
    path = find_script(script, env)
    place = Place.read(env)
    if place.rank == 0:
        limit_waits()
        check_targets(context.spec.outputs, context.delivery)
    use_accelerate_environment(env, place)
    if script.accelerate_config is not None:
        on_cpu = env.get(USE_CPU) == "true"
        env.update(read_environment(script.accelerate_config, world_size=place.size, on_cpu=on_cpu))
    join(env, place)
    world = make_world(env, place)
    if env.get(environment.CHECK_DEVICES) == "1":
        check_devices(world, context.reporter.warn, multiply)
    hook.keep_group()
    peers = Peers(place.rank, place.size, place.local_size if place.local_size < place.size else 1)
    session, argv = _make_session(context, script, path, peers, place.local_size)
    context.notice.on_peer_lost(session.emergency_save)
    base = arguments.find_base(argv, context.spec.model)
    if place.rank == 0 and base.flag_is_given:
        check_formats(context.spec.outputs, base.model)
    context.reporter.state(RankState.LOADING)
    code = _run(session, path, argv, world)
    if code is ExitCode.DONE:
        if peers.rank == 0:
            context.reporter.state(RankState.EXPORTING)
            outputs, export = written_in_training(context.spec.outputs), _export(context, session.step)
            whole = needs_whole_base(None, outputs)
            result = ScriptResult(session.output_folder, base.model, context.cache_dir, whole)
            context.reporter.outputs(write_script_outputs(result, outputs, export))
            model = base.model.model_dump(by_alias=True, exclude_none=True)
            ScriptRecord(str(session.output_folder), model, session.step, export.source).write(context.job_dir)
        # All ranks end together, when rank 0 has written the results of the script.
        peers.barrier()
    return code


def _export(context: RankContext, step: int) -> Export:
    """Return the export of a script's results. Another attempt with the same script and steps continues it."""
    spec = context.spec
    assert spec.training.script is not None
    settings = hashlib.sha256(spec.training.script.model_dump_json().encode()).hexdigest()[:12]
    about = About(spec.job, step=step, cache=context.cache_dir)
    source = f"script-{step}-{settings}"
    return Export(context.delivery, spec.uid, source, report=context.reporter.outputs, about=about)


def find_script(script: ScriptSpec, env: Mapping[str, str]) -> Path:
    """Return the path of the script's file: that of the ConfigMap, the path, or an example of diffusers.

    Raises:
        ConfigError: it does not exist.
    """
    path = Path(env.get(environment.SCRIPT) or script.path or "")
    if path.is_file():
        return path.absolute()
    examples = Path(env.get(environment.EXAMPLES) or os.devnull)
    # Research projects have copies of some examples, deeper in the folder.
    if len(path.parts) == 1 and (found := sorted(examples.rglob(path.name), key=lambda each: (len(each.parts), each))):
        return found[0]
    if len(path.parts) == 1:
        where = f"below {examples}" if examples.is_dir() else f"({environment.EXAMPLES} names no folder of examples)"
        raise ConfigError(
            f"training.script.path: there is no example {path} {where}; write the path of a file, e.g. "
            "/scripts/train.py"
        )
    raise ConfigError(f"training.script.path: {path} does not exist; write the path of a file in the image")


def use_accelerate_environment(env: MutableMapping[str, str], place: Place) -> None:
    """Set the variables that `accelerate launch` sets for one rank."""
    if env.get(environment.BACKEND) in CPU_BACKENDS:
        env[USE_CPU] = "true"
    if place.size == 1:
        # accelerate takes them for a job of several ranks.
        for name in RANK_VARIABLES:
            env.pop(name, None)


def join(env: Mapping[str, str], place: Place) -> None:
    """Join the other ranks. Rank 0 may save or validate alone for longer than torch waits by default.

    Raises:
        ConfigError: the backend is not installed.
        FabricError: not all ranks joined in time.
    """
    if place.size == 1:
        return
    backend = read_backend(env)
    try:
        if backend == "ccl":
            __import__(CCL_BINDING)
        if backend == "nccl":
            torch.cuda.set_device(place.local_rank)
            backend = "cpu:gloo,cuda:nccl"
        if place.rank:
            wait_for_rank_0(env["MASTER_ADDR"], int(env["MASTER_PORT"]))
        with communication_cpus(env):
            dist.init_process_group(backend, timeout=WAIT)
    except (ImportError, ValueError) as error:
        raise ConfigError(f"{environment.BACKEND}: {backend!r} is not available in this image: {error}") from error
    except RuntimeError as error:
        raise FabricError(f"rank {place.rank} of {place.size} could not join the other ranks: {error}") from error


def make_world(env: Mapping[str, str], place: Place) -> World:
    """Return the ranks, and the device on which accelerate trains in this one."""
    on_gpu = env.get(USE_CPU) != "true" and torch.cuda.is_available()
    device = torch.device("cuda", place.local_rank) if on_gpu else torch.device("cpu")
    return World(place.rank, place.size, place.local_rank, device)


def _make_session(
    context: RankContext, script: ScriptSpec, path: Path, peers: Peers, local_size: int
) -> tuple[Session, list[str]]:
    """Return the session, and the command line that resumes the newest verified checkpoint."""
    spec, facts = context.spec, read_facts(path.read_text(encoding="utf-8"))
    argv = arguments.to_argv(script.args or {})
    argv = arguments.place_inputs(argv, facts, spec.model, spec.dataset)
    argv, folder = arguments.place_output(argv, facts, context.job_dir / SCRIPT_FOLDER)
    # Stable for the job: some scripts choose samples at random if they have no seed.
    argv = arguments.place_seed(argv, facts, zlib.crc32(spec.uid.encode()) & 0x7FFFFFFF)
    fence = Fence(context.job_dir, context.attempt)
    checkpoints = ScriptCheckpoints(folder, spec.uid, context.attempt, fence, spec.keep)
    argv = _resume(context, facts, argv, checkpoints, peers)
    figures = Figures(context.reporter, peers.size, arguments.total_steps(argv, facts))
    from accelerate import Accelerator  # noqa: PLC0415  slow, and the script's requirements choose its version

    saver = Saver(checkpoints, peers, context.reporter, Accelerator.save_state, facts)
    options = SessionOptions(
        context.notice, spec.checkpoint_interval, context.mtbf_seconds, spec.max_stale_seconds, facts
    )
    agreement = Agreement(peers, open_board(peers, local_size))
    session = Session(options, agreement, saver, figures, context.reporter)
    hook.install(session, context.reporter, spec.uid)
    if not facts.uses_accelerate and peers.rank == 0:
        context.reporter.note(WITHOUT_ACCELERATE)
    return session, argv


def _resume(
    context: RankContext, facts: ScriptFacts, argv: list[str], checkpoints: ScriptCheckpoints, peers: Peers
) -> list[str]:
    """Return the command line with the newest verified checkpoint. Rank 0 chooses it for all ranks."""
    script = context.spec.training.script
    assert script is not None
    found: Path | None = None
    error: RankError | None = None
    if peers.rank == 0:
        try:
            with storage_errors():
                checkpoints.open()
                newest = checkpoints.find_newest()
                name = (script.resume_flag or "resume_from_checkpoint").lstrip("-")
                checkpoints.set_aside_incomplete(arguments.find_flag(argv, name) or "")
                found = newest.folder if newest is not None else None
        except RankError as problem:
            error = problem
        if checkpoints.num_corrupt:
            context.reporter.corrupt_checkpoints(checkpoints.num_corrupt)
    found, error = peers.share((found, error))
    if error is not None:
        raise error
    if found is not None:
        _LOG.info("resuming %s", found)
    return arguments.place_resume(argv, facts, script.resume_flag, found)


def _run(session: Session, path: Path, argv: list[str], world: World) -> ExitCode:
    """Run the script as the main module; turn its exit into an exit code of the contract."""
    try:
        with _as_main(path, argv), world.watch_collectives("the script"), _explain_failed_writes(path, session):
            runpy.run_path(str(path), run_name="__main__")
        session.finish()
    except SavedExit:
        return ExitCode.SAVED
    except SystemExit as error:
        if error.code in (None, 0):
            session.finish()
            return ExitCode.DONE
        if error.code == USAGE_ERROR and session.step == 0:
            raise ConfigError(f"training.script.args: {path.name} refuses them; its message is above") from error
        raise ScriptError(f"{path.name} exited with code {error.code}") from error
    except (FabricError, StorageError):
        session.emergency_save()
        raise
    return ExitCode.DONE


@contextlib.contextmanager
def _explain_failed_writes(path: Path, session: Session) -> Iterator[None]:
    """Turn an error of the script into a StorageError if its output folder cannot be written.

    The errors of torch's and other libraries' writers do not name the disk as the cause.
    """
    try:
        yield
    except RankError:
        raise
    except (Exception, SystemExit) as error:
        is_success = isinstance(error, SystemExit) and error.code in (None, 0, int(ExitCode.SAVED))
        problem = None if is_success else find_write_error(session.output_folder)
        if problem is None:
            raise
        _LOG.exception("%s failed", path.name)
        reason = problem.strerror or str(problem)
        raise StorageError(
            f"{path.name} failed, and {session.output_folder} cannot be written: {reason}; free space there, or make "
            "it writable"
        ) from problem


def find_write_error(folder: Path) -> OSError | None:
    """Return the error of writing a small file into a folder; None if that works, or if there is no such folder."""
    try:
        with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
            file.write(bytes(PROBE_BYTES))
            os.fsync(file.fileno())
    except FileNotFoundError:
        return None
    except OSError as error:
        return error
    return None


class ScriptError(RankError):
    """The script ended with an exit code of its own."""


@contextlib.contextmanager
def _as_main(path: Path, argv: list[str]) -> Iterator[None]:
    """Give the script its own arguments and its folder in the search path, as `python PATH` does."""
    old = sys.argv, list(sys.path)
    sys.argv = [str(path), *argv]
    sys.path.insert(0, str(path.parent))
    try:
        yield
    finally:
        sys.argv, sys.path[:] = old[0], old[1]
