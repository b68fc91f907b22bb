"""The coordinator over real HTTP."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import aiohttp
import pytest

from finetune_contract.heartbeat import (
    BEAT_PATH,
    MAX_BEAT_BYTES,
    MAX_SECONDS,
    PREFER,
    WAIT_SECONDS,
    Heartbeat,
    NewWorld,
    Order,
    Reply,
    read_wait_seconds,
)
from finetune_operator.coordinator.beats import HeartbeatStore, PodIdentity
from finetune_operator.coordinator.changes import JobChanges
from finetune_operator.coordinator.http import HttpRequest
from finetune_operator.coordinator.server import MIN_BEAT_SECONDS, Answer, Authenticator, Coordinator
from tests.coordinator.test_beats import IDENTITY, NOON, beat

TOKEN = "right"


@dataclass
class CoordinatorHarness:
    url: str = ""
    store: HeartbeatStore = field(default_factory=HeartbeatStore)
    woken: list[tuple[str, str]] = field(default_factory=list)
    changes: JobChanges = field(default_factory=lambda: JobChanges(lambda: 60.0))
    session: aiohttp.ClientSession = field(init=False)
    answered: asyncio.Event = field(default_factory=asyncio.Event)
    """Set by every answer."""
    coordinator: Coordinator = field(init=False)

    async def post(self, body: str | bytes, token: str | None = TOKEN) -> tuple[int, str]:
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        async with self.session.post(self.url + BEAT_PATH, data=body, headers=headers) as response:
            return response.status, await response.text()

    async def request(self, newest: Heartbeat, headers: dict[str, str]) -> Reply:
        async with self.session.post(self.url + BEAT_PATH, data=newest.to_json(), headers=headers) as response:
            return Reply.model_validate_json(await response.text())


async def authenticate(token: str) -> PodIdentity | None:
    return IDENTITY if token == TOKEN else None


def answer(newest: Heartbeat) -> Reply:
    return Reply(order=Order.SAVE_AND_STOP, attempt=newest.attempt + 1)


@asynccontextmanager
async def listening(
    authenticate: Authenticator = authenticate, answer: Answer = answer, hold_seconds: float = 60.0
) -> AsyncIterator[CoordinatorHarness]:
    harness = CoordinatorHarness(changes=JobChanges(lambda: hold_seconds))
    harness.coordinator = Coordinator(
        harness.store,
        authenticate,
        answer,
        lambda *key: harness.woken.append(key),
        lambda: NOON,
        changes=harness.changes,
    )
    port = await harness.coordinator.start("127.0.0.1", 0)
    harness.url = f"http://127.0.0.1:{port}"
    harness.session = aiohttp.ClientSession()
    try:
        yield harness
    finally:
        await harness.session.close()
        await harness.coordinator.stop()


def test_heartbeat_is_stored_answered_and_wakes_the_job() -> None:
    async def check() -> None:
        async with listening() as harness:
            status, text = await harness.post(beat().to_json())
            assert status == 200
            assert Reply.model_validate_json(text) == Reply(order=Order.SAVE_AND_STOP, attempt=2)
            assert harness.woken == [("default", "circles")]
            assert harness.store.of_job("default", "circles")["uid-1"].received_at == NOON

    asyncio.run(check())


def test_older_heartbeat_is_answered_and_not_stored() -> None:
    async def check() -> None:
        async with listening() as harness:
            await harness.post(beat(2, step=7).to_json())
            status, _ = await harness.post(beat(1, step=3).to_json())
            assert status == 200
            assert harness.store.of_job("default", "circles")["uid-1"].beat.ranks[0].step == 7
            assert len(harness.woken) == 1

    asyncio.run(check())


@pytest.mark.parametrize(
    ("body", "token", "status", "expected"),
    [
        (beat().to_json(), None, 401, "Authorization: Bearer"),
        (beat().to_json(), "", 401, "Authorization: Bearer"),
        (beat().to_json(), "wrong", 401, "does not belong to an existing pod"),
        (beat(pod_uid="other").to_json(), TOKEN, 403, "podUid"),
        ("{", TOKEN, 400, "invalid heartbeat"),
        ("[]", TOKEN, 400, "invalid heartbeat"),
        (beat().to_json().replace('"attempt":1', '"attempt":0'), TOKEN, 400, "attempt"),
        (beat().to_json().replace('"step":0', f'"step":{10**19}'), TOKEN, 400, "ranks.0.step"),
        (beat().to_json().replace('"step":0', '"imagesPerSecond":1e308'), TOKEN, 400, "ranks.0.imagesPerSecond"),
        (b"\xff\xfe", TOKEN, 400, "invalid heartbeat"),
        ("x" * (MAX_BEAT_BYTES + 1), TOKEN, 413, str(MAX_BEAT_BYTES)),
        ("x" * (MAX_BEAT_BYTES + 1), "wrong", 401, "does not belong to an existing pod"),
    ],
    ids=[
        "no-token",
        "empty-token",
        "wrong-token",
        "claim",
        "cut",
        "list",
        "attempt",
        "step",
        "speed",
        "bytes",
        "large",
        "large-unknown-sender",
    ],
)
def test_refusals_contain_a_message(body: str | bytes, token: str | None, status: int, expected: str) -> None:
    async def check() -> None:
        async with listening() as harness:
            refused, text = await harness.post(body, token)
            assert refused == status
            assert expected in text
            assert harness.woken == []
            assert not harness.store.of_job("default", "circles")

    asyncio.run(check())


def test_the_largest_heartbeat_is_accepted() -> None:
    """It arrives in several parts."""

    async def check() -> None:
        async with listening() as harness:
            head = beat().to_json()[:-1] + ',"later":"'
            body = head + "x" * (MAX_BEAT_BYTES - len(head) - 2) + '"}'
            assert (len(body), (await harness.post(body))[0]) == (MAX_BEAT_BYTES, 200)
            assert (await harness.post(body + " "))[0] == 413

    asyncio.run(check())


def test_other_paths_and_methods_are_refused() -> None:
    async def check() -> None:
        async with listening() as harness:
            async with harness.session.post(harness.url + "/other", data="") as response:
                assert (response.status, await response.text()) == (404, f"heartbeats are sent to {BEAT_PATH}\n")
            async with harness.session.get(harness.url + BEAT_PATH) as response:
                assert (response.status, response.headers["Allow"]) == (405, "POST")
            async with harness.session.post(harness.url + BEAT_PATH, data="") as response:
                assert (response.status, response.headers["WWW-Authenticate"]) == (401, "Bearer")

    asyncio.run(check())


def test_a_held_reply_is_abandoned_when_its_supervisor_closes_the_connection() -> None:
    async def check() -> None:
        async with holding([NOTHING]) as harness:
            request = asyncio.create_task(harness.request(WAITING, WAIT))
            await harness.answered.wait()
            async with asyncio.timeout(30):
                while not len(harness.changes):  # noqa: ASYNC110  no event for it
                    await asyncio.sleep(0)
                # Thousands of requests may be held: their headers and bodies are not kept.
                assert not [held for held in gc.get_objects() if isinstance(held, HttpRequest) and held.headers]
                request.cancel()
                while len(harness.changes):  # noqa: ASYNC110
                    await asyncio.sleep(0)
            assert harness.store.of_job("default", "circles")["uid-1"].beat == WAITING

    # Those of other tests in this process.
    gc.collect()
    asyncio.run(check())


def test_no_reply_is_held_for_a_connection_that_was_lost_before() -> None:
    async def check() -> None:
        asked, released = asyncio.Event(), asyncio.Event()

        async def authenticate_late(token: str) -> PodIdentity | None:
            asked.set()
            await released.wait()
            return await authenticate(token)

        async with listening(authenticate_late, lambda _: NOTHING) as harness:
            request = asyncio.create_task(harness.request(WAITING, WAIT))
            await asked.wait()
            request.cancel()
            server = harness.coordinator._server
            assert server is not None
            async with asyncio.timeout(30):
                while server.connections:  # noqa: ASYNC110  no event for it
                    await asyncio.sleep(0)
                released.set()
                while server.tasks:  # noqa: ASYNC110
                    await asyncio.sleep(0)
            assert (harness.woken, len(harness.changes)) == ([("default", "circles")], 0)

    asyncio.run(check())


def test_large_body_without_a_content_length_is_refused() -> None:
    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(MAX_BEAT_BYTES // 1024 + 1):
            yield b"x" * 1024

    async def check() -> None:
        async with (
            listening() as harness,
            harness.session.post(
                harness.url + BEAT_PATH, data=chunks(), headers={"Authorization": f"Bearer {TOKEN}"}
            ) as response,
        ):
            assert response.status == 413

    asyncio.run(check())


def test_lost_connection_during_a_heartbeat_is_not_logged_as_an_error(caplog: pytest.LogCaptureFixture) -> None:
    async def check() -> None:
        async with listening() as harness:
            port = int(harness.url.rpartition(":")[2])
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            head = [f"POST {BEAT_PATH} HTTP/1.1", "Host: here", f"Authorization: Bearer {TOKEN}", "Content-Length: 100"]
            writer.write("\r\n".join([*head, "", '{"attempt"']).encode())
            await writer.drain()
            assert (await harness.post(beat().to_json()))[0] == 200
            writer.transport.abort()
            assert (await harness.post(beat(2).to_json()))[0] == 200

    asyncio.run(check())
    assert not caplog.records


def test_a_heartbeat_in_progress_is_answered_when_the_coordinator_stops() -> None:
    async def check() -> None:
        stopping: list[asyncio.Task[None]] = []

        async def stop_then_authenticate(token: str) -> PodIdentity | None:
            stopping.append(asyncio.create_task(harness.coordinator.stop()))
            for _ in range(20):
                await asyncio.sleep(0)
            return await authenticate(token)

        async with listening(stop_then_authenticate) as harness:
            status, _ = await harness.post(beat().to_json())
            await stopping[0]
        assert status == 200

    asyncio.run(check())


def test_port_in_use_is_an_os_error() -> None:
    async def check() -> None:
        async with listening() as harness:
            other = Coordinator(
                HeartbeatStore(), authenticate, answer, lambda *key: None, lambda: NOON, changes=harness.changes
            )
            with pytest.raises(OSError, match="Address already in use"):
                await other.start("127.0.0.1", int(harness.url.rpartition(":")[2]))

    asyncio.run(check())


WAITING = beat().model_copy(update={"waiting": True})
JOINING = beat().model_copy(update={"joining": True})
WAIT = {"Authorization": f"Bearer {TOKEN}", PREFER: f"wait={WAIT_SECONDS:.0f}"}


@asynccontextmanager
async def holding(replies: list[Reply], hold_seconds: float = 60.0) -> AsyncIterator[CoordinatorHarness]:
    """Listen; each answer is the next of `replies`, and the last one is repeated."""

    def answer_next(_: Heartbeat) -> Reply:
        harness.answered.set()
        return replies.pop(0) if len(replies) > 1 else replies[0]

    async with listening(answer=answer_next, hold_seconds=hold_seconds) as harness:
        yield harness


NOTHING = Reply(attempt=1, beat_seconds=1.0)
NEWS = [
    Reply(attempt=2, beat_seconds=1.0),
    Reply(order=Order.SAVE_AND_STOP, attempt=1, beat_seconds=1.0),
    Reply(
        world=NewWorld(attempt=2, node_rank=0, num_nodes=2, master_addr="here", master_port=29500),
        attempt=2,
        beat_seconds=1.0,
    ),
    Reply(peer_lost=True, beat_seconds=1.0),
]


@pytest.mark.parametrize("sent", [WAITING, JOINING], ids=["waiting", "joining"])
@pytest.mark.parametrize("news", NEWS, ids=["superseded", "order", "world", "peer-lost"])
def test_a_pod_without_ranks_receives_news_as_soon_as_its_job_changes(sent: Heartbeat, news: Reply) -> None:
    async def check() -> None:
        async with holding([NOTHING, NOTHING, news]) as harness:
            request = asyncio.create_task(harness.request(sent, WAIT))
            await harness.answered.wait()
            harness.changes.notify(("default", "other"))
            # This change brings no news, so the reply is held until the next one.
            harness.changes.notify(("default", "circles"))
            harness.answered.clear()
            await harness.answered.wait()
            assert not request.done()
            harness.changes.notify(("default", "circles"))
            assert await request == news

    asyncio.run(check())


@pytest.mark.parametrize(
    ("newest", "headers", "replies"),
    [
        (beat(), WAIT, [NOTHING]),
        (WAITING, {"Authorization": f"Bearer {TOKEN}"}, [NOTHING]),
        (WAITING, WAIT, [NEWS[0]]),
    ],
    ids=["with-ranks", "not-asked", "news"],
)
def test_other_replies_are_not_held(newest: Heartbeat, headers: dict[str, str], replies: list[Reply]) -> None:
    async def check() -> None:
        async with holding(list(replies)) as harness:
            assert (await harness.request(newest, headers)).attempt == replies[0].attempt

    asyncio.run(check())


def test_a_held_reply_is_sent_before_its_pod_counts_as_silent_and_the_next_heartbeat_is_due_at_once() -> None:
    async def check() -> None:
        async with holding([NOTHING.model_copy(update={"beat_seconds": 0.2})], hold_seconds=0.2) as harness:
            reply = await harness.request(WAITING, WAIT)
            assert reply.attempt == 1
            assert reply.beat_seconds == MIN_BEAT_SECONDS
            assert len(harness.changes) == 0

    asyncio.run(check())


def test_held_replies_are_sent_when_the_coordinator_stops() -> None:
    async def check() -> None:
        async with holding([NOTHING]) as harness:
            request = asyncio.create_task(harness.request(WAITING, WAIT))
            await harness.answered.wait()
            harness.answered.clear()
            await harness.coordinator.stop()
            # The interval is the regular one: the next coordinator must not be asked by all pods at once.
            assert await request == NOTHING
            assert not harness.answered.is_set()

    asyncio.run(check())


@pytest.mark.parametrize(
    ("prefer", "seconds"),
    [
        ("wait=20", 20.0),
        ("respond-async, WAIT = 7; foo=1", 7.0),
        ("", 0.0),
        ("wait", 0.0),
        ("wait=soon", 0.0),
        ("wait=-5", 0.0),
        ("handling=strict", 0.0),
        ("wait=" + 40 * "9", MAX_SECONDS),
    ],
)
def test_the_wanted_time_is_read_as_rfc_7240_defines_it(prefer: str, seconds: float) -> None:
    assert read_wait_seconds(prefer) == seconds
