"""Requests to the API server in plain JSON, over the asyncio client of the `kubernetes` package.

The package's model classes are not used: thousands of instances would take most of the memory, and `plan` reads few of
their fields. All requests of the operator go through `KubeApi.request` and `KubeApi.watch`, and so do the rules that
hold for all of them: request metrics, the server's clock, and that only the leader writes.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlencode

import aiohttp
from kubernetes.aio import config
from kubernetes.aio.client import ApiClient, Configuration
from pydantic_core import from_json, to_json

from finetune_operator.cluster.kube.client.clock import ServerClock

Json = dict[str, Any]

JSON = "application/json"
PARTIAL_LIST = "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1"
PARTIAL = "application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1"
"""Media types of objects without spec, data and status: less to transfer and to parse."""
APPLY = "application/apply-patch+yaml"
MERGE = "application/merge-patch+json"
STRATEGIC = "application/strategic-merge-patch+json"

STRICT = {"fieldValidation": "Strict"}
"""Makes the API server refuse unknown fields in `spec.podTemplate` instead of dropping them."""
LENIENT = {"fieldValidation": "Ignore"}
"""For objects of the operator's own: an older definition drops what it does not know, without a search for it."""

CONNECT_SECONDS = 5.0
REQUEST_SECONDS = 40.0
"""Longer than the longest timeout of an admission webhook (30 s), so that its answer is received."""
WATCH_SILENCE_SECONDS = 150.0
"""The API server sends a bookmark about once a minute; a watch that is silent for longer is broken."""
BAD_REQUEST, FORBIDDEN, NOT_FOUND, CONFLICT, GONE, TOO_MANY = 400, 403, 404, 409, 410, 429
TRANSIENT = frozenset({TOO_MANY, 401, 408, 500, 502, 503, 504})
"""Status codes that do not depend on the request itself: the same request may succeed later.

401 is one of them: an API server that has just started refuses tokens that it accepts a moment later.
"""


class ApiError(Exception):
    """The API server refused a request, or did not answer it (status 0)."""

    def __init__(self, status: int, reason: str, message: str, retry_after_seconds: float | None = None) -> None:
        super().__init__(f"{status} {reason}: {message}" if status else f"{reason}: {message}")
        self.status = status
        self.reason = reason
        self.message = message
        self.retry_after_seconds = retry_after_seconds

    @property
    def transient(self) -> bool:
        """Return whether the same request may succeed later."""
        return self.status == 0 or self.status in TRANSIENT

    @property
    def already_exists(self) -> bool:
        """Return whether an object with this name exists."""
        return self.status == CONFLICT and self.reason == "AlreadyExists"


class SetupError(Exception):
    """The operator's environment is not usable (credentials, certificates); the message gives the cause."""


class NotLeaderError(Exception):
    """This process may not write: another replica may be the leader.

    Retry after `LEADER_SECONDS`. Either the lease was only renewed late, for example because the API server is slow, or
    the term of leadership ends, and its end cancels the retry.
    """


LEADER_SECONDS = 1.0
"""Delay before a write is tried again that the lease did not allow."""


class RequestHook(Protocol):
    """Observer of requests: metrics, and tests that kill the process between two requests."""

    def before(self, method: str, path: str) -> None:
        """Handle a request that is about to be sent."""

    def after(self, method: str, path: str, status: int, seconds: float) -> None:
        """Handle the response to a request; status 0 means no response."""


