"""Faults between the operator and the API server. After each fault, no pod was created twice, no attempt was lost or
repeated, and the job runs."""

from __future__ import annotations

import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import pytest

from finetune_operator.server.kill_switch import VARIABLE
from testing.controlplane.api import Api, ControlPlaneApiError
from testing.controlplane.process import LOOPBACK, wait_for
from testing.operator.harness import Jobs, OperatorProcess, build_job, running
from tests.operator.conftest import NewOperator

pytestmark = pytest.mark.cluster

NUM_WRITES = 16
"""More than the writes of a job's start and recovery: with the last numbers the operator is not killed."""
CERTAIN_WRITES = 10
"""Writes that a start and a recovery need at least: with these numbers the operator must be killed."""
OUTAGES_SECONDS = (60.0, 5.0)
TIMES = 3
"""Number of repetitions of the other faults while one operator process runs."""
NUM_JOBS = 12


def created_pods(jobs: Jobs) -> Counter[str]:
    """Return how often a pod of each name was created, according to the audit log of the API server."""
    names: Counter[str] = Counter()
    for request in jobs.control_plane.requests():
        about = request.get("objectRef", {})
        # The scheduler's bindings are also creations in a subresource of pods.
        subject = (about.get("resource"), about.get("subresource"), about.get("namespace"))
        if subject == ("pods", None, jobs.namespace) and request["verb"] == "create":
            # A request that was refused early contains no name.
            names[about.get("name", "")] += request["responseStatus"]["code"] == 201
    return +names


def check(jobs: Jobs, name: str, attempts: int, preemptions: int) -> None:
    """Check what must hold after every fault."""
    status = jobs.wait_attempt(name, attempts, 90)
    assert [entry["attempt"] for entry in status["attempts"]] == list(range(1, attempts + 1))
    assert (status["preemptions"], status["failures"]) == (preemptions, 0)
    assert sorted(jobs.pods()) == [f"{name}-a{attempts}-n{rank}" for rank in range(2)]
    assert max(created_pods(jobs).values()) == 1


@pytest.mark.parametrize("number", range(1, NUM_WRITES + 1))
def test_operator_killed_before_its_nth_write(jobs: Jobs, new_operator: NewOperator, number: int) -> None:
    """A kill before write n+1 leaves the same state as a kill after write n, so only one of them is tested."""
    killed = new_operator("--leader-election=false", **{VARIABLE: f"before:{number}"})
    successor = new_operator("--leader-election=false")
    killed.start()
    # kwok's pods do not save when they receive an order to save: keep the time limit for that short.
    jobs.create(build_job("circles", recovery={"noticeSeconds": 1}))
    current = killed

    def has_status(expected: dict[str, object]) -> bool:
        nonlocal current
        if current is killed and killed.has_exited():
            current = successor.start()
        return all(jobs.status("circles").get(field) == value for field, value in expected.items())

    wait_for("attempt 1 runs", lambda: has_status({"phase": "Running", "attempt": 1}), 60)
    jobs.delete_pod("circles-a1-n1")
    wait_for("attempt 2 runs", lambda: has_status({"phase": "Running", "attempt": 2}), 60)
    check(jobs, "circles", attempts=2, preemptions=1)
    assert current is successor or number > CERTAIN_WRITES, "the operator was not killed: it made fewer writes"


def test_api_server_outage(jobs: Jobs, new_operator: NewOperator) -> None:
    """The outage is much longer than the lease. The process keeps running and continues its work afterwards."""
    with running(new_operator()) as operator:
        jobs.create(build_job("circles"))
        jobs.wait_phase("circles", "Running")
        for attempt, outage_seconds in enumerate(OUTAGES_SECONDS, start=1):
            jobs.control_plane.stop_api_server()
            over_at = time.monotonic() + outage_seconds
            try:
                wait_for("the operator has stopped leading", lambda: not operator.leads())
                wait_for("the outage is over", partial(outage_is_over, operator, over_at), 2 * outage_seconds)
            finally:
                jobs.control_plane.start_api_server()
            jobs.delete_pod(f"circles-a{attempt}-n0")
            check(jobs, "circles", attempts=attempt + 1, preemptions=attempt)
        assert not operator.has_exited()


def metric_reaches(operator: OperatorProcess, metric: str, number: int) -> bool:
    return operator.metric(metric) >= number


def is_standby(operator: OperatorProcess) -> bool:
    return not operator.leads() and operator.get("/livez")[0] == 200


def outage_is_over(operator: OperatorProcess, over_at: float) -> bool:
    """Return whether the outage has lasted long enough; check that the operator is alive and does not lead."""
    assert operator.get("/livez")[0] == 200
    assert not operator.leads()
    return time.monotonic() >= over_at


