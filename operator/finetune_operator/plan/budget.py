"""Whether a failed attempt is the job's last: preemptions spend nothing, and a newer checkpoint restores the budget."""

from __future__ import annotations

from finetune_operator.api.job import FineTuneJobStatus
from finetune_operator.api.words import CountsAs, Reason
from finetune_operator.plan.explain import explain_end, is_final
from finetune_operator.plan.finish import fail
from finetune_operator.plan.ledger import current
from finetune_operator.plan.view import View, is_finished


def judge(view: View, status: FineTuneJobStatus) -> FineTuneJobStatus:
    """Fail the job where trying again cannot help, or has not helped often enough."""
    entry = current(status)
    if entry is None or entry.reason is None or entry.counts_as != CountsAs.FAILURE or is_finished(status):
        return status
    if is_final(entry.reason):
        return fail(view, status, entry.reason, explain_end(entry))
    allowed = view.spec.recovery.max_failures
    if status.tally.failures_since_checkpoint <= allowed:
        return status
    since = f"since the checkpoint of step {status.last_checkpoint.step}" if status.last_checkpoint else "in all"
    num_failures = status.tally.failures_since_checkpoint
    sentence = f"{num_failures} failures {since}, {allowed} allowed; the last: {explain_end(entry)}"
    return fail(view, status, Reason.MAX_FAILURES_EXCEEDED, sentence)
