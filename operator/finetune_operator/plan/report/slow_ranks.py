"""Ranks that need longer than their peers for the same work: in the status, as a condition and as a metric.

All ranks finish a step together, so its time says nothing about one of them. A slow rank is the one that waits least:
the share of a step that it computes itself is larger than that of the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from statistics import median_low

from finetune_contract.heartbeat import RankReport, RankState
from finetune_operator.api.conditions import ConditionType
from finetune_operator.api.reasons import Reason
from finetune_operator.api.status import FineTuneJobStatus, SlowRank
from finetune_operator.plan.model.conditions import build, find, put
from finetune_operator.plan.model.ledger import open_attempt
from finetune_operator.plan.model.policy import Policy
from finetune_operator.plan.model.revise import revise
from finetune_operator.plan.model.view import View

FACTOR = 1.5
"""Factor over the time of the other ranks from which a rank is slow."""
MIN_SHARE = 0.3
"""Least share of a step that a slow rank computes: below it, all ranks mainly wait for the network."""
LASTING = timedelta(seconds=60)
"""Time after which a slow rank is reported. Its figures are means over 20 steps."""
MAX_NAMED = 8
"""Ranks that the status names: the slowest."""


def find_slow(reports: Sequence[RankReport]) -> list[tuple[int, float]]:
    """Return the slow ranks and how many times longer than the others they need, slowest first. Pure."""
    own: dict[int, float] = {}
    for report in reports:
        shares = report.performance.shares if report.performance is not None else None
        if report.state is RankState.TRAINING and shares is not None:
            own[report.rank] = shares.compute + shares.host + shares.data
    found = []
    for rank, share in own.items():
        others = [each for other, each in own.items() if other != rank]
        if others and share >= MIN_SHARE and share >= FACTOR * median_low(others):
            found.append((rank, share / max(median_low(others), 0.01)))
    return sorted(found, key=lambda each: (-each[1], each[0]))[:MAX_NAMED]


def report_slow(view: View, status: FineTuneJobStatus) -> FineTuneJobStatus:
    """Write the slow ranks, and the condition once they stay slow. Without new figures the last ones remain."""
    if open_attempt(view, status) is None:
        return _write(view, status, ())
    if not any(report.performance is not None for report in view.reports):
        return status
    known = {each.rank: each for each in status.slow_ranks}
    slow = tuple(
        # The first figures remain: they change with every heartbeat.
        known.get(rank) or SlowRank(rank=rank, node=_node_of(view, rank), factor=round(factor, 1), since=view.now)
        for rank, factor in find_slow(view.reports)
    )
    return _write(view, status, tuple(sorted(slow, key=lambda each: each.rank)))


def lasting(status: FineTuneJobStatus, view: View) -> tuple[SlowRank, ...]:
    """Return the ranks that have been slow for long enough to report them."""
    return tuple(each for each in status.slow_ranks if view.now - each.since >= LASTING)


def _write(view: View, status: FineTuneJobStatus, slow: tuple[SlowRank, ...]) -> FineTuneJobStatus:
    if slow != status.slow_ranks:
        status = revise(status, slow_ranks=slow)
    reported, old = lasting(status, view), find(status, ConditionType.SLOW_RANKS)
    if not reported and (old is None or old.status == "False"):
        return status
    message = "; ".join(_describe(each) for each in reported) or "all ranks need about the same time for their work"
    reason = Reason.SLOWER_THAN_PEERS if reported else Reason.AS_FAST_AS_PEERS
    return put(status, build(view, ConditionType.SLOW_RANKS, bool(reported), reason.value, message))


def _describe(slow: SlowRank) -> str:
    where = f" on {slow.node}" if slow.node else ""
    return f"rank {slow.rank}{where} needs {slow.factor:g} times as long as its peers since {slow.since:%H:%M:%S} UTC"


def _node_of(view: View, rank: int) -> str | None:
    pod = view.pods.get(rank // view.spec.topology.processes_per_node)
    return pod.node if pod is not None else None


POLICY = Policy("slow-ranks", decide=report_slow)
