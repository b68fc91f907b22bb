"""The table of errors: which ones are outages. Errors are real ones where a real one can be made here."""

from __future__ import annotations

import errno
import http.client
import os
import socket
import threading
import urllib.error
from datetime import UTC, datetime, timedelta
from email.message import Message
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import aiohttp
import botocore.exceptions  # type: ignore[import-untyped]
import httpx2
import pytest
import requests
from azure.core.exceptions import HttpResponseError
from azure.storage.blob import StorageErrorCode
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled
from safetensors import SafetensorError

from finetune_contract.bucket import BucketError
from finetune_contract.exit_codes import ExitCode
from finetune_trainer.errors import ConfigError, DataError, FabricError, NetworkError, StaleError, StorageError
from finetune_trainer.outages import Outage, exit_code_of, find_outage, http_status, retry_after_seconds
from finetune_trainer.patience import Patience
from finetune_trainer.pauses import pause_together
from finetune_trainer.train.preemption_notice import PreemptionNotice

NOW = datetime(2026, 1, 1, tzinfo=UTC)
URL = "http://127.0.0.1/"


def answer(status: int, **headers: str) -> HfHubHTTPError:
    """Return the error of the hub's library for an answer."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    response = httpx2.Response(status, headers=named, request=httpx2.Request("GET", URL))
    return HfHubHTTPError(f"{status}", response=response)


def store_answer(code: str, status: int) -> Exception:
    """Return the error of the client of S3 for an answer."""
    response = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}
    error: Exception = botocore.exceptions.ClientError(response, "GetObject")
    return error


def azure_answer(code: str, status: int) -> Exception:
    """Return the error of the client of Azure for an answer."""
    error: Any = HttpResponseError("refused")
    error.status_code, error.error_code = status, code
    refused: Exception = error
    return refused


def caused(outer: Exception, inner: Exception) -> Exception:
    """Return an error with its cause."""
    outer.__cause__ = inner
    return outer


NETWORK = [
    *(answer(status) for status in (408, 429, 500, 502, 503, 504)),
    ConnectionRefusedError(errno.ECONNREFUSED, "refused"),
    ConnectionResetError(errno.ECONNRESET, "reset"),
    OSError(errno.ENETUNREACH, "unreachable"),
    OSError(errno.ETIMEDOUT, "timed out"),
    TimeoutError("timed out"),
    socket.gaierror(socket.EAI_AGAIN, "temporary failure in name resolution"),
    httpx2.ConnectError("refused"),
    httpx2.ReadTimeout("timed out"),
    httpx2.RemoteProtocolError("cut off"),
    requests.exceptions.ChunkedEncodingError("cut off"),
    requests.exceptions.ConnectTimeout("timed out"),
    aiohttp.ServerDisconnectedError(),
    aiohttp.ClientPayloadError("cut off"),
    caused(aiohttp.ClientPayloadError("cut off"), aiohttp.http_exceptions.ContentLengthError("cut off")),
    http.client.IncompleteRead(b""),
    RuntimeError("Cannot send a request, as the client has been closed."),
    urllib.error.HTTPError(URL, 503, "unavailable", Message(), None),
    botocore.exceptions.EndpointConnectionError(endpoint_url=URL),
    botocore.exceptions.ReadTimeoutError(endpoint_url=URL),
    botocore.exceptions.ConnectionClosedError(endpoint_url=URL),
    store_answer("SlowDown", 503),
    store_answer("RequestTimeout", 400),
    store_answer("BadDigest", 400),
    azure_answer("Md5Mismatch", 400),
    azure_answer(StorageErrorCode.MD5_MISMATCH, 400),
    # As the libraries and this package wrap them.
    caused(LocalEntryNotFoundError("not in the cache"), answer(429)),
    caused(ConfigError("model.base: cannot fetch"), caused(LocalEntryNotFoundError("no"), httpx2.ConnectError("no"))),
    caused(StorageError("dataset.source"), caused(BucketError("s3://b"), caused(OSError("busy"), answer(503)))),
]
STORAGE = [
    OSError(errno.ENOSPC, "full"),
    OSError(errno.EDQUOT, "quota"),
    OSError(errno.EIO, "input/output error"),
    OSError(errno.ESTALE, "stale"),
    SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    RuntimeError("[enforce fail at inline_container.cc] . unexpected pos; No space left on device"),
    OSError("Not enough disk space. Needed: 2 GB"),
    caused(DataError("dataset.source: a.png is not a complete image"), OSError(errno.EIO, "input/output error")),
]
PERMANENT = [
    *(answer(status) for status in (400, 401, 403, 404, 410, 416)),
    FileNotFoundError(errno.ENOENT, "missing"),
    PermissionError(errno.EACCES, "denied"),
    OSError(errno.EROFS, "read-only"),
    OSError("image file is truncated"),
    ValueError("wrong column"),
    OfflineModeIsEnabled("offline"),
    caused(LocalEntryNotFoundError("not in the cache"), OfflineModeIsEnabled("offline")),
    httpx2.UnsupportedProtocol("ftp"),
    botocore.exceptions.NoCredentialsError(),
    store_answer("NoSuchBucket", 404),
    store_answer("AccessDenied", 403),
    azure_answer("AuthorizationFailure", 403),
    # The answer of the server decides, not the class around it.
    caused(ConnectionError("could not reach the hub"), answer(404)),
    # A message that quotes another error is not that error.
    ConfigError("the log has: No space left on device"),
]


def name_of(error: Exception) -> str:
    return f"{type(error).__name__} {error}"[:60]


@pytest.mark.parametrize(
    ("error", "outage"),
    [
        *((error, Outage.NETWORK) for error in NETWORK),
        *((error, Outage.STORAGE) for error in STORAGE),
        *((error, None) for error in PERMANENT),
    ],
    ids=lambda value: name_of(value) if isinstance(value, Exception) else "",
)
def test_errors(error: Exception, outage: Outage | None) -> None:
    assert find_outage(error) is outage


def test_an_error_that_is_its_own_cause_ends_the_search() -> None:
    first, second = ValueError("a"), ValueError("b")
    first.__cause__, second.__cause__ = second, first
    assert find_outage(first) is None


@pytest.mark.parametrize(
    ("error", "seconds"),
    [
        (answer(429, Retry_After="7"), 7),
        (answer(429, Retry_After=format_datetime(NOW + timedelta(seconds=40), usegmt=True)), 40),
        (answer(429, Retry_After=format_datetime(NOW - timedelta(seconds=40), usegmt=True)), 0),
        (answer(429, Retry_After="soon"), 0),
        (answer(503), 0),
        (caused(ConfigError("x"), answer(503, Retry_After="3")), 3),
        (ValueError("x"), 0),
    ],
)
def test_retry_after(error: Exception, seconds: float) -> None:
    assert retry_after_seconds(error, NOW) == seconds


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (caused(ConfigError("x"), answer(429)), ExitCode.NETWORK),
        (caused(DataError("x"), OSError(errno.EIO, "x")), ExitCode.STORAGE_OUTAGE),
        (caused(StorageError("x"), OSError(errno.ENOSPC, "x")), ExitCode.STORAGE_OUTAGE),
        (caused(StorageError("x"), PermissionError(errno.EACCES, "x")), ExitCode.STORAGE),
        (caused(StaleError("x"), OSError(errno.ENOSPC, "x")), ExitCode.STALE),
        (caused(FabricError("x"), ConnectionResetError()), ExitCode.FABRIC),
        (ConfigError("x"), ExitCode.CONFIG),
        (NetworkError("x"), ExitCode.NETWORK),
    ],
)
def test_exit_codes(error: ConfigError, code: ExitCode) -> None:
    assert exit_code_of(error, error.code) is code


def test_an_exit_code_is_no_http_status() -> None:
    assert http_status(ConfigError("x")) is None
    assert http_status(SystemExit(404)) is None


class Clock:
    """A clock that only pauses move. The preemption notice, at a time in seconds, ends a pause."""

    def __init__(self, notice_at: float = float("inf")) -> None:
        self.seconds = 0.0
        self.notice_at = notice_at
        self.sleeps: list[float] = []

    def pause(self, seconds: float) -> bool:
        seconds = min(seconds, max(0.0, self.notice_at - self.seconds))
        self.seconds += seconds
        self.sleeps.append(seconds)
        return self.seconds >= self.notice_at


def patience(clock: Clock, lines: list[str], limit: float = 100.0, draw: float = 0.0) -> Patience:
    return Patience(lines.append, lambda: limit, lambda: clock.seconds, clock.pause, lambda: draw)


def failing(*errors: Exception) -> list[Exception]:
    return list(errors)


def run(patient: Patience, errors: list[Exception]) -> str:
    def action() -> str:
        if errors:
            raise errors.pop(0)
        return "done"

    return patient.wait_out("fetching", action)


def test_pauses_double_up_to_a_limit_and_the_detail_shows_the_wait() -> None:
    clock, lines = Clock(), list[str]()
    assert run(patience(clock, lines, limit=1000), failing(*[answer(503)] * 8)) == "done"
    assert clock.sleeps == [0.5, 1, 2, 4, 8, 16, 30, 30]
    assert lines[0] == "fetching failed (503): try 2 in 0.5 s"
    assert lines[-1] == ""
    assert len(lines) == 9


def test_the_pause_is_as_long_as_the_server_asks_and_jitter_only_makes_it_longer() -> None:
    clock = Clock()
    run(patience(clock, [], draw=0.9), failing(answer(429, Retry_After="20"), answer(429)))
    assert clock.sleeps == pytest.approx([20 * 1.45, 1 * 1.45])


@pytest.mark.parametrize(
    ("error", "kind"), [(answer(429), NetworkError), (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), StorageError)]
)
def test_the_attempt_ends_with_the_cause_when_the_limit_is_reached(error: Exception, kind: type[Exception]) -> None:
    clock = Clock()
    with pytest.raises(kind, match=r"fetching failed: .*\(tried 4 times in 4 s; the next attempt tries again\)") as got:
        run(patience(clock, [], limit=5), failing(*[error] * 9))
    assert clock.seconds == 3.5
    assert got.value.__cause__ is error


def test_a_delay_beyond_the_limit_is_not_waited_for() -> None:
    clock = Clock()
    with pytest.raises(NetworkError, match="tried once"):
        run(patience(clock, []), failing(answer(429, Retry_After="3600")))
    assert clock.sleeps == []


def test_a_preemption_notice_ends_the_wait_after_one_more_try() -> None:
    clock, errors = Clock(notice_at=5), failing(*[answer(503)] * 9)
    with pytest.raises(NetworkError, match="tried 5 times in 5 s"):
        run(patience(clock, [], limit=600), errors)
    assert clock.sleeps == [0.5, 1, 2, 1.5]
    # The notice has arrived: the next read has one more try, too.
    with pytest.raises(NetworkError, match="tried 2 times in 0 s"):
        run(patience(clock, [], limit=600), errors)


def test_the_last_try_after_a_preemption_notice_can_succeed() -> None:
    assert run(patience(Clock(notice_at=2), []), failing(*[answer(503)] * 3)) == "done"


def test_the_notice_of_one_rank_ends_the_pause_of_all() -> None:
    clocks = [Clock(), Clock(notice_at=3.5)]

    def gather(_: int) -> list[int]:
        return [int(clock.seconds >= clock.notice_at) for clock in clocks]

    def pause(seconds: float) -> bool:
        for clock in clocks:
            clock.pause(seconds)
        # This is what rank 0 returns, which has no notice.
        return False

    assert pause_together(30, pause, gather)
    assert [clock.seconds for clock in clocks] == [4, 3.5]
    assert not pause_together(2.5, Clock().pause, lambda number: [number])


def test_a_pause_of_a_rank_ends_with_its_notice() -> None:
    notice = PreemptionNotice()
    notice.hold()
    assert not notice.pause(0.0)
    giver = threading.Thread(target=notice.give)
    giver.start()
    assert notice.pause(3600.0)
    giver.join()
    assert notice.given


def test_a_permanent_error_is_raised_at_once() -> None:
    clock, lines = Clock(), list[str]()
    with pytest.raises(HfHubHTTPError):
        run(patience(clock, lines), failing(answer(404)))
    assert (clock.sleeps, lines) == ([], [])


def test_an_exhausted_wait_is_not_repeated_by_an_outer_one() -> None:
    clock = Clock()
    with pytest.raises(NetworkError):
        run(patience(clock, []), failing(caused_network()))
    assert clock.sleeps == []


def caused_network() -> Exception:
    return caused(NetworkError("the hub does not answer"), answer(503))


def test_real_read_error(tmp_path: Path) -> None:
    (tmp_path / "a.png").symlink_to("/proc/self/mem")
    with pytest.raises(OSError, match="Input/output error") as caught:
        (tmp_path / "a.png").read_bytes()
    assert find_outage(caught.value) is Outage.STORAGE
