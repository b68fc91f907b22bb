"""A gang loses a pod: only this pod is replaced, and the other supervisors receive their new world over TLS."""

from __future__ import annotations

import itertools
import json

import pytest

from finetune_contract.exit_codes import ExitCode
from finetune_contract.heartbeat import Heartbeat, NewWorld, RankEnd, RankState, Reply
from testing.controlplane.process import wait_for
from testing.operator.harness import Jobs, build_job, running
from testing.operator.heartbeats import HeartbeatClient, tls_context, tls_flags
from tests.operator.conftest import NewOperator

pytestmark = pytest.mark.cluster

NUM_PODS = 3


class GangSupervisors:
    """The supervisors of a job: the token and the current attempt of each pod."""

    def __init__(self, client: HeartbeatClient) -> None:
        self._client = client
        self._tokens: dict[str, str] = {}
        self._sequences = itertools.count(1)
        self.attempts: dict[str, int] = {}

    def join(self, pod: str, attempt: int) -> None:
        self._tokens[pod] = self._client.token(pod)
        self.attempts[pod] = attempt

    def leave(self, pod: str) -> None:
        del self._tokens[pod], self.attempts[pod]

    def report_step(self, step: int) -> None:
        """Report that all ranks are at a step."""
        for pod in self._tokens:
            self._post(pod, self._client.beat(pod, next(self._sequences), attempt=self.attempts[pod], step=step))

    def ask_to_join(self, pod: str, attempt: int) -> NewWorld:
        """Ask for the address of rank 0 until the reply contains it."""
        token = self._client.token(pod)

        def world() -> NewWorld | None:
            beat = self._client.beat(pod, next(self._sequences), attempt=attempt, state=RankState.STARTING)
            status, answer = self._client.post(beat.model_copy(update={"joining": True}), token)
            assert status == 200, answer
            return Reply.model_validate_json(answer).world

        found = wait_for("the reply names rank 0", world)
        assert found is not None
        return found

    def wait_for_new_world(self) -> dict[str, NewWorld]:
        """Report a lost peer for all pods until each has received its new world; switch to its attempt."""
        worlds: dict[str, NewWorld] = {}

        def all_have_a_world() -> bool:
            for pod in self._tokens.keys() - worlds.keys():
                found = self._post(pod, self._lost_peer_heartbeat(pod)).world
                if found is not None:
                    worlds[pod], self.attempts[pod] = found, found.attempt
            return worlds.keys() == self._tokens.keys()

        wait_for("all pods have a new world", all_have_a_world)
        return worlds

    def _lost_peer_heartbeat(self, pod: str) -> Heartbeat:
        beat = self._client.beat(pod, next(self._sequences), attempt=self.attempts[pod], state=RankState.FAILED)
        end = RankEnd(rank=beat.node_rank, exit_code=ExitCode.FABRIC, last_words="lost a peer")
        return beat.model_copy(update={"ends": (end,), "waiting": True})

    def _post(self, pod: str, beat: Heartbeat) -> Reply:
        status, answer = self._client.post(beat, self._tokens[pod])
        assert status == 200, answer
        return Reply.model_validate_json(answer)


def uids(jobs: Jobs) -> dict[str, str]:
    return {name: pod["metadata"]["uid"] for name, pod in jobs.pods().items()}


def address(jobs: Jobs, pod: str) -> str:
    found: str = jobs.pods()[pod]["status"]["podIP"]
    return found


def all_run(jobs: Jobs, names: set[str]) -> bool:
    pods = jobs.pods()
    return pods.keys() == names and all(pod["status"]["phase"] == "Running" for pod in pods.values())


@pytest.fixture
def client(jobs: Jobs, new_operator: NewOperator) -> HeartbeatClient:
    return HeartbeatClient(jobs, new_operator(*tls_flags(jobs.control_plane)), tls_context(jobs.control_plane))


