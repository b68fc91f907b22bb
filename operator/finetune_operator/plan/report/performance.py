"""Speed, memory and bottleneck of a job, from the measurements of its ranks."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from finetune_contract.heartbeat import NOT_FORKED, Performance, RankReport, RankState, StepShares
from finetune_operator.api.job import FineTuneJobSpec
from finetune_operator.api.status import FineTuneJobStatus, PerformanceStatus, TimeShares
from finetune_operator.plan.model.revise import revise
from finetune_operator.plan.model.view import View
from finetune_operator.plan.report.advice import advise, bottleneck

MEBIBYTE = 2**20
MAX_ADVICE = 6
STEPS = frozenset({RankState.TRAINING, RankState.SAVING, RankState.VALIDATING})


def update(view: View, status: FineTuneJobStatus) -> FineTuneJobStatus:
    """Write the figures of the ranks that train. Without a measurement the last ones remain."""
    measured = combine(view.reports)
    if measured is None:
        return status
    return revise(status, performance=describe(view.spec, measured, _restart_advice(view.reports)))


def _restart_advice(reports: Sequence[RankReport]) -> tuple[str, ...]:
    """Return why a restart takes longer than it has to: a rank that could not be forked says it in a warning."""
    found = (warning for report in reports for warning in report.warnings if warning.startswith(NOT_FORKED))
    return tuple(f"restart-bound: {warning}" for warning in found)[:1]


def combine(reports: Sequence[RankReport]) -> Performance | None:
    """Return the figures of all ranks together; None if none has measured.

    A step takes the same time on all ranks, so their shares are averaged. A job fails if one rank has no memory left,
    so the memory is that of the rank with the most.
    """
    ranks = [report.performance for report in reports if report.state in STEPS and report.performance is not None]
    shares = [rank.shares for rank in ranks if rank.shares is not None]
    if not shares:
        return None
    busy = [rank.utilization for rank in ranks if rank.utilization is not None]
    fullest = max(ranks, key=lambda rank: rank.memory_allocated_bytes or 0)
    counted = next((rank for rank in ranks if rank.flops_per_second is not None), None)
    return Performance(
        share_of_peak=counted.share_of_peak if counted else None,
        flops_per_second=counted.flops_per_second if counted else None,
        utilization=fmean(busy) if busy else None,
        memory_allocated_bytes=fullest.memory_allocated_bytes,
        memory_reserved_bytes=fullest.memory_reserved_bytes,
        memory_total_bytes=fullest.memory_total_bytes,
        shares=StepShares(
            **{name: min(1.0, fmean(getattr(each, name) for each in shares)) for name in StepShares.model_fields}
        ),
        settings=next((rank.settings for rank in ranks if rank.settings is not None), None),
    )


def describe(spec: FineTuneJobSpec, measured: Performance, more_advice: Sequence[str] = ()) -> PerformanceStatus:
    """Return the figures for the status, rounded.

    Args:
        spec: the job's spec.
        measured: the figures of all ranks together.
        more_advice: what would make restarts faster.
    """
    shares = measured.shares or StepShares(compute=1.0)
    speed = measured.flops_per_second
    return PerformanceStatus(
        share_of_peak=_rounded(measured.share_of_peak),
        teraflops=None if speed is None else float(f"{speed / 1e12:.3g}"),
        utilization=_rounded(measured.utilization),
        memory_allocated_bytes=_mebibytes(measured.memory_allocated_bytes),
        memory_reserved_bytes=_mebibytes(measured.memory_reserved_bytes),
        memory_total_bytes=measured.memory_total_bytes,
        time_shares=TimeShares(**{name: round(value, 2) for name, value in shares}),
        bound_by=bottleneck(shares),
        advice=(*(advice.text for advice in advise(spec, measured)[: MAX_ADVICE - len(more_advice)]), *more_advice),
    )


def _rounded(share: float | None) -> float | None:
    return None if share is None else round(share, 3)


def _mebibytes(number: int | None) -> int | None:
    """Return a number of bytes rounded to MiB."""
    return None if number is None else round(number / MEBIBYTE) * MEBIBYTE
