"""The supervisor's lifecycle: start the ranks, send heartbeats, act on replies, end with the right exit code.

The state machine of `states` decides what follows from what; this module feeds its inputs and acts on them.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from finetune_contract.exit_codes import HOLDABLE, ExitCode, describe
from finetune_contract.heartbeat import Heartbeat, NewWorld, RankEnd, RankReport, RankState, Reply, Termination
from finetune_trainer.supervisor.config import BadEnvironmentError, Config, read_config
from finetune_trainer.supervisor.gpu_faults import GpuWatch
from finetune_trainer.supervisor.heartbeats import HeartbeatSender
from finetune_trainer.supervisor.log import log
from finetune_trainer.supervisor.node_setup import SetupReader
from finetune_trainer.supervisor.ranks import RankProcess, RankStarter
from finetune_trainer.supervisor.read_ahead import read_ahead
from finetune_trainer.supervisor.stacks import keep_stacks, wait_for_peers
from finetune_trainer.supervisor.states import (
    FINAL,
    FINAL_SUPERSEDED,
    REPORTED_AT_ONCE,
    TRANSITIONS,
    WITH_NOTICE,
    Input,
    State,
    inputs_of,
)
from finetune_trainer.supervisor.termination_message import GOOD_ENDS, cause_first, pod_exit_code, write_termination

RANK_COMMAND = (sys.executable, "-m", "finetune_trainer.rank")
SCRIPT_MODULE = "finetune_trainer.script"
PEER_SECONDS = 5.0
"""Time that the other ranks of the pod have to save after one of them failed: they cannot finish a step without it."""
SAVE_START_SECONDS = 0.5
"""Time in which a rank that must end has to start its emergency save."""
STACK_SECONDS = 0.05
"""Interval between checks whether the stacks of ranks that must end are stored."""
EMERGENCY_SAVE_SECONDS = 60.0
"""Maximum duration of an emergency save after the loss of a peer."""
UNREACHABLE_BEATS = 12
"""Heartbeat intervals without a reply after which the name of rank 0 is used, if it exists.

