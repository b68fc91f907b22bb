"""The supervisor's own life: start the ranks, beat, pass on what it is told, end with the right code."""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import signal
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NoReturn

from finetune_contract.exit_codes import HOLDABLE, ExitCode, describe
from finetune_contract.heartbeat import Heartbeat, NewWorld, Order, RankEnd, RankReport, RankState, Reply, Termination
from finetune_trainer.supervisor.client import CoordinatorClient, CoordinatorError
from finetune_trainer.supervisor.config import BadEnvironmentError, Config, read_config
from finetune_trainer.supervisor.cores import affinity, cgroup_quota, share_cores
from finetune_trainer.supervisor.last_words import FINE, cause_first, pod_exit_code, write_termination
from finetune_trainer.supervisor.ranks import RankProcess, Starter
from finetune_trainer.supervisor.read_ahead import read_ahead
from finetune_trainer.supervisor.stacks import keep_stacks

RANK_COMMAND = (sys.executable, "-m", "finetune_trainer.rank")
PEER_SECONDS = 5.0
"""How long the other ranks of the pod have once one of them ended badly: they cannot finish a step without it."""
MIN_BEAT_GAP_SECONDS = 0.05
"""Changes that come closer together share a beat."""
"""Ends of ranks after which their pod is still good for another world."""
BEGIN_SECONDS = 0.5
"""How long a rank that is to be ended has to begin to save what it holds."""
STACK_SECONDS = 0.05
"""How often it is looked whether the stacks of ranks that are to be ended are kept."""
RESCUE_SECONDS = 60.0
"""How long a rank that saves for a lost peer may take."""
ENDED_BY_US = frozenset({128 + signal.SIGTERM, 128 + signal.SIGKILL, 128 + signal.SIGUSR2})
FAREWELL_SECONDS = 2.0
"""How long the end waits for the last beat to be taken."""


