"""The table of errors: which ones are outages, after which the same action can succeed, and of what.

All other errors are permanent. An error counts as an outage if the table says so of it or of an error that caused it,
whatever class a library or this package gave it on the way. Pure; imports none of the libraries.
"""

from __future__ import annotations

import email.utils
import errno
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import Enum

from finetune_contract.exit_codes import ExitCode


class Outage(Enum):
    """What does not work at the moment."""

    NETWORK = "network"
    """A server does not answer, refuses to at the moment, or cannot be reached."""
    STORAGE = "storage"
    """A disk or a mounted file system is full, or fails to read or write."""


@dataclass(frozen=True)
class ErrorRow:
    """One row of the table."""

    applies: Callable[[BaseException], bool]
    outage: Outage | None
    """None: the error is permanent."""


_STORAGE_ERRNOS = frozenset(
    {
        *(errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE, errno.EREMOTEIO, errno.ENOLCK),
        *(errno.ENOTCONN, errno.ESHUTDOWN),
    }
)
"""ENOTCONN and ESHUTDOWN: the process behind a FUSE mount has exited."""
_NETWORK_ERRNOS = frozenset(
    {
        *(errno.ECONNREFUSED, errno.ECONNRESET, errno.ECONNABORTED, errno.EPIPE, errno.ETIMEDOUT),
        *(errno.ENETDOWN, errno.ENETUNREACH, errno.ENETRESET, errno.EHOSTDOWN, errno.EHOSTUNREACH),
    }
)
_NETWORK_TEXTS = ("as the client has been closed",)
"""After a refused connection, the hub's library closes the client that its other threads are using."""
_STORAGE_TEXTS = (
    *("no space left on device", "disk quota exceeded", "not enough disk space"),
    *("input/output error", "stale file handle", "stale nfs file handle"),
)
"""Parts of the messages of libraries in Rust and C++, whose errors carry no number, in lower case."""
_BUSY_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504, 507, 509, 520, 521, 522, 523, 524, 529})
"""HTTP status of a server that refuses or fails now. The last ones are those of content delivery networks."""
_BUSY_CODES = frozenset(
    {
        *("SlowDown", "Throttling", "ThrottlingException", "RequestLimitExceeded", "TooManyRequestsException"),
        *("RequestTimeout", "RequestTimeoutException", "InternalError", "ServiceUnavailable", "BandwidthLimitExceeded"),
        "RequestTimeTooSkewed",
        *("BadDigest", "XAmzContentSHA256Mismatch", "XAmzContentChecksumMismatch", "Md5Mismatch"),
    }
)
"""Codes in the answers of object stores. The last ones: the contents were damaged on their way."""
_PERMANENT_CLASSES = frozenset(
    {
        # A ConnectionError by its class: the user has switched the network off.
        "huggingface_hub.OfflineModeIsEnabled",
        "datasets.OfflineModeIsEnabled",
        *(
            f"{package}.{name}"
            for package in ("httpx", "httpx2")
            for name in ("UnsupportedProtocol", "TooManyRedirects")
        ),
        *(f"requests.{name}" for name in ("InvalidURL", "MissingSchema", "TooManyRedirects")),
        *("botocore.NoCredentialsError", "botocore.PartialCredentialsError"),
    }
)
_NETWORK_CLASSES = frozenset(
    {
        *(f"{package}.TransportError" for package in ("httpx", "httpx2")),
        *(
            f"{package}.{name}"
            for package in ("httpcore", "httpcore2")
            for name in ("NetworkError", "TimeoutException")
        ),
        *(f"requests.{name}" for name in ("ConnectionError", "Timeout", "ChunkedEncodingError")),
        *(f"urllib3.{name}" for name in ("ProtocolError", "TimeoutError", "NewConnectionError", "MaxRetryError")),
        *(f"http.{name}" for name in ("IncompleteRead", "BadStatusLine")),
        *(f"aiohttp.{name}" for name in ("ClientConnectionError", "ClientPayloadError")),
        *(f"botocore.{name}" for name in ("HTTPClientError", "ConnectionError", "ResponseStreamingError")),
        *("botocore.IncompleteReadError", "fsspec.FSTimeoutError", "gcsfs.HttpError", "azure.ServiceRequestError"),
        *("azure.ServiceResponseError", "azure.IncompleteReadError"),
    }
)
"""Classes of errors by the name of their package, so that no library is imported."""

_CODES = {Outage.NETWORK: ExitCode.NETWORK, Outage.STORAGE: ExitCode.STORAGE_OUTAGE}
_REPLACED = frozenset({ExitCode.CONFIG, ExitCode.DATA, ExitCode.STORAGE, ExitCode.SOFTWARE})


def _has_errno(errnos: frozenset[int]) -> Callable[[BaseException], bool]:
    return lambda error: isinstance(error, OSError) and error.errno in errnos


