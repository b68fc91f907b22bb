"""Everything that may go wrong between the operator and the API server. After each fault: no pod was made twice, no
attempt was lost or repeated, and the job runs."""

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
from testing.controlplane.api import Api, ApiError
from testing.controlplane.process import LOOPBACK, wait_for
from testing.operator.harness import Jobs, OperatorProcess, build_job, running
from tests.operator.conftest import NewOperator

pytestmark = pytest.mark.cluster

NUM_WRITES = 16
"""Writes of a job's start and recovery, and one more: there the operator is not killed at all."""
OUTAGES_SECONDS = (60.0, 5.0)
TIMES = 3
"""How often each of the other faults comes, in one life of the operator."""
NUM_JOBS = 12


def created_pods(jobs: Jobs) -> Counter[str]:
    """How often a pod of each name was created, by the API server's own account."""
    names: Counter[str] = Counter()
    for request in jobs.control_plane.requests():
        about = request.get("objectRef", {})
        # The scheduler's bindings are creations below pods, too.
        subject = (about.get("resource"), about.get("subresource"), about.get("namespace"))
        if subject == ("pods", None, jobs.namespace) and request["verb"] == "create":
            # One that was refused early has no name yet.
            names[about.get("name", "")] += request["responseStatus"]["code"] == 201
    return +names


def check(jobs: Jobs, name: str, attempts: int, preemptions: int) -> None:
    """What must hold after every fault."""
    status = jobs.wait_attempt(name, attempts, 90)
    assert [entry["attempt"] for entry in status["attempts"]] == list(range(1, attempts + 1))
    assert (status["preemptions"], status["failures"]) == (preemptions, 0)
    assert sorted(jobs.pods()) == [f"{name}-a{attempts}-n{rank}" for rank in range(2)]
    assert max(created_pods(jobs).values()) == 1


@pytest.mark.parametrize("number", range(1, NUM_WRITES + 1))
def test_killed_before_its_nth_write(jobs: Jobs, new_operator: NewOperator, number: int) -> None:
    """The state between two writes is the same whether the first was the last one or the second never came."""
    doomed = new_operator("--leader-election=false", **{VARIABLE: f"before:{number}"})
    heir = new_operator("--leader-election=false")
    doomed.start()
    # kwok's pods do not save when they are told to: nobody is to wait for that.
    jobs.create(build_job("circles", recovery={"noticeSeconds": 1}))
    living = doomed

    def look_after(status: dict[str, object]) -> bool:
        nonlocal living
        if living is doomed and doomed.died():
            living = heir.start()
        return all(jobs.status("circles").get(field) == value for field, value in status.items())

    wait_for("attempt 1 runs", lambda: look_after({"phase": "Running", "attempt": 1}), 60)
    jobs.delete_pod("circles-a1-n1")
    wait_for("attempt 2 runs", lambda: look_after({"phase": "Running", "attempt": 2}), 60)
    check(jobs, "circles", attempts=2, preemptions=1)


def test_the_api_server_is_down_for_a_while(jobs: Jobs, new_operator: NewOperator) -> None:
    """Far longer than the lease lives. The process goes on, and so does its work."""
    with running(new_operator()) as operator:
        jobs.create(build_job("circles"))
        jobs.wait_phase("circles", "Running")
        for attempt, outage_seconds in enumerate(OUTAGES_SECONDS, start=1):
            jobs.control_plane.stop_api_server()
            over_at = time.monotonic() + outage_seconds
            try:
                wait_for("it has stopped leading", lambda: not operator.leads())
                wait_for("the outage is over", partial(ends, operator, over_at), 2 * outage_seconds)
            finally:
                jobs.control_plane.start_api_server()
            jobs.delete_pod(f"circles-a{attempt}-n0")
            check(jobs, "circles", attempts=attempt + 1, preemptions=attempt)
        assert not operator.died()


def counts(operator: OperatorProcess, metric: str, number: int) -> bool:
    return operator.metric(metric) >= number


def stands_by(operator: OperatorProcess) -> bool:
    return not operator.leads() and operator.get("/livez")[0] == 200


def ends(operator: OperatorProcess, over_at: float) -> bool:
    """Whether the outage has lasted; the operator lives all the while, and writes nothing."""
    assert operator.get("/livez")[0] == 200
    assert not operator.leads()
    return time.monotonic() >= over_at


def test_watches_expire_while_a_pod_vanishes(jobs: Jobs, new_operator: NewOperator) -> None:
    with running(new_operator("--lease-seconds=60")) as operator:
        jobs.create(build_job("circles"))
        jobs.wait_phase("circles", "Running")
        for attempt in range(1, TIMES + 1):
            operator.pause()
            # Nobody tells the operator of this deletion: its watch ends before, and cannot go on after.
            jobs.delete_pod(f"circles-a{attempt}-n1")
            jobs.control_plane.expire_watches()
            operator.resume()
            check(jobs, "circles", attempts=attempt + 1, preemptions=attempt)
        assert not operator.died()


def test_the_api_server_knows_no_token_for_a_while(jobs: Jobs, new_operator: NewOperator) -> None:
    """It answers 401 to everyone, and later takes the same tokens again: one that has just started may do so."""
    with running(new_operator()) as operator:
        jobs.create(build_job("circles"))
        jobs.wait_phase("circles", "Running")
        before = refusals_of_kopf(jobs, 401)
        with jobs.control_plane.strange_tokens():
            wait_for("Kopf is refused again and again", lambda: refusals_of_kopf(jobs, 401) >= before + TIMES, 60)
            wait_for("it has stopped leading", lambda: not operator.leads())
        jobs.delete_pod("circles-a1-n1")
        check(jobs, "circles", attempts=2, preemptions=1)
        assert not operator.died()