class KubeApi:
    """Requests as one user, over a pool of persistent connections."""

    def __init__(self, client: ApiClient, clock: ServerClock, hooks: tuple[RequestHook, ...] = ()) -> None:
        self._client = client
        self._clock = clock
        self._hooks = hooks
        self.may_write: Callable[[], bool] = lambda: True
        """Called before each write; the leader election replaces it."""

    async def close(self) -> None:
        """Close all connections."""
        await self._client.close()

    async def get(self, path: str, query: Mapping[str, str] | None = None, accept: str = JSON) -> Json:
        """Read an object, or a page of a list."""
        return await self.request("GET", path, query=query, accept=accept)

    async def create(self, path: str, manifest: Mapping[str, Any]) -> Json:
        """Create an object in the collection at `path`; return its metadata. Unknown fields are refused."""
        return await self.request("POST", path, manifest, query=STRICT, accept=PARTIAL)

    async def replace(self, path: str, manifest: Mapping[str, Any]) -> Json:
        """Replace an object or its status if it still has the manifest's resource version; return its metadata."""
        return await self.request("PUT", path, manifest, query=LENIENT, accept=PARTIAL)

    async def apply(self, path: str, manifest: Mapping[str, Any], manager: str) -> Json:
        """Apply an object on the server; values of other managers in our fields are overwritten."""
        query = {"fieldManager": manager, "force": "true"}
        return await self.request("PATCH", path, manifest, query=query, content_type=APPLY)

    async def delete(self, path: str, options: Mapping[str, Any]) -> Json:
        """Delete an object, with DeleteOptions."""
        return await self.request("DELETE", path, {"kind": "DeleteOptions", "apiVersion": "v1", **options})

    async def request(  # noqa: PLR0913  each is a part of an HTTP request
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        query: Mapping[str, str] | None = None,
        content_type: str = JSON,
        accept: str = JSON,
        seconds: float = REQUEST_SECONDS,
        without_lease: bool = False,
    ) -> Json:
        """Send one request and return its decoded response.

        Args:
            method: HTTP method.
            path: path on the API server, without the query.
            body: JSON-serializable body.
            query: query parameters.
            content_type: media type of the body.
            accept: media type of the response.
            seconds: timeout.
            without_lease: allow a write that does not depend on leadership, such as a review or the lease itself.

        Raises:
            ApiError: the request was refused, or got no response in time.
            NotLeaderError: it is a write, and this process is not the leader.
        """
        if method != "GET" and not without_lease and not self.may_write():
            raise NotLeaderError
        loop = asyncio.get_running_loop()
        started, status = loop.time(), 0
        for hook in self._hooks:
            hook.before(method, path)
        try:
            async with asyncio.timeout(seconds):
                headers = {"Accept": accept, "Content-Type": content_type}
                response = await self._send(method, _url(path, query), body, headers)
                status, data = response.status, await response.read()
        except (TimeoutError, aiohttp.ClientError, OSError) as error:
            raise ApiError(0, type(error).__name__, str(error) or f"no answer to {method} {path}") from error
        finally:
            for hook in self._hooks:
                hook.after(method, path, status, loop.time() - started)
        self._clock.sync(response.headers.get("Date"))
        if status >= BAD_REQUEST:
            raise _error(status, response.headers, data)
        answer: Json = from_json(data, cache_strings="keys")
        return answer

    async def watch(self, path: str, query: Mapping[str, str], accept: str = JSON) -> AsyncGenerator[Json, None]:
        """Stream the events of a watch until the server ends it.

        Raises:
            ApiError: the watch was refused, the connection broke, or it was silent for too long.
        """
        for hook in self._hooks:
            hook.before("WATCH", path)
        stream = self.lines(path, {**query, "watch": "true"}, accept, WATCH_SILENCE_SECONDS)
        async with aclosing(stream) as lines:
            async for line in lines:
                try:
                    yield from_json(line, cache_strings="keys")
                except ValueError as error:
                    raise ApiError(0, type(error).__name__, f"the watch of {path} broke: {error}") from error

    async def lines(
        self,
        path: str,
        query: Mapping[str, str],
        accept: str = "*/*",
        silence_seconds: float | None = None,
    ) -> AsyncGenerator[bytes, None]:
        """Stream the lines of a response until the server ends it.

        Raises:
            ApiError: the request was refused, the connection broke, or it was silent for too long.
        """
        try:
            response = await self._send("GET", _url(path, query), None, {"Accept": accept}, silence_seconds)
            try:
                if response.status >= BAD_REQUEST:
                    raise _error(response.status, response.headers, await response.read())
                async for line in response.content:
                    yield line
            finally:
                response.close()
        except (TimeoutError, aiohttp.ClientError, OSError, ValueError) as error:
            raise ApiError(0, type(error).__name__, str(error) or f"the stream of {path} broke") from error

    async def _send(
        self, method: str, path: str, body: Any, headers: dict[str, str], silence_seconds: float | None = None
    ) -> aiohttp.ClientResponse:
        """Send a request with the client's own connection pool and credentials."""
        headers["User-Agent"] = self._client.user_agent
        await self._client.update_params_for_auth(headers, [], ["BearerToken"], path, method, body)
        limits = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS, sock_read=silence_seconds)
        options: dict[str, Any] = {"headers": headers, "timeout": limits, **self._options}
        if body is not None:
            options["data"] = to_json(body)
        # Not by the client's own method: its checks and its JSON encoder take half of the time of a request.
        return await self._pool.request(method, self._client.configuration.host + path, **options)

    @cached_property
    def _options(self) -> dict[str, Any]:
        """What the kubeconfig specifies for every request: the server name of TLS, and a proxy."""
        rest, configuration = self._client.rest_client, self._client.configuration
        options = {
            "server_hostname": configuration.tls_server_name,
            "proxy": rest.proxy,
            "proxy_headers": rest.proxy_headers,
        }
        return {name: value for name, value in options.items() if value}

    @property
    def _pool(self) -> aiohttp.ClientSession:
        """The client's own connection pool, which it creates on first use."""
        rest = self._client.rest_client
        if rest.pool_manager is None:
            rest.pool_manager = rest._create_pool_manager()  # there is no public way
        pool: aiohttp.ClientSession = rest.pool_manager
        return pool


