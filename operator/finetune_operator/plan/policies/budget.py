"""Whether a failed attempt is the job's last: preemptions spend nothing, and a newer checkpoint restores the budget.

One that fails over and over after the very same step ends early: the step itself is at fault.
"""

from __future__ import annotations

from finetune_operator.api.job import FineTuneJobStatus
from finetune_operator.api.reasons import CountsAs, Reason
from finetune_operator.plan.model.ledger import current
from finetune_operator.plan.model.view import View, is_finished
from finetune_operator.plan.policies import reclassify
from finetune_operator.plan.policies.finish import fail
from finetune_operator.plan.report.explain import explain_end, is_final


def is_waiting(view: View, status: FineTuneJobStatus) -> bool:
    """Whether a failure would be the job's last, and may still turn out to be none: nothing begins before that."""
    entry = current(status)
    if entry is None or not reclassify.may_turn_out(view, entry):
        return False
    tally = status.tally
    at_step = tally.failed_step is not None and tally.failures_at_step >= view.settings.same_step_failures
    return at_step or tally.failures_since_checkpoint > view.spec.recovery.max_failures


def judge(view: View, status: FineTuneJobStatus) -> FineTuneJobStatus:
    """Fail the job where trying again cannot help, or has not helped often enough."""
    entry = current(status)
    if entry is None or entry.reason is None or entry.counts_as != CountsAs.FAILURE or is_finished(status):
        return status
    if is_waiting(view, status):
        return status
    if is_final(entry.reason):
        return fail(view, status, entry.reason, explain_end(entry))
    tally = status.tally
    if tally.failures_at_step >= view.settings.same_step_failures and tally.failed_step is not None:
        sentence = f"{tally.failures_at_step} failures in a row after step {tally.failed_step}; {explain_end(entry)}"
        return fail(view, status, Reason.SAME_STEP_FAILURES, sentence)
    allowed = view.spec.recovery.max_failures
    if tally.failures_since_checkpoint <= allowed:
        return status
    since = f"since the checkpoint of step {status.last_checkpoint.step}" if status.last_checkpoint else "in all"
    num_failures = tally.failures_since_checkpoint
    sentence = f"{num_failures} failures {since}, {allowed} allowed; the last: {explain_end(entry)}"
    return fail(view, status, Reason.MAX_FAILURES_EXCEEDED, sentence)