class Supervisor:
    """All ranks of one pod, from start to end."""

    def __init__(self, config: Config, command: Sequence[str] = RANK_COMMAND) -> None:
        self._config = config
        self._command = command
        self._ranks: list[RankProcess] = []
        self._ends: list[RankEnd] = []
        self._notice = False
        self._ordered = False
        self._orphaned = False
        self._superseded = False
        self._waiting = False
        self._over = False
        self._world: NewWorld | None = None
        self._heard_at = -math.inf
        self._kill: asyncio.TimerHandle | None = None
        self._tried = asyncio.Event()
        """Set once a first beat was answered, or was not."""
        self._changed = asyncio.Event()
        self._starter = Starter(command, self._changed.set)
        self._stacks: asyncio.Task[None] | None = None
        """Keeps what the ranks of this attempt were doing while nothing went on."""
        self._decided = asyncio.Event()
        """Set by whatever a supervisor that waits for a new world waits for."""
        self._sequence = 0
        self._beat_seconds = config.beat_seconds

    async def run(self) -> int:
        """Run the ranks, in one world after the other, and return the pod's exit code."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_notice, signal.Signals(number).name)
        if os.getpid() == 1:
            loop.add_signal_handler(signal.SIGCHLD, self._reap_orphans)
        shares = share_cores(affinity(), cgroup_quota(), self._config.processes_per_node)
        self._starter = await Starter.ready(self._command, shares[0], self._changed.set)
        self._heard_at = loop.time() if self._config.stands_by else self._heard_at
        if self._config.stands_by:
            read_ahead(self._config.model_base)
        else:
            await self._start_ranks()
        beats = asyncio.create_task(self._beat_until_ended())
        await self._see_all_to_end()
        while await self._new_world_comes():
            await self._start_ranks()
            self._changed.set()
            await self._see_all_to_end()
        self._over = True
        self._changed.set()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(beats, FAREWELL_SECONDS)
        if self._superseded:
            return ExitCode.SUPERSEDED
        return pod_exit_code(self._ends) if self._ends else ExitCode.SAVED

    async def _start_ranks(self) -> None:
        self._ranks, self._ends = [], []
        shares = share_cores(affinity(), cgroup_quota(), self._config.processes_per_node)
        for local_rank, share in enumerate(shares):
            self._ranks.append(await self._starter.start(self._config, local_rank, share))
        if self._notice:
            self._signal_all(signal.SIGTERM)

    async def _see_all_to_end(self) -> None:
        await asyncio.gather(*(self._see_to_end(rank) for rank in self._ranks))
        if self._kill is not None:
            # It must not hit the ranks that come after these.
            self._kill.cancel()

    async def _new_world_comes(self) -> bool:
        """Where the ranks lost a peer, or saved for the sake of one, wait until the operator names a new world."""
        loop = asyncio.get_running_loop()
        if self._world is None and (not self._ends or self._ends[0].exit_code in HOLDABLE):
            if self._config.coordinator_url:
                await self._tried.wait()
            self._waiting = True
            self._changed.set()
            while not (self._world or self._notice or self._superseded):
                left = self._heard_at + self._config.hold_seconds - loop.time()
                if left <= 0:
                    break
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._decided.wait(), left)
                self._decided.clear()
            self._waiting = False
        world, self._world = self._world, None
        if world is None or self._notice or self._superseded:
            return False
        _log(f"attempt {world.attempt}: the ranks start anew as node {world.node_rank} of {world.num_nodes}")
        self._config = self._config.moved(world)
        self._ordered = self._orphaned = False
        self._stacks = None
        return True

    async def _see_to_end(self, rank: RankProcess) -> None:
        end = await rank.follow()
        want_a_peer = self._orphaned or (self._ends and self._ends[0].exit_code == ExitCode.FABRIC)
        if want_a_peer and end.exit_code in ENDED_BY_US:
            # Ended by this supervisor, for want of the same peer.
            end = end.model_copy(update={"exit_code": int(ExitCode.FABRIC)})
        self._ends.append(end)
        self._write_last_words()
        _log(f"rank {end.rank} ended: {describe(end.exit_code)}")
        if end.exit_code not in FINE:
            self._end_soon()

    def _end_soon(self) -> None:
        """One rank is gone for good: the others get a notice and a short while."""
        self._signal_all(signal.SIGTERM)
        self._kill_later(PEER_SECONDS, self._end_hung)

    def _kill_later(self, seconds: float, kill: Callable[[], None]) -> None:
        if self._kill is not None:
            self._kill.cancel()
        self._kill = asyncio.get_running_loop().call_later(seconds, kill)

    def _on_notice(self, source: str) -> None:
        """SIGTERM has come: the ranks have the whole grace period of the pod, and the pod ends with them."""
        all_ended = bool(self._ranks) and len(self._ends) == len(self._ranks)
        if self._notice or (all_ended and not self._waiting):
            return
        _log(f"notice ({source}): the ranks save and stop")
        self._notice = True
        self._decided.set()
        self._signal_all(signal.SIGTERM)
        self._write_last_words()
        self._changed.set()

    def _on_order(self) -> None:
        """A peer has notice: the ranks save, and the pod waits for what comes after."""
        if not self._config.hold_seconds:
            self._on_notice("order of the coordinator")
        elif not self._ordered and not self._notice and len(self._ends) < len(self._ranks):
            _log("the coordinator asks to save: another pod has notice")
            self._ordered = True
            self._signal_all(signal.SIGTERM)

    def _on_lost_peer(self) -> None:
        """A peer is gone, which the ranks may not know: they save what they hold, and the pod waits for a new world."""
        if self._config.hold_seconds and not (self._orphaned or self._notice) and len(self._ends) < len(self._ranks):
            _log("the coordinator says that a peer is gone: the ranks end")
            self._orphaned = True
            self._end_hung()

    def _signal_all(self, number: int) -> None:
        for rank in self._ranks:
            rank.signal(number)

    def _write_last_words(self) -> None:
        """Written at the notice and at every end, for the last of them may be cut short by SIGKILL."""
        steps = [rank.report.step for rank in self._ranks if rank.report.step is not None]
        code = pod_exit_code(self._ends) if self._ends else 128 + signal.SIGKILL
        termination = Termination(
            attempt=self._config.attempt,
            exit_code=code,
            step=max(steps, default=None),
            notice=self._notice,
            ends=cause_first(self._ends),
        )
        write_termination(self._config.termination_log, termination)

    async def _beat_until_ended(self) -> None:
        """Beat at once when something changed and every few seconds otherwise; go on training when nobody answers."""
        if not self._config.coordinator_url:
            return
        client = CoordinatorClient(
            self._config.coordinator_url, self._config.coordinator_token, self._config.coordinator_ca
        )
        loop = asyncio.get_running_loop()
        silent = False
        thread = ThreadPoolExecutor(1, thread_name_prefix="beat")
        while True:
            self._changed.clear()
            ended = self._over
            try:
                reply = await loop.run_in_executor(thread, client.post, self._next_beat())
                silent = _tell_change(silent, None)
                self._heard_at = loop.time()
                self._obey(reply)
            except CoordinatorError as error:
                silent = _tell_change(silent, error)
            self._tried.set()
            if ended:
                return
            await asyncio.sleep(MIN_BEAT_GAP_SECONDS)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), self._beat_seconds)

    def _next_beat(self) -> Heartbeat:
        self._sequence += 1
        config = self._config
        return Heartbeat(
            job=config.job,
            namespace=config.namespace,
            job_uid=config.job_uid,
            pod=config.pod,
            pod_uid=config.pod_uid,
            attempt=config.attempt,
            node_rank=config.node_rank,
            sequence=self._sequence,
            ranks=tuple(_with_end(rank) for rank in self._ranks),
            ends=cause_first(self._ends),
            notice=self._notice,
            waiting=self._waiting,
        )

    def _obey(self, reply: Reply) -> None:
        self._beat_seconds = reply.beat_seconds or self._config.beat_seconds
        world = reply.world
        if reply.stacks and self._stacks is None:
            self._stacks = asyncio.create_task(self._keep_stacks())
        if world is not None and world.attempt > self._config.attempt and not self._notice:
            # The old world is over, even where a rank does not know yet that it waits in vain.
            if self._world is None:
                self._end_hung()
            self._world = world
            self._decided.set()
        elif reply.attempt is not None and reply.attempt > self._config.attempt and not self._superseded:
            _log(f"attempt {reply.attempt} has begun: this one ({self._config.attempt}) stops")
            self._superseded = True
            self._decided.set()
            self._end_soon()
        elif reply.order is Order.SAVE_AND_STOP:
            self._on_order()
        elif reply.peer_lost:
            self._on_lost_peer()

    async def _keep_stacks(self) -> None:
        for path in await keep_stacks(self._config, self._ranks):
            _log(f"nothing goes on; what the rank was doing is in {path}")

    def _end_hung(self) -> None:
        """Tell the ranks that a peer is gone for good. They save what they hold; those that do not are killed."""
        if self._stacks is not None and not self._stacks.done():
            self._kill_later(STACK_SECONDS, self._end_hung)
            return
        self._signal_all(signal.SIGUSR2)
        # These ranks only: those of the next world are not to be hit.
        ranks, deadline = tuple(self._ranks), asyncio.get_running_loop().time() + RESCUE_SECONDS
        self._kill_later(BEGIN_SECONDS, lambda: self._kill_unless_saving(ranks, deadline))

    def _kill_unless_saving(self, ranks: Sequence[RankProcess], deadline: float) -> None:
        is_over = asyncio.get_running_loop().time() >= deadline
        saving = [rank for rank in ranks if rank.end is None and rank.report.state is RankState.SAVING]
        for rank in ranks:
            if is_over or rank not in saving:
                rank.signal(signal.SIGKILL)
        if saving and not is_over:
            self._kill_later(BEGIN_SECONDS, lambda: self._kill_unless_saving(saving, deadline))

    def _reap_orphans(self) -> None:
        """As PID 1, collect what grandchildren leave behind; our own ranks are asyncio's to collect."""
        ours = {rank.pid for rank in self._ranks}
        if self._starter.server is not None and self._starter.server.pid is not None:
            ours.add(self._starter.server.pid)
        while (info := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)) and info.si_pid not in ours:
            os.waitpid(info.si_pid, 0)


