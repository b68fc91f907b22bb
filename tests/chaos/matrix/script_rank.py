"""A rank that runs a script under the hook, and stops at one point of its first attempt like `rank`.

Neither the script nor the hook has code for it: methods of the hook are replaced in this process.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from finetune_contract import paths
from finetune_trainer import entry
from finetune_trainer.files import write_atomically
from finetune_trainer.script.__main__ import main as run_script
from tests.chaos.matrix.rank import StoppingReporter, StopPoint


def stop_in_steps(stop_point: StopPoint) -> None:
    """Stop before the backward pass of a step: all ranks have agreed on the step before it."""
    from finetune_trainer.script.session import Session  # noqa: PLC0415  slow to import

    before_backward, after_step = Session.before_backward, Session.after_step

    def stopping_before_backward(self: Session) -> None:
        stop_point.reach("first step")
        if self.step >= stop_point.step:
            stop_point.reach("training")
        before_backward(self)

    def noting_after_step(self: Session, optimizer: Any) -> None:
        after_step(self, optimizer)
        stop_point.note_step()

    Session.before_backward = stopping_before_backward  # type: ignore[method-assign]
    Session.after_step = noting_after_step  # type: ignore[method-assign]


def stop_in_save(stop_point: StopPoint) -> None:
    """Stop when everything except the manifest is written; rank 1 while it waits for rank 0 to commit."""
    from finetune_trainer.script import checkpoints  # noqa: PLC0415
    from finetune_trainer.script.agreement.peers import Peers  # noqa: PLC0415
    from finetune_trainer.script.saver import Saver  # noqa: PLC0415

    share, save = Peers.share, Saver.save
    saving: list[bool] = []

    def stopping_write(path: Path, data: bytes) -> None:
        if path.name == paths.MANIFEST:
            stop_point.reach("saving")
        write_atomically(path, data)

    def stopping_share(self: Peers, value: Any) -> Any:
        if stop_point.rank > 0 and saving:
            stop_point.reach("saving")
        return share(self, value)

    def noting_save(self: Saver, *args: Any) -> Any:
        saving.append(True)
        try:
            return save(self, *args)
        finally:
            saving.pop()

    checkpoints.write_atomically = stopping_write  # type: ignore[attr-defined]
    Peers.share = stopping_share  # type: ignore[method-assign]
    Saver.save = noting_save  # type: ignore[method-assign, assignment]


def stop_in_validation(stop_point: StopPoint) -> None:
    """Stop while rank 0 validates alone after an epoch; rank 1 before the next epoch, in which it waits for rank 0."""
    import torch  # noqa: PLC0415
    from accelerate import Accelerator  # noqa: PLC0415

    from finetune_trainer.script.session import Session  # noqa: PLC0415

    unwrap, before_epoch = Accelerator.unwrap_model, Session.before_epoch

    def stopping_unwrap(self: Accelerator, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            stop_point.reach("validating")
        return unwrap(self, *args, **kwargs)

    def stopping_before_epoch(self: Session, loader: Any) -> bool:
        if stop_point.rank > 0 and self.step:
            stop_point.reach("validating")
        return before_epoch(self, loader)

    Accelerator.unwrap_model = stopping_unwrap
    Session.before_epoch = stopping_before_epoch  # type: ignore[method-assign]


def main() -> None:
    """Run the script with its stop point."""
    stop_point = StopPoint(dict(os.environ))
    StoppingReporter.stop_point = stop_point
    entry.Reporter = StoppingReporter  # type: ignore[attr-defined]
    stop_in_steps(stop_point)
    stop_in_save(stop_point)
    stop_in_validation(stop_point)
    entry.leave(run_script(os.environ))


if __name__ == "__main__":
    main()