About then the operator, which hears nothing of the pod, creates it.
"""
LAST_HEARTBEAT_SECONDS = 2.0
"""Maximum time that the supervisor waits before its exit for the reply to the last heartbeat."""
ENDED_BY_US = frozenset({128 + signal.SIGTERM, 128 + signal.SIGKILL, 128 + signal.SIGUSR2})
"""Exit codes of ranks that a signal of this supervisor can end."""


class Supervisor:
    """All ranks of one pod, from start to end."""

    def __init__(self, config: Config, command: Sequence[str] = RANK_COMMAND) -> None:
        self._config = config
        self._command = command
        self._setups = SetupReader(config, os.environ)
        self._ranks: list[RankProcess] = []
        self._ends: list[RankEnd] = []
        self._state = _first_state(config)
        self._entered = asyncio.Event()
        """Set by every transition."""
        self._world: NewWorld | None = None
        """The newest world that the coordinator has named for this pod."""
        self._kill: asyncio.TimerHandle | None = None
        self._heartbeats = HeartbeatSender(config, self._build_heartbeat, self._obey, lambda: self._state in FINAL)
        self._starter = RankStarter(command, self._heartbeats.due.set)
        self._gpus = GpuWatch(self._on_gpu_fault)
        self._loop: asyncio.AbstractEventLoop
        self._stacks: asyncio.Task[None] | None = None
        """Stores the stacks of the ranks of this attempt after a hang."""

    async def run(self) -> int:
        """Run the ranks, in one world after the other, and return the pod's exit code."""
        loop = self._loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._feed, Input.PREEMPTION_NOTICE, signal.Signals(number).name)
        if os.getpid() == 1:
            loop.add_signal_handler(signal.SIGCHLD, self._reap_orphans)
        variables = self._setups.for_world(self._config).server_variables(os.environ)
        self._starter = await RankStarter.prepare(self._command, variables, self._heartbeats.due.set)
        # After the fork server, which must not inherit what NVML opens.
        self._gpus.start()
        if self._config.is_standby:
            self._heartbeats.last_reply_at = loop.time()
            read_ahead(self._config.model_base)
        elif self._state is State.STARTING:
            await self._start_ranks()
        heartbeats = asyncio.create_task(self._heartbeats.run())
        while self._state not in FINAL:
            await self._run_state()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(heartbeats, LAST_HEARTBEAT_SECONDS)
        if self._state in FINAL_SUPERSEDED:
            return ExitCode.SUPERSEDED
        return pod_exit_code(self._ends) if self._ends else ExitCode.SAVED

    async def _run_state(self) -> None:
        """Do the work of the current state, which feeds the input that ends it."""
        if self._state is State.STARTING:
            await self._start_ranks()
        elif self._state is State.JOINING:
            await self._join()
        elif self._state is State.WAITING:
            await self._wait_for_world()
        else:
            await self._wait_for_ranks()

    async def _join(self) -> None:
        """Wait for the address of rank 0. A coordinator that does not answer is waited for: no work can be lost yet.

        For a pod that cannot reach it, the operator creates a service, which gives rank 0 a name.
        """
        log("asking the coordinator for the address of rank 0")
        loop, name = asyncio.get_running_loop(), self._config.master_name
        since = loop.time()
        while self._state is State.JOINING:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._entered.wait(), self._config.beat_seconds)
            silence = loop.time() - max(since, self._heartbeats.last_reply_at)
            silent = silence >= UNREACHABLE_BEATS * self._config.beat_seconds
            found = silent and bool(name) and await _has_address(name)
            # A signal or a reply may have arrived meanwhile.
            if found and self._state is State.JOINING:
                log(f"the coordinator does not answer; DNS knows {name}")
                self._config = self._config.with_master(name)
                self._feed(Input.NEW_WORLD)
        self._entered.clear()

    async def _start_ranks(self) -> None:
        self._ranks, self._ends = [], []
        if self._world is not None:
            self._enter_world(self._world)
        try:
            setup = self._setups.for_world(self._config)
        except BadEnvironmentError as error:
            self._end_without_ranks(str(error), ExitCode.CONFIG)
            self._feed(Input.RANKS_STARTED)
            return
        for local_rank, place in enumerate(setup.placement.ranks):
            variables = setup.rank_variables(local_rank, os.environ)
            self._ranks.append(await self._starter.start(self._config, local_rank, place, variables))
        self._feed(Input.RANKS_STARTED)
        if self._state is not State.RUNNING:
            # An input arrived during the start, when not all ranks could receive its signal.
            self._signal_all(signal.SIGTERM)

    def _end_without_ranks(self, message: str, code: ExitCode) -> None:
        """Report a machine that cannot run the ranks, e.g. with fewer cores than before, like a failed rank."""
        log(message)
        self._ends.append(RankEnd(rank=self._config.rank(0), exit_code=int(code), last_words=message))
        self._write_termination_message()

    def _enter_world(self, world: NewWorld) -> None:
        verb = "restarting" if world.attempt > self._config.attempt else "starting"
        log(f"attempt {world.attempt}: {verb} the ranks as node {world.node_rank} of {world.num_nodes}")
        self._config = self._config.for_world(world)
        self._world = None
        self._stacks = None

    async def _wait_for_ranks(self) -> None:
        """Wait until all ranks have ended. A standby pod without ranks waits for its first heartbeat only."""
        await asyncio.gather(*(self._follow(rank) for rank in self._ranks if rank.end is None))
        if self._kill is not None:
            # It must not kill the ranks of the next world.
            self._kill.cancel()
        if self._ends and self._ends[0].exit_code not in HOLDABLE:
            self._feed(Input.ENDED_FINALLY)
        else:
            await self._heartbeats.wait_until_tried()
            self._feed(Input.ENDED_HOLDABLE)

    async def _wait_for_world(self) -> None:
        """Wait for the next transition. Stop when no coordinator has answered for too long."""
        left = self._heartbeats.last_reply_at + self._config.hold_seconds - asyncio.get_running_loop().time()
        if left <= 0:
            self._feed(Input.HOLD_EXPIRED)
            return
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._entered.wait(), left)
        self._entered.clear()

    async def _follow(self, rank: RankProcess) -> None:
        """Wait until a rank ends. If it failed, stop the others as well."""
        end = await rank.follow()
        lost_peer = rank.lost_peer or (self._ends and self._ends[0].exit_code == ExitCode.FABRIC)
        if lost_peer and end.exit_code in ENDED_BY_US:
            # This supervisor ended it because of the same lost peer.
            end = end.model_copy(update={"exit_code": int(ExitCode.FABRIC)})
        self._ends.append(end)
        self._write_termination_message()
        log(f"rank {end.rank} ended: {describe(end.exit_code)}")
        if end.exit_code not in GOOD_ENDS:
            self._end_soon()

    def _feed(self, event: Input, detail: str = "") -> bool:
        """Enter the next state and act; return whether the table lists the input for the current state.

        Args:
            event: what happened.
            detail: source of a preemption notice, or name of a newer attempt; for the log.
        """
        state = TRANSITIONS.get((self._state, event))
        if state is None:
            return False
        if state is not self._state:
            self._state = state
            self._act(event, detail)
            self._entered.set()
            if state in REPORTED_AT_ONCE:
                self._heartbeats.due.set()
        return True

    def _act(self, event: Input, detail: str) -> None:
        """Do what an input requires, after its state was entered."""
        if event is Input.PREEMPTION_NOTICE:
            log(f"preemption notice ({detail}): the ranks save and stop")
            self._signal_all(signal.SIGTERM)
            self._write_termination_message()
        elif event is Input.SAVE_REQUEST:
            log("save requested by the coordinator: another pod has a preemption notice")
            self._signal_all(signal.SIGTERM)
        elif event is Input.PEER_LOSS:
            log("the coordinator reports a lost peer: ending the ranks")
            for rank in self._ranks:
                rank.lost_peer = True
            self._end_hung()
        elif event is Input.NEW_WORLD and self._state in (State.RESTARTING, State.SUPERSEDED_PEER_LOST):
            # No collective of the old world will finish, even if a rank still waits in one.
            self._end_hung()
        elif event in (Input.NEW_WORLD, Input.NEWER_ATTEMPT):
            log(f"{detail} has started: attempt {self._config.attempt} stops")
            self._end_soon()

    def _obey(self, reply: Reply) -> None:
        """Act on a reply of the coordinator."""
        if reply.stacks and self._stacks is None:
            self._stacks = asyncio.create_task(self._keep_stacks())
        config = self._config
        for event in inputs_of(reply, config.attempt, config.master_addr, can_be_held=config.hold_seconds > 0):
            is_order = event is Input.PREEMPTION_NOTICE
            if self._feed(event, "order of the coordinator" if is_order else f"attempt {reply.attempt}"):
                if event is Input.NEW_WORLD:
                    self._world = reply.world
                break

    def _end_soon(self) -> None:
        """End the ranks after one has failed, or after a newer attempt: SIGTERM, and a short time to save."""
        self._signal_all(signal.SIGTERM)
        self._kill_later(PEER_SECONDS, self._end_hung)

    def _end_hung(self) -> None:
        """Tell the ranks that a peer is lost: they make an emergency save. Kill those that do not."""
        if self._stacks is not None and not self._stacks.done():
            self._kill_later(STACK_SECONDS, self._end_hung)
            return
        # Only the ranks of this world: the kill must not reach those of the next one.
        ranks = tuple(rank for rank in self._ranks if rank.end is None)
        deadline = asyncio.get_running_loop().time() + EMERGENCY_SAVE_SECONDS
        self._signal_all(signal.SIGUSR2)
        self._kill_later(SAVE_START_SECONDS, lambda: self._kill_unless_saving(ranks, deadline))

    def _kill_unless_saving(self, ranks: Sequence[RankProcess], deadline: float) -> None:
        is_over = asyncio.get_running_loop().time() >= deadline
        saving = [rank for rank in ranks if rank.end is None and rank.report.state is RankState.SAVING]
        for rank in ranks:
            if is_over or rank not in saving:
                rank.signal(signal.SIGKILL)
        if saving and not is_over:
            self._kill_later(SAVE_START_SECONDS, lambda: self._kill_unless_saving(saving, deadline))

    def _kill_later(self, seconds: float, kill: Callable[[], None]) -> None:
        if self._kill is not None:
            self._kill.cancel()
        self._kill = asyncio.get_running_loop().call_later(seconds, kill)

    def _signal_all(self, number: int) -> None:
        for rank in self._ranks:
            rank.signal(number)

    def _build_heartbeat(self, sequence: int) -> Heartbeat:
        config = self._config
        return Heartbeat(
            job=config.job,
            namespace=config.namespace,
            job_uid=config.job_uid,
            pod=config.pod,
            pod_uid=config.pod_uid,
            attempt=config.attempt,
            node_rank=config.node_rank,
            sequence=sequence,
            ranks=tuple(_with_end(rank) for rank in self._ranks) if self._ranks else self._starting_ranks(),
            ends=cause_first(self._ends),
            notice=self._state in WITH_NOTICE,
            waiting=self._state is State.WAITING,
            joining=self._state is State.JOINING,
            master_addr=config.named_addr or None,
            gpu_faults=self._gpus.faults,
        )

    def _starting_ranks(self) -> tuple[RankReport, ...]:
        """Return the reports of ranks that start when the address of rank 0 is known."""
        num_ranks = self._config.processes_per_node if self._state is State.JOINING else 0
        return tuple(RankReport(rank=self._config.rank(i), state=RankState.STARTING) for i in range(num_ranks))

    def _on_gpu_fault(self) -> None:
        """Report a fault, and end the ranks, in the watching thread's call: they may wait for the GPU forever."""

        def act() -> None:
            self._heartbeats.due.set()
            if self._state is State.JOINING:
                self._end_without_ranks(self._gpus.faults[0].message, ExitCode.DEVICE)
                self._feed(Input.ENDED_FINALLY)
            elif self._state not in FINAL:
                self._end_soon()

        self._loop.call_soon_threadsafe(act)

    def _write_termination_message(self) -> None:
        """Write the message at the notice and at every end: SIGKILL can prevent the last write."""
        steps = [rank.report.step for rank in self._ranks if rank.report.step is not None]
        code = pod_exit_code(self._ends) if self._ends else 128 + signal.SIGKILL
        termination = Termination(
            attempt=self._config.attempt,
            exit_code=code,
            step=max(steps, default=None),
            notice=self._state in WITH_NOTICE,
            ends=cause_first(self._ends),
            # The message is small, and the first fault is the cause.
            gpu_faults=self._gpus.faults[:1],
        )
        write_termination(self._config.termination_log, termination)

    async def _keep_stacks(self) -> None:
        for path in await keep_stacks(self._config, self._ranks):
            log(f"the ranks hang; the stacks of one are in {path}")
        await wait_for_peers(self._config)

    def _reap_orphans(self) -> None:
        """As PID 1, collect the exit status of orphaned grandchildren; asyncio collects that of the ranks."""
        ours = {rank.pid for rank in self._ranks}
        if self._starter.server is not None and self._starter.server.pid is not None:
            ours.add(self._starter.server.pid)
        while (info := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)) and info.si_pid not in ours:
            os.waitpid(info.si_pid, 0)