def test_only_the_lost_pod_is_replaced(jobs: Jobs, client: HeartbeatClient) -> None:
    gang = GangSupervisors(client)
    with running(client.operator):
        jobs.create(build_job("circles", nodes=NUM_PODS))
        first = {f"circles-a1-n{rank}" for rank in range(NUM_PODS)}
        wait_for("the pods run", lambda: all_run(jobs, first))
        for pod in first:
            gang.join(pod, attempt=1)
        gang.report_step(40)
        jobs.wait_phase("circles", "Running")
        before = uids(jobs)

        jobs.delete_pod("circles-a1-n1")
        gang.leave("circles-a1-n1")
        worlds = gang.wait_for_new_world()
        master = address(jobs, "circles-a1-n0")
        for rank in (0, 2):
            expected = NewWorld(attempt=2, node_rank=rank, num_nodes=NUM_PODS, master_addr=master, master_port=29500)
            # The mean time between failures depends on how long the test has taken so far.
            world = worlds[f"circles-a1-n{rank}"].model_copy(update={"mtbf_seconds": None})
            assert world.target is not None
            assert json.loads(world.target)["steps"] == jobs.get("circles")["spec"]["training"]["steps"]
            assert world.model_copy(update={"target": None}) == expected
        wait_for("the pod is replaced", lambda: all_run(jobs, {"circles-a1-n0", "circles-a2-n1", "circles-a1-n2"}))
        assert {name: uid for name, uid in uids(jobs).items() if name in before} == {
            name: uid for name, uid in before.items() if name != "circles-a1-n1"
        }
        assert "MASTER_ADDR" not in environment(jobs, "circles-a2-n1")
        assert gang.ask_to_join("circles-a2-n1", attempt=2).master_addr == master
        gang.join("circles-a2-n1", attempt=2)
        gang.report_step(41)
        status = jobs.wait_attempt("circles", 2)
        assert status["attempts"][1]["podAttempts"] == [1, 2, 1]
        assert (status["preemptions"], status["failures"], status["nodes"]) == (1, 0, "3/3")

        # Now lose the pod of the rendezvous; the remaining pods are of different attempts.
        jobs.delete_pod("circles-a1-n0")
        gang.leave("circles-a1-n0")
        named = {world.master_addr for world in gang.wait_for_new_world().values()}
        assert named == {address(jobs, "circles-a3-n0")}
        wait_for("the pod is replaced", lambda: all_run(jobs, {"circles-a3-n0", "circles-a2-n1", "circles-a1-n2"}))
        gang.join("circles-a3-n0", attempt=3)
        gang.report_step(42)
        assert jobs.wait_attempt("circles", 3)["attempts"][2]["podAttempts"] == [3, 2, 1]


def test_preemption_notice_to_a_kept_pod_is_handled_at_once(jobs: Jobs, client: HeartbeatClient) -> None:
    gang = GangSupervisors(client)
    with running(client.operator):
        jobs.create(build_job("circles", recovery={"noticeSeconds": 1}))
        wait_for("the pods run", lambda: all_run(jobs, {"circles-a1-n0", "circles-a1-n1"}))
        for rank in range(2):
            gang.join(f"circles-a1-n{rank}", attempt=1)
        gang.report_step(40)
        jobs.wait_phase("circles", "Running")
        jobs.delete_pod("circles-a1-n1")
        gang.leave("circles-a1-n1")
        gang.wait_for_new_world()
        wait_for("the pod is replaced", lambda: all_run(jobs, {"circles-a1-n0", "circles-a2-n1"}))
        gang.join("circles-a2-n1", attempt=2)
        gang.report_step(41)
        jobs.wait_attempt("circles", 2)

        jobs.delete_pod("circles-a1-n0", grace_seconds=None)
        gang.leave("circles-a1-n0")
        wait_for("the attempt ends", lambda: jobs.status("circles")["preemptions"] == 2)
        ended = jobs.status("circles")["attempts"][1]
        assert (ended["pod"], ended["rank"]) == ("circles-a1-n0", 0)


def environment(jobs: Jobs, pod: str) -> dict[str, str]:
    (container,) = jobs.pods()[pod]["spec"]["containers"]
    return {variable["name"]: variable.get("value", "") for variable in container["env"]}
