"""The registry: every policy, once, in the order of decision. `core.plan` reads it at each call.

Each policy reads what the policies before it wrote. Actions are carried out in the same order. The order of wake
times does not matter: the earliest one counts.
"""

from __future__ import annotations

from finetune_operator.plan.model.policy import Policy
from finetune_operator.plan.policies import (
    acceptance,
    attempts,
    budget,
    cleanup,
    deadline,
    edits,
    endings,
    exports,
    finish,
    gang,
    hangs,
    in_place,
    nodes,
    reclassify,
    retry,
    stragglers,
    suspend,
    ttl,
)
from finetune_operator.plan.policies.capacity import (
    disruption,
    elastic,
    evictions,
    gates,
    groups,
    incomplete,
    memory,
    quota,
    regroup,
    spot,
    standby,
)
from finetune_operator.plan.policies.queue import eviction, report, request
from finetune_operator.plan.report import conditions, goodput, phase, progress, slow_ranks, timing

POLICIES: tuple[Policy, ...] = (
    acceptance.POLICY,  # Is the spec valid and supported?
    retry.POLICY,  # Does the user continue a job that has Failed?
    suspend.RESUME,  # How long was the job suspended?
    progress.POLICY,  # Which step, figures and checkpoints do the ranks report?
    gang.POLICY,  # Has every pod of the attempt been observed? Creates the missing ones.
    finish.POLICY,  # Has every node finished?
    exports.POLICY,  # Which outputs does the export pod write, and is it done?
    deadline.POLICY,  # Has the job exceeded its deadline?
    suspend.STOP,  # Does the user suspend the job?
    eviction.POLICY,  # Has the queue withdrawn its admission?
    hangs.DETECT,  # Has the gang made no progress for too long?
    stragglers.POLICY,  # Is the attempt waiting for a silent pod only?
    endings.POLICY,  # Has the attempt ended, and why?
    elastic.POLICY,  # Should the job continue on fewer nodes?
    spot.POLICY,  # Should the job accept nodes other than spot?
    edits.APPLY,  # Was the spec edited while pods wait?
    edits.TARGET,  # Were the steps, epochs or outputs edited?
    incomplete.POLICY,  # Has a part of the gang held nodes for too long?
    quota.POLICY,  # Has the cluster refused a part of the gang for too long?
    regroup.POLICY,  # Is better capacity ready?
    reclassify.POLICY,  # Was the node of a lost peer lost?
    memory.POLICY,  # Did a pod exceed its memory, and may it have more?
    budget.POLICY,  # Has the job spent its failures?
    attempts.BEGIN,  # May the next attempt begin?
    attempts.CATCH_UP,  # Do pods belong to attempts that the status does not contain?
    timing.POLICY,  # How long did each stage of the start take?
    phase.POLICY,  # Phase, reason and message.
    hangs.TRACK,  # When was the last progress?
    conditions.POLICY,  # Conditions that follow from the phase.
    conditions.NOTICE,  # Is the preemption notice long enough for a save?
    slow_ranks.POLICY,  # Does a rank need longer than its peers?
    edits.REPORT,  # Do the pods contain the newest edit of the spec?
    goodput.POLICY,  # Which share of the time trained steps that were kept?
    in_place.POLICY,  # When does a pod that is kept become too silent to keep?
    cleanup.POLICY,  # Deletes the pods of attempts that have ended.
    gates.POLICY,  # Lets the scheduler see the pods when all of them exist.
    disruption.POLICY,  # Protects a running gang from evictions.
    evictions.POLICY,  # Reports the progress of eviction requests.
    groups.POLICY,  # Deletes the PodGroups of earlier attempts.
    standby.POLICY,  # Deletes standby pods that are no longer wanted.
    request.POLICY,  # Requests the admission of the pods, and releases the quota.
    report.POLICY,  # Reports to the queue whether the pods are ready, and the cost of an eviction.
    ttl.POLICY,  # Deletes the job when its TTL expires.
    nodes.POLICY,  # Force-deletes pods of nodes that cannot delete them.
)
