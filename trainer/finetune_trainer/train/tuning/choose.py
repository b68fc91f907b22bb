"""Chooses what makes a run fast on its device, and keeps it in the job's folder. Called by `build`."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from pathlib import Path

from finetune_contract import paths
from finetune_contract.run_spec import RunSpec
from finetune_contract.spec import Attention, Sharding, SwitchMode, TrainingSpec
from finetune_trainer.checkpoint.store.select import JobFolders
from finetune_trainer.data.batches import BatchMaker
from finetune_trainer.data.sampling.order import SampleRef
from finetune_trainer.distributed.world import World
from finetune_trainer.methods.method import Method
from finetune_trainer.report import Reporter
from finetune_trainer.train.tuning import attention, compiled, layout
from finetune_trainer.train.tuning.record import KeptChoice

ATTENTION_FILE = "attention.json"
"""File in the job's folder with the order of the attention kernels."""
LAYOUT_FILE = "layout.json"
"""File in the job's folder with the layout of images."""
_DEFAULT_LAYOUT = "channelsLast"
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Tuner:
    """Chooses kernels and compiled code for one run.

    Attributes:
        spec: the run.
        world: the ranks; rank 0 chooses for all.
        folders: the job's folders.
        cache_dir: folder shared by all jobs.
        reporter: receives the choices.
    """

    spec: RunSpec
    world: World
    folders: JobFolders
    cache_dir: Path
    reporter: Reporter

    def choose_attention(self, method: Method, batches: BatchMaker, measure: attention.Measure | None = None) -> None:
        """Let a method use the fastest attention kernels, with `attention: auto` on GPUs. All ranks call it.

        Args:
            method: the method.
            batches: makes a batch, whose shapes are measured.
            measure: measures a kernel; default: on the rank's GPU, if it has one.

        Raises:
            StorageError: the choice cannot be stored.
        """
        device = self.world.device
        if self.spec.training.attention is not Attention.AUTO or (measure is None and device.type != "cuda"):
            return
        if not self._can_run_alone:
            _LOG.info("attention: torch chooses the kernels, because weights are sharded")
            return
        chosen_measure = measure or attention.measure_on_gpu(device)

        def choose() -> list[str]:
            batch = batches.make([SampleRef(0, 0)] * self.spec.training.batch_size)
            counts = attention.count_shapes(lambda: method.losses(method.prepare(batch)))
            order = attention.names_of(attention.order_backends(counts, chosen_measure))
            if order:
                self.reporter.note(f"attention {order[0]}: the fastest kernel for this model on this GPU")
            return order

        order = attention.backends_of(KeptChoice(self.folders, ATTENTION_FILE, self.world).get(choose))
        if order:
            method.use_attention(order)

    def choose_layout(self, method: Method, batches: BatchMaker, measure: layout.Measure | None = None) -> None:
        """Let a method use the faster layout of images, on GPUs. All ranks call it, before passes are captured.

        Args:
            method: the method.
            batches: makes a batch, whose shapes are measured.
            measure: measures a call; default: on the rank's GPU, if it has one.

        Raises:
            StorageError: the choice cannot be stored.
        """
        device = self.world.device
        if (measure is None and device.type != "cuda") or not self._can_run_alone:
            return
        chosen_measure = measure or layout.measure_on_gpu(device)

        def choose() -> str:
            batch = batches.make([SampleRef(0, 0)] * self.spec.training.batch_size)
            calls = layout.count_calls(method.modules(), lambda: method.losses(method.prepare(batch)))
            if not calls:
                return _DEFAULT_LAYOUT
            try:
                seconds = layout.measure_layouts(method, calls, chosen_measure)
            except RuntimeError as error:
                # Memory may run out: both layouts work, and the usual one stays.
                _LOG.warning("layout: the residual blocks cannot be measured: %s", error)
                return _DEFAULT_LAYOUT
            self.reporter.note(layout.describe(seconds))
            return layout.fastest(seconds)

        chosen = KeptChoice(self.folders, LAYOUT_FILE, self.world).get(choose)
        # A later version may have recorded another one.
        method.use_layout(layout.LAYOUTS.get(str(chosen), layout.LAYOUTS[_DEFAULT_LAYOUT]))

    @property
    def _can_run_alone(self) -> bool:
        """Whether rank 0 can run a pass without the others. Sharding gathers weights from all of them."""
        return self.spec.training.sharding is Sharding.NONE

    def choose_compile(self, batches: BatchMaker, steps: int) -> tuple[TrainingSpec, str]:
        """Return the settings with `compile` on or off, and why, if the manifest leaves it open. All ranks call it.

        Args:
            batches: their shapes are compiled one by one.
            steps: number of steps of the run.
        """
        training, device = self.spec.training, self.world.device
        is_possible = all(self.world.gather_numbers(compiled.can_compile()))
        share = math.ceil(self.spec.global_batch / self.world.size)
        is_cached = compiled.is_cached(compiled.cache_folder(self.cache_dir, device))
        facts = compiled.CompileFacts(
            is_gpu=device.type == "cuda",
            has_compiler=is_possible,
            num_passes=max(0, steps - self.world.share(self._saved_step())) * math.ceil(share / training.batch_size),
            num_shapes=len(batches.shapes.all),
            is_cached=self.world.share(is_cached),
        )
        is_on, reason = compiled.choose_compile(training, facts)
        return training.model_copy(update={"compile": SwitchMode.ON if is_on else SwitchMode.OFF}), reason

    def prepare_compiler(self, training: TrainingSpec, reason: str) -> None:
        """Let torch store compiled code on the shared storage, and report a choice.

        Args:
            training: the settings of `choose_compile`.
            reason: its reason.
        """
        if reason and self.world.is_first:
            (self.reporter.note if self.world.device.type == "cuda" else _LOG.debug)(reason)
        if training.compile is SwitchMode.ON or self.world.device.type == "cuda":
            # The fused operations are compiled on GPUs, too.
            compiled.use_compile_cache(self.cache_dir, self.world.device)
        if training.compile is SwitchMode.ON and self.spec.training.compile is SwitchMode.AUTO:
            compiled.tolerate_failures()

    def _saved_step(self) -> int:
        """Return the step of the newest checkpoint in the job's folder; 0 if it has none."""
        folder = paths.checkpoints(self.folders.job_dir)
        names = [path.name for path in folder.glob("step-*")] if folder.is_dir() else []
        return max((int(name[5:]) for name in names if name[5:].isdigit()), default=0)
