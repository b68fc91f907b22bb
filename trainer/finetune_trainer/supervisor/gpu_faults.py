"""Faults of the pod's GPUs, as the driver reports them through NVML. Started by `main`, in a thread of its own.

The thread waits for events of the driver. Without GPUs, without the package nvidia-ml-py, or where the driver reports
no events (a part of a GPU, MIG), there is nothing to watch.
"""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable
from typing import Any

from finetune_contract.heartbeat import MAX_GPU_FAULTS, GpuFault
from finetune_trainer.supervisor.log import log
from finetune_trainer.supervisor.xid import FAULTS, describe_fault

WAIT_MILLISECONDS = 1000
"""Time after which the thread looks whether it must end."""
MODULE = "pynvml"


class GpuWatch:
    """Collects faults of the GPUs that this process can see.

    Args:
        on_fault: called in the watching thread after a fault was added.
        module: name of the module with NVML's functions.
    """

    def __init__(self, on_fault: Callable[[], None], module: str = MODULE) -> None:
        self._on_fault, self._module = on_fault, module
        self._faults: dict[tuple[str, int | None], GpuFault] = {}
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def faults(self) -> tuple[GpuFault, ...]:
        """Return the first faults, in their order."""
        return tuple(self._faults.values())[:MAX_GPU_FAULTS]

    def start(self) -> bool:
        """Start to watch; return whether there is something to watch."""
        try:
            nvml = importlib.import_module(self._module)
        except ImportError:
            return False
        try:
            nvml.nvmlInit()
            events, handles = _register(nvml)
        except Exception as error:
            # Every driver has errors of its own; a pod without GPUs has no driver.
            log(f"errors of GPUs are not watched: {error}")
            return False
        if not handles:
            return False
        self._thread = threading.Thread(target=self._watch, args=(nvml, events), name="gpu-faults", daemon=True)
        self._thread.start()
        return True

    def stop(self) -> None:
        """End the watching thread."""
        self._stopped.set()
        if self._thread is not None:
            self._thread.join()

    def _watch(self, nvml: Any, events: Any) -> None:
        while not self._stopped.is_set():
            try:
                event = nvml.nvmlEventSetWait_v2(events, WAIT_MILLISECONDS)
            except nvml.NVMLError as error:
                if getattr(error, "value", None) == nvml.NVML_ERROR_TIMEOUT:
                    continue
                log(f"errors of GPUs are no longer watched: {error}")
                return
            self._add(nvml, event)

    def _add(self, nvml: Any, event: Any) -> None:
        is_xid = bool(event.eventType & nvml.nvmlEventTypeXidCriticalError)
        xid = int(event.eventData) if is_xid else None
        if xid is not None and xid not in FAULTS:
            log(f"the driver reports XID {xid}, which programs can cause")
            return
        try:
            uuid = _text(nvml.nvmlDeviceGetUUID(event.device))
        except nvml.NVMLError:
            # A GPU that has fallen off the bus may not answer.
            uuid = "unknown"
        if (uuid, xid) not in self._faults:
            fault = GpuFault(uuid=uuid[:96], xid=xid, message=describe_fault(uuid, xid))
            self._faults[uuid, xid] = fault
            log(fault.message)
            self._on_fault()


def _register(nvml: Any) -> tuple[Any, list[Any]]:
    """Return an event set, and the GPUs whose faults it receives."""
    events, handles = nvml.nvmlEventSetCreate(), []
    wanted = nvml.nvmlEventTypeXidCriticalError | nvml.nvmlEventTypeDoubleBitEccError
    for index in range(nvml.nvmlDeviceGetCount()):
        handle = nvml.nvmlDeviceGetHandleByIndex(index)
        supported = nvml.nvmlDeviceGetSupportedEventTypes(handle) & wanted
        if supported:
            nvml.nvmlDeviceRegisterEvents(handle, supported, events)
            handles.append(handle)
    return events, handles


def _text(value: str | bytes) -> str:
    """Return a text of NVML: older versions of the package return bytes."""
    return value.decode() if isinstance(value, bytes) else value
