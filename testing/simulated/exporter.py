"""The process of an export pod: it takes some time, may fail, and completes what an earlier one has left."""

from __future__ import annotations

from signal import SIGTERM

from finetune_contract.exit_codes import ExitCode
from finetune_contract.outputs.request import ExportedOutput, ExportResult
from testing.simulated.engine import Engine
from testing.simulated.kubelet import Kubelets
from testing.simulated.model import SimulatedPod

FAILURES = (ExitCode.STORAGE, ExitCode.NETWORK, ExitCode.SOFTWARE)
FAILING = 0.1
"""Share of the exports that fail."""


class SimulatedExporter:
    """The only process of a pod."""

    def __init__(self, engine: Engine, kubelets: Kubelets, pod: SimulatedPod, seconds: float) -> None:
        self._kubelets = kubelets
        self._pod = pod
        self._alive = True
        code = engine.rng.choice(FAILURES) if engine.chance(FAILING) else ExitCode.DONE
        pod.end = self._end
        pod.notice = lambda: self._end(128 + SIGTERM)
        engine.after(engine.rng.uniform(0.5, 1.5) * seconds, lambda: self._end(code))

    def _end(self, code: int) -> None:
        """Handle the end of the work, SIGTERM, SIGKILL, or the end of the node (a negative code)."""
        if not self._alive:
            return
        self._alive = False
        if code == ExitCode.DONE:
            written = ExportedOutput(index=0, size_bytes=1, sha256="ab")
            self._pod.export_result = ExportResult(outputs=(written,))
        if code >= 0:
            self._kubelets.ended(self._pod, code, None)
