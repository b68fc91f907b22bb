"""State machine of the supervisor: its states, its inputs and the table of transitions. Pure.

`supervisor.main` feeds the inputs and acts on them. Three independent facts shape the states:

- a preemption notice has arrived: the pod ends with its ranks;
- a newer attempt has superseded this one: the pod ends with exit code SUPERSEDED, with or without a notice;
- neither has: the pod can be kept, and its ranks start again in the next world.
"""

from __future__ import annotations

from enum import StrEnum

from finetune_contract.heartbeat import Order, Reply


class State(StrEnum):
    """States of the supervisor."""

    STANDBY = "Standby"
    """A standby pod without ranks. The coordinator has not answered its first heartbeat yet."""
    JOINING = "Joining"
    """The ranks of this attempt start when the coordinator names the address of rank 0."""
    STARTING = "Starting"
    """The ranks of this attempt are being started."""
    RUNNING = "Running"
    """The ranks run."""
    SAVING = "Saving"
    """The ranks save and stop because another pod has a preemption notice. This pod is kept."""
    PEER_LOST = "PeerLost"
    """The ranks make an emergency save and end because a peer is lost. This pod is kept."""
    RESTARTING = "Restarting"
    """The coordinator has named a new world. The ranks of the old world end first."""
    WAITING = "Waiting"
    """All ranks have ended, and the pod waits until the coordinator names a new world."""
    STOPPING = "Stopping"
    """A preemption notice has arrived: the ranks save and stop, and the pod ends with them."""
    SUPERSEDED = "Superseded"
    """A newer attempt has begun without this pod: the ranks save and stop, and the pod ends with them."""
    SUPERSEDED_PEER_LOST = "SupersededPeerLost"
    """Superseded, and the ranks cannot finish a collective: they make an emergency save and end."""
    SUPERSEDED_STOPPING = "SupersededStopping"
    """Superseded, and a preemption notice has arrived."""
    ENDED = "Ended"
    """The pod ends after its last heartbeat."""
    ENDED_AFTER_NOTICE = "EndedAfterNotice"
    """The pod ends after its last heartbeat. It had a preemption notice."""
    ENDED_SUPERSEDED = "EndedSuperseded"
    """The pod ends after its last heartbeat. It was superseded."""
    ENDED_SUPERSEDED_AFTER_NOTICE = "EndedSupersededAfterNotice"
    """The pod ends after its last heartbeat. It was superseded and had a preemption notice."""


class Input(StrEnum):
    """Events that can change the state of the supervisor."""

    RANKS_STARTED = "RanksStarted"
    """All ranks of the attempt are started."""
    PREEMPTION_NOTICE = "PreemptionNotice"
    """SIGTERM or SIGINT, or an order to save for a pod that cannot be kept."""
    SAVE_REQUEST = "SaveRequest"
    """The coordinator requests a save because another pod has a preemption notice."""
    PEER_LOSS = "PeerLoss"
    """The coordinator reports that a peer is lost."""
    NEW_WORLD = "NewWorld"
    """The coordinator names the place of this pod in a newer attempt, or the address of rank 0 in this one."""
    NEWER_ATTEMPT = "NewerAttempt"
    """The coordinator reports a newer attempt that does not include this pod."""
    ENDED_HOLDABLE = "EndedHoldable"
    """All ranks have ended, and the first end allows the pod to start them again. Also a standby pod without ranks,
    once its first heartbeat has been tried."""
    ENDED_FINALLY = "EndedFinally"
    """All ranks have ended, and the first end is the end of the pod: done, or failed by itself."""
    HOLD_EXPIRED = "HoldExpired"
    """No coordinator has answered for as long as the pod may be held."""