def refusals_of_kopf(jobs: Jobs, code: int) -> int:
    """How often what Kopf itself asks for was refused so, by all operators yet."""
    return sum(
        request["responseStatus"]["code"] == code and request.get("userAgent", "").startswith("kopf/")
        for request in jobs.control_plane.requests()
    )


def test_somebody_else_writes_all_the_time(jobs: Jobs, new_operator: NewOperator) -> None:
    """Every status write races with another one: conflicts drop passes, and none of them is lost."""
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
def scarce(jobs: Jobs, user: str) -> Iterator[None]:
    """The API server takes hardly more than one pod of a user at a time, and answers 429 to the others."""
    api, root = jobs.control_plane.api, "/apis/flowcontrol.apiserver.k8s.io/v1"
    nothing = {"nominalConcurrencyShares": 0, "borrowingLimitPercent": 0, "limitResponse": {"type": "Reject"}}
    level = {
        "apiVersion": "flowcontrol.apiserver.k8s.io/v1",
        "kind": "PriorityLevelConfiguration",
        "metadata": {"name": "scarce"},
        "spec": {"type": "Limited", "limited": nothing},
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
    with scarce(jobs, "system:serviceaccount:finetune-system:finetune-operator"):
        for name in names:
            jobs.create(build_job(name))
        # All of them want their pods at once.
        with running(new_operator()) as operator:
            for name in names:
                jobs.wait_phase(name, "Running", 90)
            assert operator.metric(refused) >= TIMES
    assert sorted(jobs.pods()) == sorted(f"{name}-a1-n{rank}" for name in names for rank in range(2))
    assert set(created_pods(jobs).values()) == {1}


@contextmanager
def hanging_webhook(jobs: Jobs) -> Iterator[None]:
    """An admission webhook for pods of the namespace that takes connections and never answers."""
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


def test_a_webhook_that_times_out(jobs: Jobs, new_operator: NewOperator) -> None:
    refused = 'finetune_api_requests_total{code="500",method="POST",resource="pods"}'
    with running(new_operator()) as operator:
        for number in range(1, TIMES + 1):
            with hanging_webhook(jobs):
                wait_for("the webhook is asked", lambda: dry_run(jobs.control_plane.api, jobs.namespace) == 500)
                jobs.create(build_job(f"circles-{number}"))
                wait_for("a pod was refused twice", partial(counts, operator, refused, 2 * number), 60)
            jobs.wait_phase(f"circles-{number}", "Running", 60)
        assert set(created_pods(jobs).values()) == {1}
        for number in range(1, TIMES + 1):
            assert jobs.status(f"circles-{number}")["attempt"] == 1


def dry_run(user: Api, namespace: str) -> int:
    """What the API server says to a pod that is not to be created."""
    pod = {"metadata": {"name": "probe"}, "spec": {"containers": [{"name": "probe", "image": "probe"}]}}
    try:
        user.create(f"/api/v1/namespaces/{namespace}/pods?dryRun=All", pod)
    except ApiError as error:
        return error.code
    return 201


SKEWED = """
import sys
from datetime import datetime, timedelta, UTC
from finetune_operator.cluster.kube import clock
clock._utc_now = lambda: datetime.now(UTC) + timedelta(seconds={seconds})
from finetune_operator.server.main import main
main()
"""


@pytest.mark.parametrize("seconds", [-300, 300])
def test_the_operators_clock_is_wrong(jobs: Jobs, new_operator: NewOperator, seconds: int) -> None:
    operator = new_operator()
    operator.program = ("-c", SKEWED.format(seconds=seconds))
    with running(operator):
        # kwok's survivors never leave by themselves: they are left to save for as long as the notice is.
        jobs.create(build_job("circles", activeDeadlineSeconds=120, recovery={"noticeSeconds": 1}))
        jobs.wait_phase("circles", "Running")
        jobs.delete_pod("circles-a1-n1", grace_seconds=None)
        check(jobs, "circles", attempts=2, preemptions=1)


def test_a_leader_that_was_stopped_writes_nothing_when_it_wakes(jobs: Jobs, new_operator: NewOperator) -> None:
    """The two take turns, and for a moment each believes that it leads."""
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
            wait_for("the old one knows", partial(stands_by, leader))
            assert writes_of(jobs, leader.identity) == before
            leader, other = other, leader


def writes_of(jobs: Jobs, identity: str) -> int:
    """Writes of one replica in the namespace."""
    return sum(
        request.get("userAgent") == f"finetune-operator/{identity}"
        and request["objectRef"].get("namespace") == jobs.namespace
        and request["verb"] in ("create", "update", "patch", "delete")
        for request in jobs.control_plane.requests()
        if "objectRef" in request
    )


def test_the_lease_is_given_back_on_sigterm(jobs: Jobs, new_operator: NewOperator) -> None:
    """The lease would live for minutes; the next replica leads at once, and neither loses nor repeats anything."""
    first, second = new_operator("--lease-seconds=300"), new_operator("--lease-seconds=300")
    with running(first):
        jobs.create(build_job("circles"))
        jobs.wait_phase("circles", "Running")
        second.start()
        wait_for("the second one waits", lambda: second.get("/readyz")[0] == 200)
        assert not second.leads()
        assert first.stop() == 0
        second.wait_ready()
        jobs.delete_pod("circles-a1-n0")
        check(jobs, "circles", attempts=2, preemptions=1)
