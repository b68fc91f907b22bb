"""The live view in a terminal: event lines scroll above, the current state of the job is shown below."""

from __future__ import annotations

from datetime import datetime

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from finetune_contract.heartbeat import RankReport, RankState
from finetune_contract.phase import Phase
from finetune_operator.api.job import FineTuneJob
from finetune_operator.api.status import FineTuneJobStatus
from finetune_operator.cli.output import changes, formatting
from finetune_operator.cli.output.formatting import pluralize
from finetune_operator.cluster.protocol import Clock
from finetune_operator.cluster.reconcile import ReconcileResult
from finetune_operator.plan.model.types import Observed, ObservedPod
from finetune_operator.plan.model.view import members_of

REFRESH_PER_SECOND = 4
STYLES = {
    Phase.PENDING: "yellow",
    Phase.QUEUED: "yellow",
    Phase.STARTING: "cyan",
    Phase.RUNNING: "green",
    Phase.RECOVERING: "yellow",
    Phase.EXPORTING: "cyan",
    Phase.SUCCEEDED: "bold green",
    Phase.FAILED: "bold red",
    Phase.SUSPENDED: "blue",
}
RANK_STYLES = {RankState.TRAINING: "green", RankState.FAILED: "red", RankState.SAVING: "magenta"}
MAX_RANKS = 16
"""Number of ranks in the table. The last row counts the others."""


class LiveView:
    """Draws on a terminal. Used as a context manager."""

    def __init__(self, start: FineTuneJobStatus, now: Clock, console: Console | None = None) -> None:
        self._status = start
        self._now = now
        self._result: ReconcileResult | None = None
        self._console = console or Console(highlight=False)
        self._live = Live(
            console=self._console,
            get_renderable=self._draw,
            refresh_per_second=REFRESH_PER_SECOND,
            # The last frame would only repeat the summary.
            transient=True,
        )

    def __enter__(self) -> LiveView:
        self._live.start()
        return self

    def __exit__(self, *raised: object) -> None:
        self._live.stop()

    def on_reconcile(self, result: ReconcileResult) -> None:
        """Store the result of a reconcile for the next refresh, and print what changed."""
        self._result = result
        if result.job is None:
            return
        old, self._status = self._status, result.job.status
        for line in changes.describe_changes(old, self._status):
            self.print_line(line)

    def print_line(self, line: str) -> None:
        """Print a line above the live display."""
        self._console.print(Text(f"{self._now().astimezone():%H:%M:%S}  {line}"))

    def warn(self, message: str) -> None:
        """Print a warning above the live display."""
        self._console.print(Text(f"warning: {message}", style="yellow"))

    def _draw(self) -> RenderableType:
        if self._result is None or self._result.job is None:
            return Text("")
        return render_status(self._result.job, self._result.observed, self._now())


def render_status(job: FineTuneJob, observed: Observed, now: datetime) -> RenderableType:
    """Return the current state of the job as a renderable."""
    reports = {
        report.rank: report
        for received in observed.beats.values()
        if received.beat.attempt == job.status.attempt
        for report in received.beat.ranks
    }
    return Group(
        Text(""), _phase(job), _bar(job.status), _figures(job.status, now), Text(""), _ranks(job, observed, reports)
    )


def _phase(job: FineTuneJob) -> Text:
    status = job.status
    phase = status.phase or Phase.PENDING
    line = Text.assemble((job.metadata.name, "bold"), "  ", (phase.value, STYLES[phase]))
    if status.attempt > 1:
        line.append(f"  attempt {status.attempt}", style="dim")
    if status.message and phase is not Phase.RUNNING:
        line.append(f"  {status.message}", style="dim")
    line.truncate(200, overflow="ellipsis")
    return line


def _bar(status: FineTuneJobStatus) -> RenderableType:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(width=40)
    grid.add_column()
    total = status.total_steps or 1
    bar = ProgressBar(total=total, completed=status.step or 0, width=40)
    label = Text(f"{formatting.format_steps(status) or '-'}  {status.progress or ''}")
    if status.eta and status.phase is Phase.RUNNING:
        label.append(f"  {status.eta} left")
    grid.add_row(bar, label)
    return grid


def _figures(status: FineTuneJobStatus, now: datetime) -> Text:
    parts = []
    if status.loss is not None:
        parts.append(f"loss {formatting.format_loss(status.loss)}")
    if status.images_per_second is not None:
        parts.append(formatting.format_rate(status.images_per_second))
    if (checkpoint := status.last_checkpoint) is not None:
        parts.append(f"checkpoint of step {checkpoint.step}, {formatting.format_age(checkpoint.time, now)} old")
    if num_restarts := status.preemptions + status.failures:
        causes = f"{pluralize(status.preemptions, 'preemption')}, {pluralize(status.failures, 'failure')}"
        parts.append(f"{pluralize(num_restarts, 'restart')} ({causes})")
        parts.append(f"{pluralize(status.lost_steps, 'step')} lost")
    return Text("   ".join(parts))


def _ranks(job: FineTuneJob, observed: Observed, reports: dict[int, RankReport]) -> Table:
    """Return a table with one row per rank of the newest attempt that has a pod."""
    table = Table(box=None, pad_edge=False, padding=(0, 2), header_style="dim")
    for column in ("RANK", "NODE", "STATE", "STEP", ""):
        table.add_column(column, no_wrap=True, overflow="ellipsis")
    per_pod = job.spec.topology.processes_per_node
    seen = {(pod.attempt, pod.node_rank): pod for pod in observed.pods}
    members = enumerate(members_of(job.status, job.spec))
    pods = [(node_rank, seen[member]) for node_rank, member in members if member in seen]
    rows = [(rank, pod) for first, pod in pods for rank in range(first * per_pod, (first + 1) * per_pod)]
    for rank, pod in rows[:MAX_RANKS]:
        table.add_row(*_rank_row(rank, pod, reports.get(rank)))
    if len(rows) > MAX_RANKS:
        table.add_row("...", "", f"and {len(rows) - MAX_RANKS} more", "", "")
    return table


def _rank_row(rank: int, pod: ObservedPod, report: RankReport | None) -> tuple[str, str, Text, str, str]:
    if report is None:
        return str(rank), pod.node or "", Text(pod.waiting or pod.phase.value, style="dim"), "", ""
    state = Text(report.state.value, style=RANK_STYLES.get(report.state, ""))
    if pod.deleted_at is not None:
        state.append(" (stopping)", style="yellow")
    step = "" if report.step is None else str(report.step)
    return str(rank), pod.node or "", state, step, report.detail or ""