async def _has_address(name: str) -> bool:
    """Return whether DNS knows a name."""
    try:
        await asyncio.get_running_loop().getaddrinfo(name, None)
    except OSError:
        return False
    return True


def _first_state(config: Config) -> State:
    if config.is_standby:
        return State.STANDBY
    return State.JOINING if config.must_join else State.STARTING


def _with_end(rank: RankProcess) -> RankReport:
    """Return the newest report of a rank, with the state that its end implies."""
    if rank.end is None:
        return rank.report
    fine = {int(ExitCode.DONE): RankState.DONE, int(ExitCode.SAVED): RankState.SAVED}
    return rank.report.model_copy(update={"state": fine.get(rank.end.exit_code, RankState.FAILED)})


def rank_command(config: Config) -> Sequence[str]:
    """Return the command of a rank.

    Ranks of a script with its own requirements are not forked: the fork server has imported other versions.
    """
    if config.script is None:
        return RANK_COMMAND
    if config.script.requirements:
        return (sys.executable, "-u", "-m", SCRIPT_MODULE)
    return (sys.executable, "-m", SCRIPT_MODULE)


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run as `finetune-supervisor [-- COMMAND ...]`; the default command of a rank is the trainer."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    command: Sequence[str] = ()
    if arguments:
        if arguments[0] != "--" or len(arguments) == 1:
            log("usage: finetune-supervisor [-- COMMAND [ARGUMENT ...]]")
            sys.exit(ExitCode.CONFIG)
        command = arguments[1:]
    try:
        config = read_config(os.environ)
        code = asyncio.run(Supervisor(config, command or rank_command(config)).run())
    except BadEnvironmentError as error:
        log(str(error))
        sys.exit(ExitCode.CONFIG)
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit: it would wait for the thread of a last heartbeat that gets no reply.
    os._exit(code)
