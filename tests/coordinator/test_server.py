"""The endpoint, over real HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import aiohttp
import pytest

from finetune_contract.heartbeat import BEAT_PATH, MAX_BEAT_BYTES, Heartbeat, Order, Reply
from finetune_operator.coordinator.beats import BeatBook, PodIdentity
from finetune_operator.coordinator.server import Coordinator
from tests.coordinator.test_beats import IDENTITY, NOON, beat

TOKEN = "right"


@dataclass
class Bed:
    url: str = ""
    book: BeatBook = field(default_factory=BeatBook)
    woken: list[tuple[str, str]] = field(default_factory=list)
    session: aiohttp.ClientSession = field(init=False)

    async def post(self, body: str | bytes, token: str | None = TOKEN) -> tuple[int, str]:
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        async with self.session.post(self.url + BEAT_PATH, data=body, headers=headers) as response:
            return response.status, await response.text()


async def review(token: str) -> PodIdentity | None:
    return IDENTITY if token == TOKEN else None


def answer(newest: Heartbeat) -> Reply:
    return Reply(order=Order.SAVE_AND_STOP, attempt=newest.attempt + 1)


@asynccontextmanager
async def listening() -> AsyncIterator[Bed]:
    bed = Bed()
    coordinator = Coordinator(bed.book, review, answer, lambda *key: bed.woken.append(key), lambda: NOON)
    port = await coordinator.start("127.0.0.1", 0)
    bed.url = f"http://127.0.0.1:{port}"
    bed.session = aiohttp.ClientSession()
    try:
        yield bed
    finally:
        await bed.session.close()
        await coordinator.stop()


def test_a_beat_is_kept_answered_and_wakes() -> None:
    async def check() -> None:
        async with listening() as bed:
            status, text = await bed.post(beat().to_json())
            assert status == 200
            assert Reply.model_validate_json(text) == Reply(order=Order.SAVE_AND_STOP, attempt=2)
            assert bed.woken == [("default", "circles")]
            assert bed.book.of("default", "circles")["uid-1"].received_at == NOON

    asyncio.run(check())


def test_an_older_beat_is_answered_and_changes_nothing() -> None:
    async def check() -> None:
        async with listening() as bed:
            await bed.post(beat(2, step=7).to_json())
            status, _ = await bed.post(beat(1, step=3).to_json())
            assert status == 200
            assert bed.book.of("default", "circles")["uid-1"].beat.ranks[0].step == 7
            assert len(bed.woken) == 1

    asyncio.run(check())


@pytest.mark.parametrize(
    ("body", "token", "status", "words"),
    [
        (beat().to_json(), None, 401, "Authorization: Bearer"),
        (beat().to_json(), "", 401, "Authorization: Bearer"),
        (beat().to_json(), "wrong", 401, "not one of a pod"),
        (beat(pod_uid="other").to_json(), TOKEN, 403, "podUid"),
        ("{", TOKEN, 400, "no beat"),
        ("[]", TOKEN, 400, "no beat"),
        (beat().to_json().replace('"attempt":1', '"attempt":0'), TOKEN, 400, "attempt"),
        (b"\xff\xfe", TOKEN, 400, "no beat"),
        ("x" * (MAX_BEAT_BYTES + 1), TOKEN, 413, str(MAX_BEAT_BYTES)),
        ("x" * (MAX_BEAT_BYTES + 1), "wrong", 401, "not one of a pod"),
    ],
    ids=[
        "no-token",
        "empty-token",
        "wrong-token",
        "claim",
        "cut",
        "list",
        "attempt",
        "bytes",
        "large",
        "large-stranger",
    ],
)
def test_refusals_are_sentences(body: str | bytes, token: str | None, status: int, words: str) -> None:
    async def check() -> None:
        async with listening() as bed:
            refused, text = await bed.post(body, token)
            assert refused == status
            assert words in text
            assert bed.woken == []
            assert not bed.book.of("default", "circles")

    asyncio.run(check())


def test_a_large_body_without_a_length_is_refused() -> None:
    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(MAX_BEAT_BYTES // 1024 + 1):
            yield b"x" * 1024

    async def check() -> None:
        async with (
            listening() as bed,
            bed.session.post(
                bed.url + BEAT_PATH, data=chunks(), headers={"Authorization": f"Bearer {TOKEN}"}
            ) as response,
        ):
            assert response.status == 413

    asyncio.run(check())


def test_a_supervisor_that_dies_within_a_beat_is_no_error_of_ours(caplog: pytest.LogCaptureFixture) -> None:
    async def check() -> None:
        async with listening() as bed:
            port = int(bed.url.rpartition(":")[2])
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            head = [f"POST {BEAT_PATH} HTTP/1.1", "Host: here", f"Authorization: Bearer {TOKEN}", "Content-Length: 100"]
            writer.write("\r\n".join([*head, "", '{"attempt"']).encode())
            await writer.drain()
            assert (await bed.post(beat().to_json()))[0] == 200
            writer.transport.abort()
            assert (await bed.post(beat(2).to_json()))[0] == 200

    asyncio.run(check())
    assert not caplog.records


def test_a_port_that_is_taken_is_an_os_error() -> None:
    async def check() -> None:
        async with listening() as bed:
            other = Coordinator(BeatBook(), review, answer, lambda *key: None, lambda: NOON)
            with pytest.raises(OSError, match="address already in use"):
                await other.start("127.0.0.1", int(bed.url.rpartition(":")[2]))

    asyncio.run(check())