TRANSITIONS: dict[tuple[State, Input], State] = {
    (State.STANDBY, Input.PREEMPTION_NOTICE): State.STOPPING,
    (State.STANDBY, Input.NEW_WORLD): State.RESTARTING,
    (State.STANDBY, Input.NEWER_ATTEMPT): State.SUPERSEDED,
    (State.STANDBY, Input.ENDED_HOLDABLE): State.WAITING,
    (State.JOINING, Input.PREEMPTION_NOTICE): State.STOPPING,
    # It is kept, as after the end of its ranks.
    (State.JOINING, Input.SAVE_REQUEST): State.SAVING,
    (State.JOINING, Input.PEER_LOSS): State.PEER_LOST,
    (State.JOINING, Input.NEW_WORLD): State.RESTARTING,
    (State.JOINING, Input.NEWER_ATTEMPT): State.SUPERSEDED,
    (State.JOINING, Input.ENDED_FINALLY): State.ENDED,
    (State.STARTING, Input.RANKS_STARTED): State.RUNNING,
    (State.STARTING, Input.PREEMPTION_NOTICE): State.STOPPING,
    (State.STARTING, Input.NEW_WORLD): State.RESTARTING,
    (State.STARTING, Input.NEWER_ATTEMPT): State.SUPERSEDED,
    (State.RUNNING, Input.PREEMPTION_NOTICE): State.STOPPING,
    (State.RUNNING, Input.SAVE_REQUEST): State.SAVING,
    (State.RUNNING, Input.PEER_LOSS): State.PEER_LOST,
    (State.RUNNING, Input.NEW_WORLD): State.RESTARTING,
    (State.RUNNING, Input.NEWER_ATTEMPT): State.SUPERSEDED,
    (State.RUNNING, Input.ENDED_HOLDABLE): State.WAITING,
    (State.RUNNING, Input.ENDED_FINALLY): State.ENDED,
    (State.SAVING, Input.PREEMPTION_NOTICE): State.STOPPING,
    (State.SAVING, Input.PEER_LOSS): State.PEER_LOST,
    (State.SAVING, Input.NEW_WORLD): State.RESTARTING,
    (State.SAVING, Input.NEWER_ATTEMPT): State.SUPERSEDED,
    (State.SAVING, Input.ENDED_HOLDABLE): State.WAITING,
    (State.SAVING, Input.ENDED_FINALLY): State.ENDED,
    (State.PEER_LOST, Input.PREEMPTION_NOTICE): State.STOPPING,
    # The ledger has found out that the lost pod had a preemption notice.
    (State.PEER_LOST, Input.SAVE_REQUEST): State.SAVING,
    (State.PEER_LOST, Input.NEW_WORLD): State.RESTARTING,
    (State.PEER_LOST, Input.NEWER_ATTEMPT): State.SUPERSEDED,
    (State.PEER_LOST, Input.ENDED_HOLDABLE): State.WAITING,
    (State.PEER_LOST, Input.ENDED_FINALLY): State.ENDED,
    (State.RESTARTING, Input.PREEMPTION_NOTICE): State.STOPPING,
    # Every heartbeat repeats the world; the newest one counts.
    (State.RESTARTING, Input.NEW_WORLD): State.RESTARTING,
    (State.RESTARTING, Input.NEWER_ATTEMPT): State.SUPERSEDED,
    (State.RESTARTING, Input.ENDED_HOLDABLE): State.STARTING,
    (State.RESTARTING, Input.ENDED_FINALLY): State.STARTING,
    (State.WAITING, Input.PREEMPTION_NOTICE): State.ENDED_AFTER_NOTICE,
    (State.WAITING, Input.NEW_WORLD): State.RESTARTING,
    (State.WAITING, Input.NEWER_ATTEMPT): State.ENDED_SUPERSEDED,
    (State.WAITING, Input.HOLD_EXPIRED): State.ENDED,
    #
    # After a notice the pod does not move to another world: a new world is a newer attempt without it.
    (State.STOPPING, Input.NEW_WORLD): State.SUPERSEDED_STOPPING,
    (State.STOPPING, Input.NEWER_ATTEMPT): State.SUPERSEDED_STOPPING,
    (State.STOPPING, Input.ENDED_HOLDABLE): State.ENDED_AFTER_NOTICE,
    (State.STOPPING, Input.ENDED_FINALLY): State.ENDED_AFTER_NOTICE,
    (State.SUPERSEDED, Input.PREEMPTION_NOTICE): State.SUPERSEDED_STOPPING,
    (State.SUPERSEDED, Input.PEER_LOSS): State.SUPERSEDED_PEER_LOST,
    (State.SUPERSEDED, Input.NEW_WORLD): State.SUPERSEDED_PEER_LOST,
    (State.SUPERSEDED, Input.ENDED_HOLDABLE): State.ENDED_SUPERSEDED,
    (State.SUPERSEDED, Input.ENDED_FINALLY): State.ENDED_SUPERSEDED,
    (State.SUPERSEDED_PEER_LOST, Input.PREEMPTION_NOTICE): State.SUPERSEDED_STOPPING,
    (State.SUPERSEDED_PEER_LOST, Input.ENDED_HOLDABLE): State.ENDED_SUPERSEDED,
    (State.SUPERSEDED_PEER_LOST, Input.ENDED_FINALLY): State.ENDED_SUPERSEDED,
    (State.SUPERSEDED_STOPPING, Input.ENDED_HOLDABLE): State.ENDED_SUPERSEDED_AFTER_NOTICE,
    (State.SUPERSEDED_STOPPING, Input.ENDED_FINALLY): State.ENDED_SUPERSEDED_AFTER_NOTICE,
    #
    # The answer to the last heartbeat can report a newer attempt.
    (State.ENDED, Input.NEWER_ATTEMPT): State.ENDED_SUPERSEDED,
    (State.ENDED_AFTER_NOTICE, Input.NEW_WORLD): State.ENDED_SUPERSEDED_AFTER_NOTICE,
    (State.ENDED_AFTER_NOTICE, Input.NEWER_ATTEMPT): State.ENDED_SUPERSEDED_AFTER_NOTICE,
}
"""The next state for each state and input. A pair that is not listed changes nothing."""

