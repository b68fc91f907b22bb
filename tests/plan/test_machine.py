"""Random histories of a job: the plan against a cluster whose pods appear late, fail and are preempted.

The operator restarts before every reconcile, in effect: `plan` keeps no state, so only the status survives.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from finetune_contract.exit_codes import ExitCode
from finetune_contract.heartbeat import CommittedCheckpoint, RankEnd
from finetune_contract.phase import FINISHED, Phase
from finetune_operator.api.conditions import ConditionType
from finetune_operator.api.reasons import Reason
from finetune_operator.api.status import FineTuneJobStatus
from finetune_operator.plan import plan
from finetune_operator.plan.model.conditions import is_true
from finetune_operator.plan.model.types import Create, DeletePod, ObservedPod, Plan, PodPhase
from tests.plan.fake_cluster import SETTINGS, FakeCluster, RankState, last_words, make_job, seconds

DAY_SECONDS = 86400.0
RANKS = st.integers(0, 2)
FAILURES = st.sampled_from([1, 70, ExitCode.STORAGE, ExitCode.FABRIC, 137])
DISRUPTIONS = st.sampled_from(["TerminationByKubelet", "DeletionByTaintManager", "EvictionByEvictionAPI", "New"])


class JobMachine(RuleBasedStateMachine):
    """One job of three nodes, random faults, and the invariants after every reconcile."""

    def __init__(self) -> None:
        super().__init__()
        self.cluster = FakeCluster()
        self.num_injected_failures = 0
        self.checkpoint = 0
        self.step = 0
        self.restored_steps: dict[int, int] = {}

    @initialize(max_failures=st.integers(0, 3), deadline=st.sampled_from([None, 3000]))
    def create_job(self, max_failures: int, deadline: int | None) -> None:
        self.cluster = FakeCluster(
            make_job(
                topology={"accelerator": "cpu", "nodes": 3},
                recovery={"maxFailures": max_failures, "noticeSeconds": 60},
                **({"activeDeadlineSeconds": deadline} if deadline else {}),
            ),
            settings=replace(SETTINGS, max_attempts_kept=3),
        )

    # reconciles

    @rule(carried_out=st.floats(0, 1))
    def reconcile(self, carried_out: float) -> None:
        """Reconcile once; the operator may be killed after some of its actions."""
        cluster = self.cluster
        decided = cluster.decide()
        self.check(decided)
        cluster.job = cluster.job.model_copy(update={"status": decided.status})
        cluster.events += decided.events
        for action in decided.actions[: round(carried_out * len(decided.actions))]:
            cluster.apply(action)

    @rule()
    def reconcile_with_write_conflict(self) -> None:
        self.check(self.cluster.decide())

    @rule()
    def reconcile_until_settled(self) -> None:
        # Pods that the list does not show are created again.
        self.cluster.hidden.clear()
        for _ in range(20):
            decided = self.cluster.decide()
            self.check(decided)
            self.cluster.step()
            if not decided.actions and decided.status == self.cluster.decide().status:
                return
        raise AssertionError("reconciles without time or changes do not settle")

    # the cluster

    @rule(number=st.sampled_from([0.1, 1.0, 3.0, 11.0, 61.0, 301.0]))
    def advance_time(self, number: float) -> None:
        self.cluster.tick(number)

    @rule(node_rank=RANKS)
    def start_pod(self, node_rank: int) -> None:
        pod = self.pod_of(node_rank)
        if pod is not None and pod.phase is PodPhase.PENDING:
            self.cluster.change(node_rank, phase=PodPhase.RUNNING, node=f"node-{node_rank}")

    @rule()
    def start_all_pods(self) -> None:
        self.cluster.run_all()

    @rule(node_rank=RANKS)
    def hide_pod(self, node_rank: int) -> None:
        entry = self.status.attempts[-1] if self.status.attempts else None
        pod = self.pod_of(node_rank)
        # A pod that was observed once does not disappear from the list.
        if pod is not None and entry is not None and not entry.gang_complete and pod.phase is PodPhase.PENDING:
            self.cluster.hidden.add(pod.uid)

    @rule()
    def show_all_pods(self) -> None:
        self.cluster.hidden.clear()

    @rule(num_steps=st.integers(1, 30), save=st.booleans())
    def train(self, num_steps: int, save: bool) -> None:
        pods = self.gang()
        if len(pods) < 3 or any(pod.phase is not PodPhase.RUNNING for pod in pods):
            return
        attempt = self.status.attempt
        if attempt not in self.restored_steps:
            self.restored_steps[attempt] = self.step = self.checkpoint
        self.step = min(100, self.step + num_steps)
        committed = None
        if save:
            self.checkpoint = self.step
            committed = CommittedCheckpoint(step=self.step, time=0, size_bytes=1, attempt=attempt)
        for pod in pods:
            restored = self.restored_steps[attempt]
            self.cluster.beat(pod.node_rank, step=self.step, restored_step=restored, checkpoint=committed)

    @rule(node_rank=RANKS, state=st.sampled_from(RankState))
    def report_state(self, node_rank: int, state: RankState) -> None:
        pod = self.pod_of(node_rank)
        if pod is not None and pod.phase is PodPhase.RUNNING and state is not RankState.DONE:
            self.cluster.beat(node_rank, state, warnings=(f"{state} on rank {node_rank}",))

    @rule()
    def lose_heartbeats(self) -> None:
        self.cluster.beats.clear()

    @rule(node_rank=RANKS)
    def lose_node_of_pod(self, node_rank: int) -> None:
        if (pod := self.pod_of(node_rank)) is not None:
            self.cluster.vanish(pod.name)

    @rule(node_rank=RANKS, disruption=st.one_of(st.none(), DISRUPTIONS))
    def preempt_pod(self, node_rank: int, disruption: str | None) -> None:
        if (pod := self.pod_of(node_rank)) is not None:
            self.cluster.change(node_rank, disruption=disruption)
            self.cluster.delete(pod.name, pod.uid, None)

    @rule(node_rank=RANKS)
    def notify_supervisor(self, node_rank: int) -> None:
        pod = self.pod_of(node_rank)
        if pod is not None and pod.phase is PodPhase.RUNNING:
            self.cluster.beat(node_rank, RankState.SAVING, notice=True)

    @rule()
    def save_and_exit(self) -> None:
        if any(pod.deleted_at is not None for pod in self.gang()):
            for pod in self.gang():
                if pod.phase is PodPhase.RUNNING:
                    self.cluster.exit(pod.node_rank, ExitCode.SAVED)

    @rule(node_rank=RANKS, code=FAILURES, in_heartbeat=st.booleans())
    def fail_rank(self, node_rank: int, code: int, in_heartbeat: bool) -> None:
        pod = self.pod_of(node_rank)
        if pod is None or pod.phase is not PodPhase.RUNNING:
            return
        self.num_injected_failures += 1
        if in_heartbeat:
            self.cluster.beat(node_rank, ends=(RankEnd(rank=node_rank, exit_code=code, last_words="bad"),))
        else:
            self.cluster.exit(node_rank, code, termination=last_words(pod.attempt, code, "bad", rank=node_rank))

    @rule(value=st.booleans())
    def suspend(self, value: bool) -> None:
        spec = self.cluster.job.spec.model_copy(update={"suspend": value})
        self.cluster.job = self.cluster.job.model_copy(update={"spec": spec})

    @precondition(lambda self: self.step >= 100)
    @rule(node_rank=RANKS)
    def finish_pod(self, node_rank: int) -> None:
        pod = self.pod_of(node_rank)
        if pod is not None and pod.phase is PodPhase.RUNNING and self.status.attempt in self.restored_steps:
            self.cluster.exit(node_rank, 0)

    # invariants

    def check(self, decided: Plan) -> None:
        cluster, before, after = self.cluster, self.status, decided.status
        self.check_fence(before, decided)
        self.check_deletions(decided)
        self.check_counts(before, after)
        if before.phase in FINISHED:
            assert after.phase is before.phase
        assert after.phase is not None
        assert after.reason is not None
        # Another reconcile without any change decides the same.
        job = cluster.job.model_copy(update={"status": after})
        again = plan(job, cluster.observed(), cluster.now, cluster.settings)
        assert differences(after, again.status) == {}
        assert again.events == ()
        self.check_idle(job, again)

    def check_fence(self, before: FineTuneJobStatus, decided: Plan) -> None:
        after = decided.status
        assert after.attempt >= before.attempt
        created = [a.manifest for a in decided.actions if isinstance(a, Create) and a.manifest["kind"] == "Pod"]
        names = {manifest["metadata"]["name"] for manifest in created}
        observed = {pod.name for pod in self.cluster.observed().pods}
        if created:
            assert after.attempt == before.attempt
            assert all(name.startswith(f"circles-a{before.attempt}-") for name in names | observed)
            assert len(names | observed) <= 3

    def check_deletions(self, decided: Plan) -> None:
        entry = decided.status.attempts[-1] if decided.status.attempts else None
        is_open = entry is not None and entry.ended_at is None
        for action in decided.actions:
            if isinstance(action, DeletePod):
                pod = self.cluster.pods[action.name]
                assert pod.uid == action.uid
                assert pod.attempt < decided.status.attempt or not is_open

    def check_counts(self, before: FineTuneJobStatus, after: FineTuneJobStatus) -> None:
        assert after.preemptions >= before.preemptions
        assert after.failures >= before.failures
        assert after.failures <= self.num_injected_failures
        assert after.preemptions + after.failures <= after.attempt
        assert after.lost_steps >= before.lost_steps
        assert after.tally.failures_since_checkpoint <= after.failures
        allowed = self.cluster.job.spec.recovery.max_failures
        if after.phase is Phase.FAILED and after.reason == Reason.MAX_FAILURES_EXCEEDED:
            assert after.tally.failures_since_checkpoint == allowed + 1
        elif after.phase is not Phase.FAILED:
            assert after.tally.failures_since_checkpoint <= allowed or after.attempts[-1].reason is None

    def check_idle(self, job: Any, decided: Plan) -> None:
        """Until the requested time of the next reconcile, the passage of time changes nothing."""
        wait = decided.requeue_after.total_seconds() if decided.requeue_after is not None else 2 * DAY_SECONDS
        later = plan(job, self.cluster.observed(), self.cluster.now + seconds(wait / 2), self.cluster.settings)
        assert differences(decided.status, later.status) == {}
        assert later.actions == decided.actions

    @invariant()
    def at_most_the_requested_pods_exist(self) -> None:
        assert len(self.gang()) <= 3

    def teardown(self) -> None:
        """Without further faults, every job ends."""
        self.suspend(False)
        self.cluster.hidden.clear()
        for _ in range(20):
            self.reconcile_until_settled()
            if self.status.phase in FINISHED:
                return
            self.cluster.run_all()
            self.reconcile_until_settled()
            if is_true(self.status, ConditionType.ACCEPTED) and len(self.gang()) == 3:
                for pod in self.gang():
                    if pod.phase is PodPhase.RUNNING and pod.deleted_at is None:
                        self.cluster.exit(pod.node_rank, 0)
            self.reconcile_until_settled()
            self.cluster.tick(400)
        raise AssertionError(f"the job has not ended: {self.status}")

    # helpers

    @property
    def status(self) -> FineTuneJobStatus:
        return self.cluster.job.status

    def gang(self) -> list[ObservedPod]:
        return [pod for pod in self.cluster.pods.values() if pod.attempt == self.status.attempt]

    def pod_of(self, node_rank: int) -> ObservedPod | None:
        return next((pod for pod in self.gang() if pod.node_rank == node_rank), None)


def differences(one: FineTuneJobStatus, other: FineTuneJobStatus) -> dict[str, tuple[Any, Any]]:
    """Return the fields that differ, with both values."""
    names = FineTuneJobStatus.model_fields
    return {n: (getattr(one, n), getattr(other, n)) for n in names if getattr(one, n) != getattr(other, n)}


TestJobMachine = JobMachine.TestCase
TestJobMachine.settings = settings(
    max_examples=100, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
