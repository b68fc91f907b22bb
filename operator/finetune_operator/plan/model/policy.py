"""`Policy`, a row of the registry: it decides one question of the status, when to reconcile again, and the actions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime

from finetune_operator.api.status import FineTuneJobStatus
from finetune_operator.plan.model.types import Action
from finetune_operator.plan.model.view import View


def _keep_status(_: View, status: FineTuneJobStatus) -> FineTuneJobStatus:
    return status


def _never(_: View, __: FineTuneJobStatus) -> datetime | None:
    return None


def _no_actions(_: View, __: FineTuneJobStatus) -> tuple[Action, ...]:
    return ()


@dataclass(frozen=True)
class Policy:
    """A rule of the plan. Each function reads the view and the status, and changes neither."""

    name: str
    """Unique in the registry."""
    decide: Callable[[View, FineTuneJobStatus], FineTuneJobStatus] = _keep_status
    """Return the status with this policy's decision, based on the decisions of the policies before it."""
    wake: Callable[[View, FineTuneJobStatus], datetime | None] = _never
    """Return when to reconcile again if nothing happens before; None: no need. Called with the decided status."""
    act: Callable[[View, FineTuneJobStatus], tuple[Action, ...]] = _no_actions
    """Return the actions that the decided status requires."""
