"""Decides whether a failed attempt was the last. Preemptions spend nothing; a newer checkpoint restores the budget.

A job that fails repeatedly after the same step ends early: the step itself is at fault.
"""

from __future__ import annotations

from finetune_operator.api.reasons import CountsAs, Reason
from finetune_operator.api.status import FineTuneJobStatus
from finetune_operator.plan.model.explain import count, explain_end, is_final
from finetune_operator.plan.model.ledger import current
from finetune_operator.plan.model.policy import Policy
from finetune_operator.plan.model.view import View, is_finished
from finetune_operator.plan.policies import reclassify
from finetune_operator.plan.policies.finish import fail
from finetune_operator.plan.policies.retry import how_to_continue


def is_undecided(view: View, status: FineTuneJobStatus) -> bool:
    """Return whether a failure would be the job's last, but may still turn out to be a preemption.

    No attempt begins before that is decided.
    """
    entry = current(status)
    if entry is None or not reclassify.may_be_preemption(view, entry):
        return False
    tally = status.tally
    at_step = tally.failed_step is not None and tally.failures_at_step >= view.settings.same_step_failures
    return at_step or tally.failures_since_checkpoint > view.spec.recovery.max_failures


def enforce(view: View, status: FineTuneJobStatus) -> FineTuneJobStatus:
    """Fail the job if another attempt cannot help, or too many have failed already."""
    entry = current(status)
    if entry is None or entry.reason is None or entry.counts_as != CountsAs.FAILURE or is_finished(status):
        return status
    if is_undecided(view, status) or entry.attempt == status.tally.retried_attempt:
        return status
    if is_final(entry.reason):
        return _fail(view, status, entry.reason, explain_end(entry))
    tally = status.tally
    if tally.failures_at_step >= view.settings.same_step_failures and tally.failed_step is not None:
        repeated = f"{tally.failures_at_step} failures in a row after step {tally.failed_step}"
        return _fail(view, status, Reason.SAME_STEP_FAILURES, f"{repeated}. Last: {explain_end(entry)}")
    allowed = view.spec.recovery.max_failures
    if tally.failures_since_checkpoint <= allowed:
        return status
    since = f"since the checkpoint of step {status.last_checkpoint.step}" if status.last_checkpoint else "in total"
    failures = count(tally.failures_since_checkpoint, "failure")
    message = f"{failures} {since}, {allowed} allowed. Last: {explain_end(entry)}"
    return _fail(view, status, Reason.MAX_FAILURES_EXCEEDED, message)


def _fail(view: View, status: FineTuneJobStatus, reason: str, message: str) -> FineTuneJobStatus:
    return fail(view, status, reason, f"{message} {how_to_continue(status)}")


POLICY = Policy("budget", decide=enforce)
