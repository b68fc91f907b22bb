"""Composition root of a rank: join the world, load, cache, restore, train, export. Called by `rank`."""

from __future__ import annotations

import dataclasses
import gc
import os
from collections.abc import Mapping
from functools import partial

from finetune_contract import environment
from finetune_contract.exit_codes import ExitCode
from finetune_contract.heartbeat import RankState, WrittenOutput
from finetune_contract.outputs.request import written_in_training
from finetune_trainer import heap
from finetune_trainer.checkpoint.checkpointer import Checkpointer
from finetune_trainer.checkpoint.state import TrainState
from finetune_trainer.distributed.device_check import check_devices, multiply
from finetune_trainer.distributed.fabric import missing_plugin
from finetune_trainer.distributed.world import join_world
from finetune_trainer.errors import FabricError, NetworkError, StorageError, StorageOutageError
from finetune_trainer.export.formats.write import check_adapters
from finetune_trainer.export.outputs import kinds_of_weights, write_outputs
from finetune_trainer.export.retry import PatientWriter
from finetune_trainer.methods.method import Method
from finetune_trainer.models.hub import limit_waits
from finetune_trainer.phases import StartPhase
from finetune_trainer.train.artifact_sync import ArtifactSync
from finetune_trainer.train.build import RunBuilder
from finetune_trainer.train.checks import check_inputs, check_place, check_spec
from finetune_trainer.train.context import RankContext, share_target
from finetune_trainer.train.determinism import make_deterministic
from finetune_trainer.train.inputs import load_inputs
from finetune_trainer.train.loop import Loop
from finetune_trainer.train.space.check import check_space
from finetune_trainer.train.trackers import check_trackers


def run_rank(context: RankContext, env: Mapping[str, str] = os.environ) -> ExitCode:
    """Run one rank from start to end.

    Returns:
        DONE, or SAVED after a preemption notice.

    Raises:
        RankError: the rank cannot continue.
    """
    check_spec(context.spec)
    check_trackers(context.spec.training.trackers, env)
    world = join_world(env)
    context.phases.end(StartPhase.RENDEZVOUS)
    if env.get(environment.CHECK_DEVICES) == "1":
        check_devices(world, context.reporter.warn, multiply)
    context = share_target(context, world)
    limit_waits()
    check_place(context, world)
    context.reporter.state(RankState.LOADING)
    make_deterministic(world.device)
    if world.device.type == "cpu":
        heap.keep_freed_memory(env)
    elif world.is_first and world.size > 1 and (warning := missing_plugin(env)):
        context.reporter.warn(warning)
    inputs = load_inputs(context, world, env)
    check_inputs(inputs.spec, inputs.family, world.device)
    if world.is_first and not inputs.resumes:
        check_adapters(inputs.spec.outputs, inputs.family)
        # An attempt that resumes waits for space during its saves, so that it loses nothing.
        check_space(inputs.spec, inputs.family, context.delivery, context.attempt)
    context.phases.end(StartPhase.INPUTS)
    return _run_phases(RunBuilder(context, world, inputs, ArtifactSync(context.job_dir, inputs.bucket)))


def _run_phases(build: RunBuilder) -> ExitCode:
    """Cache, load, restore, train, export."""
    context, world = build.context, build.world
    checkpointer = build.make_checkpointer()
    checkpointer.check_storage()
    if build.inputs.resumes:
        build.denoiser.start()
    context.reporter.state(RankState.CACHING)
    data = build.prepare_data()
    # The encoders are no longer in memory.
    heap.release_free_memory()
    context.phases.end(StartPhase.CACHE)
    context.reporter.state(RankState.LOADING)
    method = build.make_method(data)
    state = build.make_state(method)
    context.phases.end(StartPhase.WEIGHTS)
    context.reporter.state(RankState.RESTORING)
    if world.is_first:
        build.artifacts.pull_validation()
    checkpointer.restore(state)
    if build.inputs.needs_checkpoint and state.step == 0:
        raise StorageError("checkpoint storage: all checkpoints of the job are damaged; the next attempt starts again")
    context.phases.end(StartPhase.RESTORE)
    build.confirm_data()
    context.phases.end(StartPhase.DATA_CHECK)
    context.notice.on_peer_lost(lambda: checkpointer.emergency_save(state))
    loop = build.make_loop(method, state, data, checkpointer)
    if not _train(loop, state, checkpointer):
        return ExitCode.SAVED
    _export(build, method, state)
    world.close()
    return ExitCode.DONE


def _train(loop: Loop, state: TrainState, checkpointer: Checkpointer) -> bool:
    """Train until all steps are done or a preemption notice arrives; return whether all steps are done.

    Raises:
        RankError: training cannot continue. If a peer was lost, or in an outage, the emergency save runs first.
    """
    # Objects created so far stay until the end: only what a step creates is checked for garbage.
    gc.freeze()
    gc.enable()
    loop.notice.hold()
    try:
        return loop.run()
    except (FabricError, NetworkError, StorageOutageError):
        # A peer was lost, or an image of the next step cannot be read: the last finished step is complete.
        checkpointer.emergency_save(state)
        raise
    finally:
        if loop.metrics is not None:
            loop.metrics.close()


def _export(build: RunBuilder, method: Method, state: TrainState) -> None:
    """Write the outputs on rank 0; the other ranks wait, so that all of them end when the outputs exist.

    Raises:
        StorageError: they could not be written for longer than `maxStale`.
    """
    context, world = build.context, build.world
    context.reporter.state(RankState.EXPORTING)
    notice = context.notice
    writer = PatientWriter(world, context.reporter, build.spec.max_stale_seconds, notice.released, pause=notice.pause)
    finished: dict[int, WrittenOutput] = {}
    outputs = written_in_training(build.spec.outputs)

    def write(averaged: bool) -> tuple[WrittenOutput, ...]:
        export = dataclasses.replace(build.make_export(state.step), finished=finished)
        return write_outputs(method, outputs, export, averaged=averaged)

    for averaged in kinds_of_weights(outputs) if outputs or not build.spec.outputs else ():
        with state.exported(averaged=averaged):
            writer.write(partial(write, averaged))
    world.barrier()