def test_watch_expires_while_a_pod_is_deleted(jobs: Jobs, new_operator: NewOperator) -> None:
    with running(new_operator("--lease-seconds=60")) as operator:
        jobs.create(build_job("circles"))
        jobs.wait_phase("circles", "Running")
        for attempt in range(1, TIMES + 1):
            operator.pause()
            # No watch reports this deletion: the operator's watch ends before it, and cannot continue after it.
            jobs.delete_pod(f"circles-a{attempt}-n1")
            jobs.control_plane.expire_watches()
            operator.resume()
            check(jobs, "circles", attempts=attempt + 1, preemptions=attempt)
        assert not operator.has_exited()


def test_api_server_refuses_all_tokens_for_a_while(jobs: Jobs, new_operator: NewOperator) -> None:
    """It answers 401 to all clients, and later accepts the same tokens, as a restarted API server may do."""
    with running(new_operator()) as operator:
        jobs.create(build_job("circles"))
        jobs.wait_phase("circles", "Running")
        before = refusals_of_kopf(jobs, 401)
        with jobs.control_plane.refuse_tokens():
            wait_for("Kopf is refused repeatedly", lambda: refusals_of_kopf(jobs, 401) >= before + TIMES, 60)
            wait_for("the operator has stopped leading", lambda: not operator.leads())
        jobs.delete_pod("circles-a1-n1")
        check(jobs, "circles", attempts=2, preemptions=1)
        assert not operator.has_exited()


def refusals_of_kopf(jobs: Jobs, code: int) -> int:
    """Return how many of Kopf's own requests got this status code so far, from all operators."""
    return sum(
        request["responseStatus"]["code"] == code and request.get("userAgent", "").startswith("kopf/")
        for request in jobs.control_plane.requests()
    )


def test_another_client_writes_continuously(jobs: Jobs, new_operator: NewOperator) -> None:
    """Every status write competes with another one: conflicts abort reconciles, and no change is lost."""
    over = threading.Event()

    def annotate() -> None:
        number = 0
        while not over.is_set():
            number += 1
            jobs.patch("circles", {"metadata": {"annotations": {"test/number": str(number)}}})

    jobs.create(build_job("circles"))
    thread = threading.Thread(target=annotate)
    thread.start()
    try:
        with running(new_operator()):
            jobs.wait_phase("circles", "Running", 60)
            for attempt in range(1, TIMES + 1):
                jobs.delete_pod(f"circles-a{attempt}-n0")
                check(jobs, "circles", attempts=attempt + 1, preemptions=attempt)
    finally:
        over.set()
        thread.join()


@contextmanager
def limit_pod_creations(jobs: Jobs, user: str) -> Iterator[None]:
    """Let the API server accept about one pod of a user at a time; it answers 429 to the other requests."""
    api, root = jobs.control_plane.api, "/apis/flowcontrol.apiserver.k8s.io/v1"
    limit = {"nominalConcurrencyShares": 0, "borrowingLimitPercent": 0, "limitResponse": {"type": "Reject"}}
    level = {
        "apiVersion": "flowcontrol.apiserver.k8s.io/v1",
        "kind": "PriorityLevelConfiguration",
        "metadata": {"name": "scarce"},
        "spec": {"type": "Limited", "limited": limit},
    }
    subject = {"kind": "User", "user": {"name": user}}
    rule = {"verbs": ["create"], "apiGroups": [""], "resources": ["pods"], "namespaces": ["*"]}
    schema = {
        "apiVersion": "flowcontrol.apiserver.k8s.io/v1",
        "kind": "FlowSchema",
        "metadata": {"name": "scarce"},
        "spec": {
            "matchingPrecedence": 2,
            "priorityLevelConfiguration": {"name": "scarce"},
            "rules": [{"subjects": [subject], "resourceRules": [rule]}],
        },
    }
    api.create(f"{root}/prioritylevelconfigurations", level)
    api.create(f"{root}/flowschemas", schema)
    try:
        yield
    finally:
        api.delete(f"{root}/flowschemas/scarce")
        api.delete(f"{root}/prioritylevelconfigurations/scarce")


def test_too_many_requests(jobs: Jobs, new_operator: NewOperator) -> None:
    names = [f"job-{number}" for number in range(NUM_JOBS)]
    refused = 'finetune_api_requests_total{code="429",method="POST",resource="pods"}'
    with limit_pod_creations(jobs, "system:serviceaccount:finetune-system:finetune-operator"):
        for name in names:
            jobs.create(build_job(name))
        # All jobs need their pods at the same time.
        with running(new_operator()) as operator:
            for name in names:
                jobs.wait_phase(name, "Running", 90)
            assert operator.metric(refused) >= TIMES
    assert sorted(jobs.pods()) == sorted(f"{name}-a1-n{rank}" for name in names for rank in range(2))
    assert set(created_pods(jobs).values()) == {1}