def _with_end(rank: RankProcess) -> RankReport:
    """The newest report of a rank, with the state that its end implies."""
    if rank.end is None:
        return rank.report
    fine = {int(ExitCode.DONE): RankState.DONE, int(ExitCode.SAVED): RankState.SAVED}
    return rank.report.model_copy(update={"state": fine.get(rank.end.exit_code, RankState.FAILED)})


def _tell_change(was_silent: bool, error: CoordinatorError | None) -> bool:
    if error is not None and not was_silent:
        _log(f"the coordinator cannot be reached ({error}); training goes on")
    if error is None and was_silent:
        _log("the coordinator answers again")
    return error is not None


def _log(text: str) -> None:
    print(f"[supervisor] {text}", file=sys.stderr, flush=True)  # noqa: T201


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run as `finetune-supervisor [-- COMMAND ...]`; the command of a rank is the trainer unless one is given."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    command: Sequence[str] = RANK_COMMAND
    if arguments:
        if arguments[0] != "--" or len(arguments) == 1:
            _log("usage: finetune-supervisor [-- COMMAND [ARGUMENT ...]]")
            sys.exit(ExitCode.CONFIG)
        command = arguments[1:]
    try:
        config = read_config(os.environ)
    except BadEnvironmentError as error:
        _log(str(error))
        sys.exit(ExitCode.CONFIG)
    code = asyncio.run(Supervisor(config, command).run())
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit: that would wait for a last beat that nobody answers.
    os._exit(code)
