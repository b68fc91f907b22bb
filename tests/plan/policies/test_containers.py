"""Sidecars and init containers: the trainer's container decides how a pod ends; messages name the others."""

from __future__ import annotations

from typing import Any

import pytest

from finetune_contract.phase import Phase
from finetune_operator.api.reasons import Reason
from tests.plan.fake_cluster import FakeCluster, RankState, make_job

DONE = '{"attempt":1,"exitCode":0,"ends":[]}'
PULL = {"waiting": {"reason": "ImagePullBackOff", "message": "Back-off pulling image proxy:1.20"}}


def container(name: str, state: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"name": name, "ready": "running" in state, "state": state, **more}


def ended(code: int, message: str = "", at: str = "2026-01-01T12:01:00Z", reason: str = "Error") -> dict[str, Any]:
    return {"terminated": {"exitCode": code, "reason": reason, "finishedAt": at, "message": message}}


RUNS: dict[str, Any] = {"running": {"startedAt": "2026-01-01T12:00:00Z"}}
INITIALIZING = {"waiting": {"reason": "PodInitializing"}}


def one_pod() -> FakeCluster:
    cluster = FakeCluster(make_job(topology={"accelerator": "cpu", "nodes": 1}))
    cluster.settle()
    return cluster


def shown(cluster: FakeCluster) -> tuple[Phase | None, str | None, str]:
    cluster.settle()
    status = cluster.job.status
    return status.phase, status.reason, status.message or ""


@pytest.mark.parametrize("code", [1, 137, 143])
def test_sidecar_that_fails_at_the_end_does_not_fail_the_job(code: int) -> None:
    cluster = one_pod().running()
    cluster.beat(0, RankState.DONE, step=100, total_steps=100)
    cluster.see(0, "Failed", [container("trainer", ended(0, DONE)), container("proxy", ended(code))])
    assert shown(cluster)[0] is Phase.SUCCEEDED
    assert len(cluster.job.status.attempts) == 1


def test_sidecar_that_fails_while_the_job_trains_does_not_fail_it() -> None:
    cluster = one_pod().running()
    cluster.train_to(50)
    cluster.see(0, "Running", [container("trainer", RUNS), container("proxy", ended(1))])
    assert shown(cluster)[:2] == (Phase.RUNNING, Reason.TRAINING)
    cluster.see(0, "Failed", [container("trainer", ended(0, DONE)), container("proxy", ended(1))])
    assert shown(cluster)[0] is Phase.SUCCEEDED


def test_done_pod_with_a_failed_sidecar_does_not_hide_what_its_peer_does() -> None:
    cluster = FakeCluster().running()
    cluster.beat(0, RankState.DONE, step=100)
    cluster.beat(1, RankState.EXPORTING, step=100)
    cluster.see(0, "Failed", [container("trainer", ended(0, DONE)), container("proxy", ended(1))])
    assert shown(cluster)[:2] == (Phase.EXPORTING, Reason.EXPORTING)


def test_supervisor_that_a_signal_ends_after_its_last_heartbeat_is_done() -> None:
    cluster = one_pod().running()
    cluster.beat(0, RankState.DONE, step=100)
    cluster.see(0, "Failed", [container("trainer", ended(137))], reason="Evicted")
    assert shown(cluster)[0] is Phase.SUCCEEDED


def test_failure_names_a_sidecar_that_failed_before() -> None:
    cluster = one_pod().running()
    proxy = container("proxy", ended(1, "no route", at="2026-01-01T12:00:30Z"))
    cluster.see(0, "Failed", [container("trainer", ended(70, "OSError: unreachable")), proxy])
    cluster.step()
    entry = cluster.job.status.attempts[0]
    assert entry.reason == Reason.PROCESS_FAILED
    assert entry.message == "OSError: unreachable (before that, sidecar proxy: exit code 1: no route)"


def test_failure_does_not_name_a_sidecar_that_ended_with_the_pod() -> None:
    cluster = one_pod().running()
    proxy = container("proxy", ended(143, at="2026-01-01T12:01:30Z"))
    cluster.see(0, "Failed", [container("trainer", ended(70, "OSError: unreachable")), proxy])
    cluster.step()
    assert cluster.job.status.attempts[0].message == "OSError: unreachable"


def test_failed_init_container_is_the_cause_with_its_last_output() -> None:
    cluster = one_pod()
    init = [container("mesh-init", ended(1, "iptables-restore: no permission\n"))]
    cluster.see(0, "Failed", [container("trainer", INITIALIZING)], init)
    cluster.step()
    entry = cluster.job.status.attempts[0]
    assert (entry.reason, entry.counts_as) == (Reason.INIT_CONTAINER_FAILED, "Failure")
    assert entry.message == "init container mesh-init: exit code 1: iptables-restore: no permission"
    assert "mesh-init" in (cluster.job.status.message or "")


