"""A PodDisruptionBudget while the gang runs: autoscalers and deschedulers do not evict its pods to move them.

It must not keep an administrator from draining a node. `kubectl drain` cordons the node first; then the budget is
deleted, the repeated eviction succeeds, and it is the notice by which all ranks save.
"""

from __future__ import annotations

from finetune_operator.api.status import FineTuneJobStatus
from finetune_operator.manifests.disruption_budget import API_VERSION, KIND, budget_name, build_disruption_budget
from finetune_operator.plan.model.ledger import open_attempt
from finetune_operator.plan.model.policy import Policy
from finetune_operator.plan.model.types import HEALTHY, Action, Create, DeleteChild
from finetune_operator.plan.model.view import View, has_ended


def act(view: View, status: FineTuneJobStatus) -> tuple[Action, ...]:
    """Return the creation of the budget if it is missing, and the deletion of those that are not wanted."""
    if API_VERSION not in view.observed.optional_apis:
        return ()
    wanted = budget_name(view.job.metadata.name, view.attempt) if _protects(view, status) else ""
    budgets = [child for child in view.observed.children if child.kind == KIND]
    deletions = tuple(DeleteChild(budget) for budget in budgets if budget.name != wanted)
    if not wanted or any(budget.name == wanted for budget in budgets):
        return deletions
    return (*deletions, Create(build_disruption_budget(view.job, view.attempt, view.num_nodes)))


def _protects(view: View, status: FineTuneJobStatus) -> bool:
    """Return whether the gang runs, and no node of it is about to leave."""
    if not view.settings.disruption_budgets or view.spec.suspend:
        return False
    if open_attempt(view, status) is None or status.attempt != view.attempt or not view.all_up():
        return False
    for pod in view.pods.values():
        node = view.observed.nodes.get(pod.node or "", HEALTHY)
        if has_ended(pod) or pod.deleted_at is not None or pod.disruption is not None or node.cordoned:
            return False
    return True


POLICY = Policy("disruption-budget", act=act)
