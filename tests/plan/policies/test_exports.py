"""The export pod: outputs that the ranks do not write, and outputs that a user requests from a checkpoint."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from finetune_contract.exit_codes import ExitCode
from finetune_contract.heartbeat import OutputState, RankState, WrittenOutput
from finetune_contract.outputs.request import ExportedOutput, ExportResult
from finetune_contract.phase import Phase
from finetune_operator.api.reasons import Reason
from finetune_operator.api.status import ExportState, ExportStatus, OutputStatus
from finetune_operator.plan.model.types import DeletePod, ObservedNode, PodPhase, Refusal
from tests.plan.fake_cluster import SETTINGS, FakeCluster, make_job, seconds

OPENVINO = {"format": "openvino", "to": "s3://models/ov"}
OUTPUTS = [{"format": "diffusers", "to": "lora"}, OPENVINO]
WRITTEN = ExportResult(step=100, outputs=(ExportedOutput(index=0, size_bytes=70, sha256="ab"),))
POD = "circles-export"


def _trained(outputs: Any = OUTPUTS, **spec: Any) -> FakeCluster:
    """Return a job whose ranks have just finished and written what they write."""
    cluster = FakeCluster(make_job(outputs=outputs, **spec)).running()
    written = WrittenOutput(format="diffusers", to="lora", size_bytes=10)
    cluster.beat_all(RankState.DONE, step=100, outputs=(written,))
    for rank in (0, 1):
        cluster.exit(rank, 0)
    cluster.settle()
    return cluster


def _export(cluster: FakeCluster) -> ExportStatus:
    return cluster.job.status.exports[0]


def _output(cluster: FakeCluster, to: str = "s3://models/ov") -> OutputStatus:
    return next(each for each in cluster.job.status.outputs if each.to == to)


def _request(cluster: FakeCluster, name: str = "r1", **values: Any) -> None:
    outputs = [{"format": "kohya", "to": "s3://models/kohya"}]
    cluster.request_export(json.dumps({"id": name, "outputs": outputs} | values))
    cluster.settle()


# -- the job's own outputs --------------------------------------------------------------------------------------------


def test_job_succeeds_when_its_export_is_complete() -> None:
    cluster = _trained()
    assert (cluster.job.status.phase, cluster.job.status.reason) == (Phase.EXPORTING, Reason.EXPORTING)
    assert cluster.job.status.attempts[-1].reason == Reason.FINISHED
    assert _export(cluster).state is ExportState.WAITING
    cluster.run_export()
    cluster.settle()
    assert _output(cluster).state is OutputState.WRITING
    assert cluster.job.status.message == "the pod circles-export writes outputs"
    cluster.end_export(0, WRITTEN)
    cluster.settle()
    assert cluster.job.status.phase is Phase.SUCCEEDED
    output = _output(cluster)
    assert (output.state, output.bytes, output.sha256) == (OutputState.WRITTEN, 70, "ab")
    assert _export(cluster).state is ExportState.DONE
    assert cluster.job.status.attempt == 1


def test_training_pods_keep_their_logs_and_no_attempt_begins_during_the_export() -> None:
    cluster = _trained()
    cluster.tick(3600)
    cluster.settle()
    assert {pod.name for pod in cluster.pods.values()} == {"circles-a1-n0", "circles-a1-n1", POD}
    cluster.vanish("circles-a1-n0")
    cluster.vanish("circles-a1-n1")
    cluster.settle()
    assert (cluster.job.status.attempt, cluster.job.status.phase) == (1, Phase.EXPORTING)


def test_job_without_such_outputs_has_no_export() -> None:
    cluster = _trained([{"format": "diffusers", "to": "lora"}])
    assert cluster.job.status.phase is Phase.SUCCEEDED
    assert cluster.job.status.exports == ()
    assert POD not in cluster.pods


def test_lost_pod_is_replaced_and_does_not_count() -> None:
    cluster = _trained(recovery={"maxFailures": 0})
    losses: tuple[dict[str, Any], ...] = ({"disruption": "DisruptionTarget"}, {})
    for loss in losses:
        cluster.run_export()
        cluster.settle()
        uid = cluster.export_pod.uid
        if loss:
            cluster.end_export(143, **loss)
        else:
            cluster.nodes["node-9"] = ObservedNode(lost=True)
        cluster.settle()
        assert "was lost" in (_export(cluster).message or "")
        cluster.nodes.clear()
        _wait_for_next(cluster)
        if cluster.export_pod.deleted_at is not None:
            cluster.vanish(POD)
            cluster.settle()
        assert cluster.export_pod.uid != uid
    assert (_export(cluster).failures, _export(cluster).retries) == (0, 2)
    assert cluster.job.status.phase is Phase.EXPORTING


def _wait_for_next(cluster: FakeCluster) -> None:
    """Advance the clock to the end of the back-off."""
    decided = cluster.settle()
    assert decided.requeue_after is not None
    cluster.now += decided.requeue_after
    cluster.settle()


def test_back_off_grows_and_the_message_names_the_time() -> None:
    cluster = _trained(recovery={"maxFailures": 9})
    delays = []
    for _ in range(3):
        cluster.run_export()
        cluster.settle()
        cluster.end_export(ExitCode.STORAGE, ExportResult(message="cannot write"))
        decided = cluster.settle()
        assert decided.requeue_after is not None
        assert "cannot write; the next pod starts at" in (cluster.job.status.message or "")
        delays.append(decided.requeue_after.total_seconds())
        _wait_for_next(cluster)
    base = SETTINGS.failure_backoff_seconds
    for number, delay in enumerate(delays):
        assert 0.8 * base * 2**number <= delay <= 1.2 * base * 2**number
    assert _export(cluster).failures == 3


@pytest.mark.parametrize("code", [ExitCode.NETWORK, ExitCode.STORAGE_OUTAGE])
def test_outages_do_not_count(code: int) -> None:
    cluster = _trained(recovery={"maxFailures": 0})
    cluster.run_export()
    cluster.settle()
    cluster.end_export(code, ExportResult(message="503"))
    cluster.settle()
    assert (_export(cluster).failures, _export(cluster).state) == (0, ExportState.WAITING)


def test_failures_above_the_limit_fail_the_job_and_a_retry_repeats_only_the_export() -> None:
    cluster = _trained(recovery={"maxFailures": 1})
    for _ in range(2):
        cluster.run_export()
        cluster.settle()
        cluster.end_export(137, killed=True)
        cluster.settle()
        if cluster.job.status.phase is not Phase.FAILED:
            _wait_for_next(cluster)
    status = cluster.job.status
    assert (status.phase, status.reason) == (Phase.FAILED, Reason.EXPORT_FAILED)
    assert "raise spec.topology.resources.memory" in (status.message or "")
    assert _output(cluster).state is OutputState.FAILED
    assert "not enough memory" in (_output(cluster).message or "")
    cluster.edit(outputs=OUTPUTS, recovery={"maxFailures": 1, "manualRetries": 1})
    cluster.settle()
    assert cluster.job.status.phase is Phase.EXPORTING
    cluster.run_export()
    cluster.end_export(0, WRITTEN)
    cluster.settle()
    assert (cluster.job.status.phase, cluster.job.status.attempt) == (Phase.SUCCEEDED, 1)


def test_refused_target_fails_at_once_and_complete_outputs_are_kept() -> None:
    cluster = _trained([*OUTPUTS, {"format": "openvino", "to": "hub://me/ov"}])
    cluster.run_export()
    cluster.settle()
    refused = ExportedOutput(index=1, error="outputs[1].to: the token can only read")
    cluster.end_export(ExitCode.CONFIG, ExportResult(outputs=(WRITTEN.outputs[0], refused), message=refused.error))
    cluster.settle()
    assert cluster.job.status.phase is Phase.FAILED
    assert _output(cluster).state is OutputState.WRITTEN
    failed = _output(cluster, "hub://me/ov")
    assert (failed.state, failed.message) == (OutputState.FAILED, "outputs[1].to: the token can only read")


def test_success_without_a_result_is_no_success() -> None:
    cluster = _trained()
    cluster.run_export()
    cluster.settle()
    cluster.end_export(0)
    cluster.settle()
    assert cluster.job.status.phase is Phase.EXPORTING
    assert (_export(cluster).failures, _export(cluster).retries) == (1, 1)


def test_edited_output_replaces_the_export() -> None:
    cluster = _trained()
    cluster.run_export()
    cluster.settle()
    cluster.edit(outputs=[OUTPUTS[0], OPENVINO | {"to": "s3://models/other"}])
    cluster.settle()
    assert cluster.export_pod.deleted_at is not None
    cluster.vanish(POD)
    cluster.settle()
    assert "s3://models/other" in json.dumps(cluster.manifests[POD])
    assert cluster.job.status.attempt == 1


def test_removed_output_ends_the_job() -> None:
    cluster = _trained()
    cluster.edit(outputs=[OUTPUTS[0]])
    cluster.settle()
    assert cluster.job.status.phase is Phase.SUCCEEDED


def test_more_steps_continue_the_training() -> None:
    cluster = _trained([OPENVINO])
    cluster.run_export()
    cluster.settle()
    cluster.edit(outputs=[OPENVINO], training={"method": "LoRA", "steps": 200})
    cluster.settle()
    assert cluster.job.status.attempt == 2
    assert cluster.job.status.exports == ()
    assert cluster.export_pod.deleted_at is not None


def test_suspension_stops_the_export_and_it_continues() -> None:
    cluster = _trained()
    cluster.run_export()
    cluster.settle()
    cluster.edit(outputs=OUTPUTS, suspend=True)
    cluster.settle()
    assert cluster.export_pod.deleted_at is not None
    cluster.tick(300)
    cluster.settle()
    assert cluster.job.status.phase is Phase.SUSPENDED
    assert POD not in cluster.pods
    cluster.edit(outputs=OUTPUTS, suspend=False)
    cluster.settle()
    cluster.run_export()
    cluster.end_export(0, WRITTEN)
    cluster.settle()
    assert (cluster.job.status.phase, cluster.job.status.attempt) == (Phase.SUCCEEDED, 1)


def test_deadline_ends_the_export() -> None:
    cluster = _trained(activeDeadlineSeconds=60)
    cluster.run_export()
    cluster.settle()
    cluster.now += seconds(61)
    cluster.settle()
    assert (cluster.job.status.phase, cluster.job.status.reason) == (Phase.FAILED, Reason.DEADLINE_EXCEEDED)
    assert _export(cluster).state is ExportState.FAILED
    assert cluster.export_pod.deleted_at is not None


def test_waiting_pod_explains_the_wait_and_gets_a_new_template() -> None:
    cluster = _trained()
    cluster.change_export(waiting="ImagePullBackOff: no such image")
    cluster.settle()
    assert cluster.job.status.reason == Reason.IMAGE_PULL
    assert cluster.job.status.message == "circles-export: ImagePullBackOff: no such image"
    uid = cluster.export_pod.uid
    cluster.edit(outputs=OUTPUTS, podTemplate={"spec": {"imagePullSecrets": [{"name": "registry"}]}})
    cluster.settle()
    assert cluster.export_pod.uid != uid
    assert cluster.manifests[POD]["spec"]["imagePullSecrets"] == [{"name": "registry"}]


def test_pod_on_an_unreachable_node_is_deleted_by_force() -> None:
    cluster = _trained()
    cluster.run_export()
    cluster.settle()
    cluster.change_export(deleted_at=cluster.now, grace=seconds(30))
    cluster.nodes["node-9"] = ObservedNode(lost=True, gone=True)
    decided = cluster.step()
    assert decided.actions == (DeletePod(POD, cluster.export_pod.uid, grace_seconds=0),)


def test_refused_pod_is_created_again_when_the_cluster_allows_it() -> None:
    cluster = FakeCluster(make_job(outputs=OUTPUTS)).running()
    for rank in (0, 1):
        cluster.exit(rank, 0)
    cluster.refusal = Refusal("pods circles-export is forbidden: exceeded quota")
    cluster.create_after = cluster.now + seconds(30)
    decided = cluster.settle()
    assert decided.requeue_after == seconds(30)
    assert POD not in cluster.pods
    assert "exceeded quota" in (cluster.job.status.message or "")
    cluster.tick(30)
    cluster.refusal = cluster.create_after = None
    cluster.settle()
    assert POD in cluster.pods


def test_missing_image_refuses_the_job() -> None:
    cluster = FakeCluster(make_job(outputs=OUTPUTS), settings=replace(SETTINGS, trainer_image_export=""))
    cluster.settle()
    assert cluster.pods == {}
    assert cluster.job.status.reason == Reason.NOT_SUPPORTED
    assert "trainer.images.export" in (cluster.job.status.message or "")


# -- requests of users ------------------------------------------------------------------------------------------------


def test_request_of_a_finished_job_is_carried_out_once() -> None:
    cluster = _trained([OUTPUTS[0]])
    _request(cluster, step=50)
    assert cluster.job.status.phase is Phase.SUCCEEDED
    cluster.run_export()
    cluster.settle()
    cluster.end_export(0, WRITTEN)
    cluster.settle()
    export, output = _export(cluster), _output(cluster, "s3://models/kohya")
    assert (export.request, export.step, export.state) == ("r1", 50, ExportState.DONE)
    assert (output.state, output.step, output.bytes) == (OutputState.WRITTEN, 50, 70)
    uid = cluster.export_pod.uid
    cluster.tick(3600)
    decided = cluster.settle()
    assert (cluster.export_pod.uid, decided.requeue_after) == (uid, None)
    _request(cluster, "r2")
    assert cluster.export_pod.uid != uid
    assert _export(cluster).state is ExportState.WAITING


def test_request_during_the_training_does_not_disturb_it() -> None:
    cluster = FakeCluster().running()
    cluster.train_to(50, checkpoint=50)
    cluster.settle()
    _request(cluster)
    cluster.run_export()
    cluster.settle()
    assert (cluster.job.status.phase, cluster.job.status.attempt) == (Phase.RUNNING, 1)
    cluster.end_export(0, WRITTEN)
    cluster.settle()
    assert _export(cluster).state is ExportState.DONE
    assert cluster.job.status.attempt == 1


def test_own_export_waits_for_a_requested_one() -> None:
    cluster = FakeCluster(make_job(outputs=OUTPUTS)).running()
    _request(cluster)
    cluster.run_export()
    cluster.beat_all(RankState.DONE, step=100)
    for rank in (0, 1):
        cluster.exit(rank, 0)
    cluster.settle()
    assert cluster.job.status.phase is Phase.EXPORTING
    assert cluster.job.status.message == "all steps are trained; waiting for the end of a requested export"
    cluster.end_export(0, WRITTEN)
    cluster.settle()
    assert [each.request for each in cluster.job.status.exports] == ["", "r1"]
    cluster.run_export()
    cluster.end_export(0, WRITTEN)
    cluster.settle()
    assert (cluster.job.status.phase, cluster.job.status.attempt) == (Phase.SUCCEEDED, 1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read"),
        ('{"id": "r1", "outputs": []}', "outputs"),
        ('{"outputs": [{"format": "kohya", "to": "s3://b/k"}]}', "id: it is missing"),
        (
            '{"id": "r1", "outputs": [{"format": "kohya", "to": "s3://b/k", "full": true}]}',
            "full is for format diffusers",
        ),
        ('{"id": "r1", "outputs": [{"format": "asWritten", "to": "s3://b/k"}]}', "does not write one of the formats"),
        ('{"id": "r1", "outputs": [{"format": "kohya", "to": "/nowhere/k"}]}', "/nowhere/k"),
    ],
)
def test_invalid_request_is_refused_once(text: str, message: str) -> None:
    cluster = _trained([OUTPUTS[0]])
    cluster.request_export(text)
    decided = cluster.settle()
    assert message in (_export(cluster).message or "")
    assert _export(cluster).state is ExportState.FAILED
    assert (POD in cluster.pods, decided.requeue_after) == (False, None)


def test_failed_request_leaves_the_job_as_it_is() -> None:
    cluster = _trained([OUTPUTS[0]])
    _request(cluster, step=7)
    cluster.run_export()
    cluster.settle()
    cluster.end_export(ExitCode.CONFIG, ExportResult(message="there is no checkpoint of step 7"))
    cluster.settle()
    assert cluster.job.status.phase is Phase.SUCCEEDED
    assert _export(cluster).message == "there is no checkpoint of step 7"


def test_ttl_waits_for_a_requested_export() -> None:
    cluster = _trained([OUTPUTS[0]], ttlSecondsAfterFinished=60)
    _request(cluster)
    cluster.run_export()
    cluster.now += seconds(120)
    cluster.settle()
    assert not cluster.deleted
    cluster.end_export(0, WRITTEN)
    cluster.step()
    assert cluster.deleted


def test_removed_annotation_ends_the_request() -> None:
    cluster = _trained([OUTPUTS[0]])
    _request(cluster)
    cluster.run_export()
    cluster.request_export("")
    cluster.settle()
    assert _export(cluster).state is ExportState.FAILED
    assert cluster.export_pod.deleted_at is not None


def test_running_sidecar_leaves_with_the_export() -> None:
    cluster = _trained()
    cluster.run_export()
    cluster.settle()
    cluster.end_export(0, WRITTEN)
    cluster.change_export(phase=PodPhase.RUNNING)
    cluster.settle()
    assert cluster.job.status.phase is Phase.SUCCEEDED
    assert cluster.export_pod.deleted_at is not None


def test_a_claim_that_other_nodes_use_is_named_while_the_pod_waits() -> None:
    storage = {"persistentVolumeClaim": {"claimName": "shared"}}
    cluster = FakeCluster(make_job(checkpoint={"storage": storage})).running()
    _request(cluster)
    cluster.change_export(phase=PodPhase.PENDING, node="node-9", waiting="ContainerCreating")
    cluster.settle()
    nodes = sorted(str(cluster.pod(rank).node) for rank in (0, 1))
    assert _export(cluster).message == (
        f"ContainerCreating; a ReadWriteOnce claim cannot be mounted on node-9 while pods of the job run on "
        f"{', '.join(nodes)}"
    )
    cluster.change_export(node=nodes[0])
    cluster.settle()
    assert _export(cluster).message == "ContainerCreating"