async def connect(kubeconfig: Path | None, context: str | None = None, num_connections: int = 64) -> ApiClient:
    """Return a client for a kubeconfig; without one, for the pod's service account.

    Raises:
        SetupError: the credentials cannot be read.
    """
    configuration = Configuration()
    try:
        if kubeconfig is not None:
            await config.load_kube_config(str(kubeconfig), context, client_configuration=configuration)
        else:
            loader = config.incluster_config.InClusterConfigLoader(
                token_filename=config.incluster_config.SERVICE_TOKEN_FILENAME,
                cert_filename=config.incluster_config.SERVICE_CERT_FILENAME,
            )
            loader.load_and_set(configuration)
    except (config.ConfigException, OSError) as error:
        source = (
            f"the kubeconfig {kubeconfig}"
            if kubeconfig
            else "this pod's service account (set --kubeconfig to run outside a pod)"
        )
        raise SetupError(f"cannot read {source}: {error}") from error
    configuration.connection_pool_maxsize = num_connections
    # Otherwise each request reads proxies and passwords from the environment, in a separate thread.
    configuration.client_session_kwargs = {"trust_env": False}
    return ApiClient(configuration)


class PageReader(Protocol):
    """Reads one page of a list: `KubeApi`, or something that repeats its requests."""

    async def get(self, path: str, query: Mapping[str, str], accept: str) -> Json:
        """Read a page."""


async def iterate_pages(
    api: PageReader, path: str, query: Mapping[str, str], accept: str
) -> AsyncGenerator[Json, None]:
    """Yield the pages of a list, each with its items and the list's resource version.

    Raises:
        ApiError: see `KubeApi.request`; 410 if the list took so long that its snapshot has expired.
    """
    token = ""
    while True:
        page = await api.get(path, {**query, **({"continue": token} if token else {})}, accept)
        yield page
        token = page["metadata"].get("continue") or ""
        if not token:
            return


def _url(path: str, query: Mapping[str, str] | None) -> str:
    return f"{path}?{urlencode(query)}" if query else path


def _error(status: int, headers: Mapping[str, str], data: bytes) -> ApiError:
    try:
        answer = from_json(data)
    except ValueError:
        answer = None
    if not isinstance(answer, dict):
        answer = {"reason": "", "message": data[:300].decode(errors="replace")}
    retry_after = headers.get("Retry-After", "")
    seconds = float(retry_after) if retry_after.isdecimal() else None
    return ApiError(status, answer.get("reason") or "", answer.get("message") or "", seconds)


async def delete_if_present(api: KubeApi, path: str, options: Mapping[str, Any]) -> Json | None:
    """Delete an object; return None if it is already deleted or another object has its name.

    Raises:
        ApiError: the request failed.
    """
    try:
        return await api.delete(path, options)
    except ApiError as error:
        if error.status in (NOT_FOUND, CONFLICT):
            return None
        raise
