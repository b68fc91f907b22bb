"""A supervisor without ranks lets the coordinator hold its reply, until another heartbeat becomes due."""

from __future__ import annotations

import signal
import ssl
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from finetune_contract.exit_codes import ExitCode
from finetune_contract.heartbeat import WAIT_SECONDS, Heartbeat, Reply
from finetune_trainer.supervisor.client import CoordinatorClient, CoordinatorError, InterruptedPostError
from testing.controlplane.pki import Authority
from tests.trainer.supervisor.fake_coordinator import DEADLINE_SECONDS, FakeCoordinator, StartSupervisor
from tests.trainer.supervisor.test_supervisor import HOLD, WORLD_4

BEAT = Heartbeat(
    job="circles", namespace="default", job_uid="1", pod="a", pod_uid="2", attempt=1, node_rank=0, sequence=1
)


def test_a_waiting_supervisor_lets_the_coordinator_hold_its_reply(
    start: StartSupervisor, coordinator: FakeCoordinator
) -> None:
    coordinator.held.clear()
    process = start("sys.exit(76 if os.environ['FINETUNE_ATTEMPT'] == '3' else 0)", **HOLD)
    coordinator.wait(lambda beat: beat["waiting"])
    number = len(coordinator.beats)
    assert coordinator.waits[-1] == f"wait={WAIT_SECONDS:.0f}"
    assert set(coordinator.waits[: number - 1]) == {None}
    coordinator.reply = Reply.model_validate({"attempt": 4, "world": WORLD_4})
    coordinator.held.set()
    coordinator.wait(lambda beat: beat["attempt"] == 4)
    # It waited for the reply that was held instead of asking again.
    assert coordinator.beats[number]["attempt"] == 4
    assert process.wait(DEADLINE_SECONDS) == ExitCode.DONE


def test_a_notice_is_reported_at_once_while_a_reply_is_held(
    start: StartSupervisor, coordinator: FakeCoordinator
) -> None:
    coordinator.held.clear()
    process = start("sys.exit(76)", **HOLD)
    coordinator.wait(lambda beat: beat["waiting"])
    process.send_signal(signal.SIGTERM)
    coordinator.wait(lambda beat: beat["notice"])
    assert process.wait(DEADLINE_SECONDS) == ExitCode.FABRIC
    assert not coordinator.held.is_set()
    _, err = process.communicate()
    assert "cannot reach" not in err


def test_a_post_over_tls_is_interrupted(tmp_path: Path, coordinator: FakeCoordinator) -> None:
    authority = Authority(tmp_path, "tests")
    certificate = authority.issue("coordinator", hosts=["127.0.0.1"])
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate.certificate, certificate.key)
    coordinator.server.socket = context.wrap_socket(coordinator.server.socket, server_side=True)
    client = CoordinatorClient(coordinator.url.replace("http:", "https:"), None, authority.certificate)
    assert client.post(BEAT) == Reply()
    coordinator.held.clear()
    with ThreadPoolExecutor(1) as thread:
        post = thread.submit(client.post, BEAT, 60.0)
        coordinator.wait(lambda _: coordinator.waits[-1] is not None)
        client.interrupt()
        assert isinstance(post.exception(DEADLINE_SECONDS), InterruptedPostError)
    coordinator.held.set()
    # The next post opens a new connection.
    assert client.post(BEAT) == Reply()
    client.close()


@pytest.mark.parametrize("damaged", ["half\na token", "t\N{EURO SIGN}ken"])
def test_a_damaged_token_does_not_end_the_heartbeats(
    tmp_path: Path, coordinator: FakeCoordinator, damaged: str
) -> None:
    token = tmp_path / "token"
    client = CoordinatorClient(coordinator.url, token, None)
    for _ in range(2):
        token.write_text(damaged)
        with pytest.raises(CoordinatorError, match="Error"):
            client.post(BEAT)
        token.write_text("whole")
        assert client.post(BEAT) == Reply()
    client.close()


def test_a_coordinator_that_has_gone_is_not_asked_at_once_again(
    start: StartSupervisor, coordinator: FakeCoordinator
) -> None:
    coordinator.reply = Reply(attempt=3, beat_seconds=0.001)
    coordinator.held.clear()
    process = start("sys.exit(76)", **HOLD | {"FINETUNE_BEAT_SECONDS": "60"})
    coordinator.wait(lambda beat: beat["waiting"])
    coordinator.status = 503
    coordinator.held.set()
    with coordinator.changed:
        number = len(coordinator.beats)
        assert coordinator.changed.wait_for(lambda: len(coordinator.beats) >= number + 2, DEADLINE_SECONDS)
        first, second = coordinator.times[number : number + 2]
    assert second - first >= 1.0
    process.kill()
