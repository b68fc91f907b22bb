"""Nodes on which GPUs of several jobs have failed."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

from finetune_contract.exit_codes import ExitCode
from finetune_operator.api.job import FineTuneJob
from finetune_operator.cluster.kube.work.node_taints import WINDOW, build_patch, find_faulty
from tests.plan.fake_cluster import make_job

NOW = datetime(2026, 1, 2, tzinfo=UTC)


def job(uid: str, *entries: dict[str, Any]) -> FineTuneJob:
    """Return a job with these ends in its ledger."""
    attempts = [
        {"attempt": number, "startedAt": NOW, "endedAt": NOW, "reason": "GpuFault", "node": "node-1", **entry}
        for number, entry in enumerate(entries, 1)
    ]
    made = make_job()
    document = made.model_dump(mode="json", by_alias=True)
    document["metadata"]["uid"] = uid
    document["status"] = {"attempts": attempts}
    return FineTuneJob.model_validate(document)


SEEN = {"gpu": "GPU-1", "xid": 79}


def test_node_is_faulty_after_evidence_from_several_jobs() -> None:
    one, other = job("a", SEEN, SEEN), job("b", {"exitCode": int(ExitCode.DEVICE)})
    assert find_faulty([one], NOW, 2) == {}, "one job may be the cause itself"
    assert find_faulty([one, other], NOW, 2) == {"node-1": frozenset({"a", "b"})}


def test_old_faults_other_ends_and_reports_of_health_tools_are_no_evidence() -> None:
    good = job("a", SEEN)
    others = [
        job("b", {**SEEN, "endedAt": NOW - WINDOW - timedelta(seconds=1)}),
        job("c", {**SEEN, "reason": "ProcessFailed"}),
        job("d", {}),
        job("e", {**SEEN, "node": None}),
        job("f", {**SEEN, "endedAt": None}),
        job("g", {**SEEN, "node": "node-2"}),
    ]
    assert find_faulty([good, *others], NOW, 2) == {}


def test_patch_keeps_the_taints_of_others_and_is_refused_if_they_have_changed() -> None:
    other = {"key": "example.com/other", "effect": "NoExecute"}
    own = {"key": "finetune-operator.io/gpu-fault", "value": "3-jobs", "effect": "NoSchedule"}
    node = {"metadata": {"resourceVersion": "7"}, "spec": {"taints": [other, {**own, "value": "2-jobs"}]}}
    assert build_patch(node, 3) == {"metadata": {"resourceVersion": "7"}, "spec": {"taints": [other, own]}}
    assert build_patch({"metadata": {"resourceVersion": "7"}}, 3)["spec"]["taints"] == [own]