FINAL = frozenset(
    {State.ENDED, State.ENDED_AFTER_NOTICE, State.ENDED_SUPERSEDED, State.ENDED_SUPERSEDED_AFTER_NOTICE},
)
"""States in which no rank runs and none will be started."""
WITH_NOTICE = frozenset(
    {
        State.STOPPING,
        State.SUPERSEDED_STOPPING,
        State.ENDED_AFTER_NOTICE,
        State.ENDED_SUPERSEDED_AFTER_NOTICE,
    }
)
"""States after a preemption notice."""
REPORTED_AT_ONCE = FINAL | {State.RUNNING, State.WAITING, State.STOPPING, State.SUPERSEDED_STOPPING}
"""States whose entry is sent to the coordinator at once; the others appear in the next regular heartbeat."""
FINAL_SUPERSEDED = frozenset({State.ENDED_SUPERSEDED, State.ENDED_SUPERSEDED_AFTER_NOTICE})
"""States in which the pod ends with exit code SUPERSEDED."""


def inputs_of(reply: Reply, attempt: int, master_addr: str, *, can_be_held: bool) -> tuple[Input, ...]:
    """Return the inputs that a reply of the coordinator holds, the most important first.

    The supervisor takes the first one that the table lists for its state.

    Args:
        reply: the answer to a heartbeat.
        attempt: the supervisor's attempt.
        master_addr: address of rank 0 that it uses; empty: it knows none.
        can_be_held: whether the pod can wait for a new world after its ranks have ended.
    """
    inputs = []
    world = reply.world
    has_moved = world is not None and world.attempt == attempt and world.master_addr != master_addr
    if world is not None and (world.attempt > attempt or has_moved):
        inputs.append(Input.NEW_WORLD)
    elif reply.attempt is not None and reply.attempt > attempt:
        inputs.append(Input.NEWER_ATTEMPT)
    if reply.order is Order.SAVE_AND_STOP:
        inputs.append(Input.SAVE_REQUEST if can_be_held else Input.PREEMPTION_NOTICE)
    elif reply.peer_lost and can_be_held:
        inputs.append(Input.PEER_LOSS)
    return tuple(inputs)
