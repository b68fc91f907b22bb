"""The containers next to the trainer's: what a pod waits for, and which of them failed. Pure; part of `observe`.

Admission webhooks inject such containers (service meshes, log collectors, secret stores). A pod starts only when its
init containers are done. Sidecars end with the pod, and their exit codes do not matter if the trainer is done.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime
from typing import Any

from finetune_contract.exit_codes import describe
from finetune_operator.api import names

Json = Mapping[str, Any]
UNSPECIFIC = frozenset({"ContainerCreating", "PodInitializing"})
"""Waiting reasons of a container that waits for its turn."""
PLAIN_REASONS = frozenset({"Error", "Completed"})
"""Reasons of an end that only repeat its exit code."""
FIRST_SIGNAL = 128
"""Exit codes above this number mean that a signal ended the process."""
MAX_CHARACTERS = 400
"""Maximum length of the last output of a container in a message."""


def describe_wait(pod: Json) -> str | None:
    """Return which container a pod waits for, and why; None if all of them run.

    The text begins with the kubelet's reason, by which the plan classifies it.
    """
    status = pod.get("status") or {}
    own = find(status.get("containerStatuses") or (), names.CONTAINER)
    if "terminated" in (own.get("state") or {}):
        return None
    unspecific = None
    for kind, container in _in_order_of_start(status):
        waiting = (container.get("state") or {}).get("waiting")
        if not waiting:
            continue
        text = _join(waiting.get("reason"), kind, container, _wait_details(container, waiting))
        if waiting.get("reason") not in UNSPECIFIC:
            return text
        if container is own:
            unspecific = text
    if not own or "waiting" in (own.get("state") or {}):
        return _describe_running_init_container(pod, status) or unspecific
    return None


def describe_init_failure(status: Json) -> str | None:
    """Return which init container failed, with its last output; None if none did, or if the trainer has started."""
    trainer = find(status.get("containerStatuses") or (), names.CONTAINER).get("state") or {}
    if status.get("phase") != "Failed" or {"running", "terminated"} & set(trainer):
        return None
    failed = (_describe_end("init container", item) for item in status.get("initContainerStatuses") or ())
    return next((text for text in failed if text), None)


def describe_sidecar_failure(status: Json, ended_at: datetime | None) -> str | None:
    """Return which sidecars failed while the trainer was still running; None if none did.

    Args:
        status: status of the pod.
        ended_at: time at which the trainer's container ended; None: it still runs.
    """
    failures = []
    for container in _sidecars(status):
        terminated = (container.get("state") or {}).get("terminated") or {}
        finished_at = terminated.get("finishedAt")
        late = ended_at is not None and (finished_at is None or datetime.fromisoformat(finished_at) > ended_at)
        if not late and (text := _describe_end("sidecar", container)):
            failures.append(text)
    return "; ".join(failures) or None


def find(containers: Iterable[Json], name: str) -> Json:
    """Return the container with this name; an empty one if there is none."""
    return next((container for container in containers if container.get("name") == name), {})


def _in_order_of_start(status: Json) -> Iterator[tuple[str, Json]]:
    """Yield what each container is, and its status: init containers, the trainer, then sidecars."""
    for container in status.get("initContainerStatuses") or ():
        yield "init container", container
    if own := find(status.get("containerStatuses") or (), names.CONTAINER):
        yield "", own
    for container in _sidecars(status):
        yield "sidecar", container


def _sidecars(status: Json) -> list[Json]:
    return [item for item in status.get("containerStatuses") or () if item.get("name") != names.CONTAINER]


def _describe_running_init_container(pod: Json, status: Json) -> str | None:
    """Return the init container that runs, or that has not passed its startup probe; None if there is none."""
    specs = pod["spec"].get("initContainers") or ()
    for container in status.get("initContainerStatuses") or ():
        if "running" not in (container.get("state") or {}):
            continue
        name = container.get("name") or ""
        if find(specs, name).get("restartPolicy") != "Always":
            return f"PodInitializing (init container {name}): it is running"
        if container.get("started") is False:
            return f"PodInitializing (init container {name}): it has not passed its startup probe"
    return None


def _wait_details(container: Json, waiting: Json) -> str:
    """Return the kubelet's message, and why the container ended before, if it is being restarted."""
    last = (container.get("lastState") or {}).get("terminated") or {}
    parts = [waiting.get("message"), _ending(last) if last else None]
    return "; ".join(str(part) for part in parts if part)


def _join(reason: str | None, kind: str, container: Json, details: str) -> str:
    subject = f"{reason} ({kind} {container.get('name')})" if kind else str(reason or "")
    return ": ".join(text for text in (subject, details) if text)


def _describe_end(kind: str, container: Json) -> str | None:
    terminated = (container.get("state") or {}).get("terminated") or {}
    if not terminated.get("exitCode"):
        return None
    return f"{kind} {container.get('name')}: {_ending(terminated)}"


def _ending(terminated: Json) -> str:
    """Return the exit code of a container, the kubelet's reason and its last output, on one line."""
    reason = terminated.get("reason")
    code = int(terminated.get("exitCode") or 0)
    # Only the trainer has the exit codes of the contract.
    parts = [
        describe(code) if code > FIRST_SIGNAL else f"exit code {code}",
        None if reason in PLAIN_REASONS else reason,
    ]
    output = " | ".join(str(terminated.get("message") or "").split("\n")[-3:]).strip(" |")[-MAX_CHARACTERS:]
    return ": ".join(text for text in (", ".join(part for part in parts if part), output) if text)