WAITING = [
    # (trainer, init containers, sidecars, reason, message)
    (INITIALIZING, [container("mesh-init", PULL)], [], Reason.IMAGE_PULL, "(init container mesh-init)"),
    (INITIALIZING, [container("setup", RUNS)], [], Reason.WAITING_FOR_PODS, "(init container setup): it is running"),
    (
        INITIALIZING,
        [container("mesh", RUNS, restartPolicy="Always", started=False)],
        [],
        Reason.WAITING_FOR_PODS,
        "(init container mesh): it has not passed its startup probe",
    ),
    (
        INITIALIZING,
        [
            container(
                "mesh",
                {"waiting": {"reason": "CrashLoopBackOff", "message": "back-off 10s"}},
                lastState=ended(2, "bad"),
            )
        ],
        [],
        Reason.CONTAINER_CONFIG,
        "CrashLoopBackOff (init container mesh): back-off 10s; exit code 2: bad",
    ),
    (
        INITIALIZING,
        [container("mesh-init", {"waiting": {"reason": "CreateContainerConfigError", "message": "no secret"}})],
        [],
        Reason.CONTAINER_CONFIG,
        "CreateContainerConfigError (init container mesh-init): no secret",
    ),
    (
        {"waiting": {"reason": "ContainerCreating"}},
        [container("mesh-init", ended(0))],
        [container("proxy", PULL)],
        Reason.IMAGE_PULL,
        "ImagePullBackOff (sidecar proxy): Back-off pulling image proxy:1.20",
    ),
    ({"waiting": {"reason": "RunContainerError", "message": "no gpu"}}, [], [], Reason.CONTAINER_CONFIG, "no gpu"),
    ({"waiting": {"reason": "ContainerCreating"}}, [], [], Reason.WAITING_FOR_PODS, "ContainerCreating"),
]


@pytest.mark.parametrize(("trainer", "init", "sidecars", "reason", "message"), WAITING)
def test_message_names_the_container_that_a_pod_waits_for(
    trainer: Any, init: list[Any], sidecars: list[Any], reason: Reason, message: str
) -> None:
    cluster = one_pod()
    cluster.see(0, "Pending", [container("trainer", trainer), *sidecars], init)
    phase, found, text = shown(cluster)
    assert (phase, found) == (Phase.STARTING, reason)
    assert message in text


def test_trainer_that_runs_while_a_sidecar_waits_counts_as_running() -> None:
    """Kubernetes shows such a pod as Pending."""
    cluster = one_pod()
    cluster.see(0, "Pending", [container("trainer", RUNS), container("proxy", PULL)])
    cluster.settle()
    cluster.train_to(10)
    assert shown(cluster)[:2] == (Phase.RUNNING, Reason.TRAINING)


def test_silent_pod_names_the_sidecar_that_it_waits_for() -> None:
    cluster = one_pod()
    cluster.see(0, "Pending", [container("trainer", RUNS), container("proxy", PULL)])
    cluster.settle()
    cluster.tick(60)
    phase, reason, message = shown(cluster)
    assert (phase, reason) == (Phase.STARTING, Reason.SILENT)
    assert message.endswith("; ImagePullBackOff (sidecar proxy): Back-off pulling image proxy:1.20")


@pytest.mark.parametrize(
    ("limits", "code", "message", "reason"),
    [
        ({"memory": "64Mi"}, 137, "", Reason.OUT_OF_MEMORY),
        ({"memory": "64Mi"}, 137, "a line of the log", Reason.OUT_OF_MEMORY),
        # The supervisor survived, and reports a rank that somebody killed.
        (
            {"memory": "64Mi"},
            137,
            '{"attempt":1,"exitCode":137,"ends":[{"rank":0,"exitCode":137,"lastWords":"x"}]}',
            Reason.PROCESS_FAILED,
        ),
        (
            {"memory": "64Mi"},
            137,
            '{"attempt":1,"exitCode":137,"ends":[{"rank":0,"exitCode":137,"lastWords":"out of memory: the kernel"}]}',
            Reason.OUT_OF_MEMORY,
        ),
        ({"memory": "64Mi"}, 1, "", Reason.PROCESS_FAILED),
        ({}, 137, "", Reason.PROCESS_FAILED),
    ],
)
def test_sigkill_of_a_container_with_a_memory_limit(
    limits: dict[str, str], code: int, message: str, reason: Reason
) -> None:
    """The container runtime reports the same fault as OOMKilled or as Error, by the order of its own events."""
    job = make_job(topology={"accelerator": "cpu", "nodes": 1, "resources": limits})
    cluster = FakeCluster(job).running()
    cluster.see(0, "Failed", [container("trainer", ended(code, message))])
    cluster.step()
    assert cluster.job.status.attempts[0].reason == reason


def test_killed_pod_with_a_notice_was_preempted() -> None:
    job = make_job(topology={"accelerator": "cpu", "nodes": 1, "resources": {"memory": "64Mi"}})
    cluster = FakeCluster(job).running()
    cluster.beat(0, step=3, notice=True)
    cluster.see(0, "Failed", [container("trainer", ended(137))])
    cluster.settle()
    assert cluster.job.status.attempts[0].reason == Reason.PREEMPTED
    assert cluster.job.status.failures == 0


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (
            {"reason": "Evicted", "message": "Pod ephemeral local storage usage exceeds the total limit of 1Gi. "},
            "killed by SIGKILL: Pod ephemeral local storage usage exceeds the total limit of 1Gi. ",
        ),
        (
            {
                "conditions": [
                    {
                        "type": "DisruptionTarget",
                        "status": "True",
                        "reason": "PreemptionByScheduler",
                        "message": "preempting for the pod x",
                    }
                ]
            },
            "killed by SIGKILL: preempting for the pod x",
        ),
    ],
)
def test_message_of_the_kubelet_is_kept(status: dict[str, Any], message: str) -> None:
    cluster = one_pod().running()
    cluster.see(0, "Failed", [container("trainer", ended(137))], **status)
    cluster.step()
    assert cluster.job.status.attempts[0].message == message
