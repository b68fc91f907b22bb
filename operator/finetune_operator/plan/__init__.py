"""Pure decisions: (job, observed, now) -> Plan(actions, status). No clock, no socket, no file."""

from finetune_operator.plan.core import plan

__all__ = ["plan"]