@contextmanager
def hanging_webhook(jobs: Jobs) -> Iterator[None]:
    """Register an admission webhook for pods of the namespace that accepts connections and never answers."""
    api, path = jobs.control_plane.api, "/apis/admissionregistration.k8s.io/v1/validatingwebhookconfigurations"
    with socket.create_server((LOOPBACK, 0)) as server:
        webhook = {
            "name": "hangs.example.com",
            "clientConfig": {"url": f"https://{LOOPBACK}:{server.getsockname()[1]}/"},
            "rules": [{"apiGroups": [""], "apiVersions": ["v1"], "operations": ["CREATE"], "resources": ["pods"]}],
            "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": jobs.namespace}},
            "failurePolicy": "Fail",
            "timeoutSeconds": 1,
            "sideEffects": "None",
            "admissionReviewVersions": ["v1"],
        }
        kind = "ValidatingWebhookConfiguration"
        configuration = {"apiVersion": "admissionregistration.k8s.io/v1", "kind": kind, "metadata": {"name": "hangs"}}
        api.create(path, {**configuration, "webhooks": [webhook]})
        try:
            yield
        finally:
            api.delete(f"{path}/hangs")


def test_webhook_timeout(jobs: Jobs, new_operator: NewOperator) -> None:
    refused = 'finetune_api_requests_total{code="500",method="POST",resource="pods"}'
    with running(new_operator()) as operator:
        for number in range(1, TIMES + 1):
            with hanging_webhook(jobs):
                wait_for("the webhook is called", lambda: dry_run(jobs.control_plane.api, jobs.namespace) == 500)
                jobs.create(build_job(f"circles-{number}"))
                wait_for("a pod was refused twice", partial(metric_reaches, operator, refused, 2 * number), 60)
            jobs.wait_phase(f"circles-{number}", "Running", 60)
        assert set(created_pods(jobs).values()) == {1}
        for number in range(1, TIMES + 1):
            assert jobs.status(f"circles-{number}")["attempt"] == 1


def dry_run(user: Api, namespace: str) -> int:
    """Return the API server's status code for a pod in a dry run."""
    pod = {"metadata": {"name": "probe"}, "spec": {"containers": [{"name": "probe", "image": "probe"}]}}
    try:
        user.create(f"/api/v1/namespaces/{namespace}/pods?dryRun=All", pod)
    except ControlPlaneApiError as error:
        return error.code
    return 201


SKEWED = """
import sys
from datetime import datetime, timedelta, UTC
from finetune_operator.cluster.kube.client import clock
clock._utc_now = lambda: datetime.now(UTC) + timedelta(seconds={seconds})
from finetune_operator.server.main import main
main()
"""


@pytest.mark.parametrize("seconds", [-300, 300])
def test_operator_clock_is_wrong(jobs: Jobs, new_operator: NewOperator, seconds: int) -> None:
    operator = new_operator()
    operator.program = ("-c", SKEWED.format(seconds=seconds))
    with running(operator):
        # kwok's surviving pods never end by themselves: they get the time of the preemption notice to save.
        jobs.create(build_job("circles", activeDeadlineSeconds=120, recovery={"noticeSeconds": 1}))
        jobs.wait_phase("circles", "Running")
        jobs.delete_pod("circles-a1-n1", grace_seconds=None)
        check(jobs, "circles", attempts=2, preemptions=1)


def test_former_leader_writes_nothing_when_it_resumes(jobs: Jobs, new_operator: NewOperator) -> None:
    """The two replicas take turns, and for a moment each of them believes that it leads."""
    leader, other = new_operator("--identity=old"), new_operator("--identity=new")
    with running(leader):
        jobs.create(build_job("circles"))
        jobs.wait_phase("circles", "Running")
        other.start()
        for attempt in range(1, TIMES + 1):
            leader.pause()
            other.wait_ready()
            jobs.delete_pod(f"circles-a{attempt}-n1")
            check(jobs, "circles", attempts=attempt + 1, preemptions=attempt)
            before = writes_of(jobs, leader.identity)
            leader.resume()
            wait_for("the former leader is on standby", partial(is_standby, leader))
            assert writes_of(jobs, leader.identity) == before
            leader, other = other, leader


def writes_of(jobs: Jobs, identity: str) -> int:
    """Return the number of writes of one replica in the namespace."""
    return sum(
        request.get("userAgent") == f"finetune-operator/{identity}"
        and request["objectRef"].get("namespace") == jobs.namespace
        and request["verb"] in ("create", "update", "patch", "delete")
        for request in jobs.control_plane.requests()
        if "objectRef" in request
    )


def test_lease_is_released_on_sigterm(jobs: Jobs, new_operator: NewOperator) -> None:
    """The lease is valid for minutes, but the next replica leads at once; no work is lost or repeated."""
    first, second = new_operator("--lease-seconds=300"), new_operator("--lease-seconds=300")
    with running(first):
        jobs.create(build_job("circles"))
        jobs.wait_phase("circles", "Running")
        second.start()
        wait_for("the second replica is on standby", lambda: second.get("/readyz")[0] == 200)
        assert not second.leads()
        assert first.stop() == 0
        second.wait_ready()
        jobs.delete_pod("circles-a1-n0")
        check(jobs, "circles", attempts=2, preemptions=1)