def _has_class(names: frozenset[str]) -> Callable[[BaseException], bool]:
    def applies(error: BaseException) -> bool:
        return any(f"{each.__module__.partition('.')[0]}.{each.__name__}" in names for each in type(error).__mro__)

    return applies


def _has_text(texts: tuple[str, ...]) -> Callable[[BaseException], bool]:
    def applies(error: BaseException) -> bool:
        # The messages of this package quote others; what they quote is among the causes.
        is_own = type(error).__module__.startswith("finetune_trainer.")
        return not is_own and any(text in str(error).lower() for text in texts)

    return applies


def _has_status(test: Callable[[int], bool]) -> Callable[[BaseException], bool]:
    def applies(error: BaseException) -> bool:
        status = http_status(error)
        return status is not None and test(status)

    return applies


TABLE: tuple[ErrorRow, ...] = (
    ErrorRow(_has_class(_PERMANENT_CLASSES), None),
    # The status of aiohttp's parser is not one of a server: 400 for an answer that is cut off.
    ErrorRow(_has_class(frozenset({"aiohttp.HttpProcessingError"})), Outage.NETWORK),
    # The answer of a server says more than the class of the error.
    ErrorRow(lambda error: _answer_code(error) in _BUSY_CODES, Outage.NETWORK),
    ErrorRow(_has_status(_BUSY_STATUS.__contains__), Outage.NETWORK),
    ErrorRow(_has_status(lambda status: status >= 400), None),
    ErrorRow(_has_errno(_STORAGE_ERRNOS), Outage.STORAGE),
    ErrorRow(_has_errno(_NETWORK_ERRNOS), Outage.NETWORK),
    ErrorRow(_has_text(_STORAGE_TEXTS), Outage.STORAGE),
    # A name that does not exist looks like a resolver that does not work.
    ErrorRow(lambda error: isinstance(error, (ConnectionError, TimeoutError, socket.gaierror)), Outage.NETWORK),
    ErrorRow(_has_class(_NETWORK_CLASSES), Outage.NETWORK),
    ErrorRow(_has_text(_NETWORK_TEXTS), Outage.NETWORK),
)
"""The first row that applies to an error decides."""


def find_outage(error: BaseException) -> Outage | None:
    """Return the outage behind an error; None if the error is permanent.

    The innermost cause that the table knows decides: libraries wrap a refused connection in "not found".
    """
    for each in reversed(tuple(_causes(error))):
        for row in TABLE:
            if row.applies(each):
                return row.outage
    return None


def exit_code_of(error: BaseException, code: ExitCode) -> ExitCode:
    """Return the exit code for an error that ends a rank: that of the outage behind it, or else `code`.

    The codes of a lost peer, of a newer attempt and of checkpoints that are too old stay: they say more.
    """
    outage = find_outage(error) if code in _REPLACED else None
    return code if outage is None else _CODES[outage]


def retry_after_seconds(error: BaseException, now: datetime) -> float:
    """Return how long the server asks its client to wait (Retry-After); 0 if it does not."""
    for each in _causes(error):
        headers = getattr(getattr(each, "response", None), "headers", None) or getattr(each, "headers", None)
        value = headers.get("Retry-After") if headers is not None and hasattr(headers, "get") else None
        if value is not None:
            return _seconds_of(str(value), now)
    return 0.0


def root_of(error: BaseException) -> BaseException:
    """Return the innermost cause of an error that the table knows; the error itself if there is none."""
    for each in reversed(tuple(_causes(error))):
        if any(row.applies(each) for row in TABLE):
            return each
    return error


def http_status(error: BaseException) -> int | None:
    """Return the HTTP status that an error of any client carries; None if it carries none."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    else:
        status = getattr(response, "status_code", None)
    for name in ("status", "status_code", "code"):
        if status is None and not isinstance(error, OSError | SystemExit):
            status = getattr(error, name, None)
    # urllib's error is an OSError.
    if status is None and type(error).__name__ == "HTTPError":
        status = getattr(error, "code", None)
    return status if isinstance(status, int) and 100 <= status < 600 else None


def _answer_code(error: BaseException) -> str | None:
    """Return the code in the answer of S3 or Azure."""
    if (code := getattr(error, "error_code", None)) is not None:
        return str(getattr(code, "value", code))
    response = getattr(error, "response", None)
    found = response.get("Error") if isinstance(response, dict) else None
    return found.get("Code") if isinstance(found, dict) else None


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and what caused it, outermost first."""
    seen: set[int] = set()
    each: BaseException | None = error
    while each is not None and id(each) not in seen:
        seen.add(id(each))
        yield each
        each = each.__cause__ or (None if each.__suppress_context__ else each.__context__)


def _seconds_of(value: str, now: datetime) -> float:
    """Return the delay that a Retry-After header specifies: a number of seconds, or a date."""
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        date = email.utils.parsedate_to_datetime(value)
    except ValueError:
        return 0.0
    return max(0.0, (date.replace(tzinfo=date.tzinfo or UTC) - now).total_seconds())
