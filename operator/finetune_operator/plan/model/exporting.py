"""What a job exports by a separate pod, and how far that is. Pure; `policies.exports` decides, others read it."""

from __future__ import annotations

from pydantic import ValidationError

from finetune_contract.outputs.request import ExportRequest, written_by_export
from finetune_operator.api.job import FineTuneJobSpec
from finetune_operator.api.labels import EXPORT
from finetune_operator.api.reasons import Reason
from finetune_operator.api.status import ExportState, ExportStatus, FineTuneJobStatus
from finetune_operator.manifests import hash_target
from finetune_operator.plan.model.ledger import current
from finetune_operator.plan.model.revise import revise
from finetune_operator.plan.model.view import View, is_finished

ACTIVE = frozenset({ExportState.WAITING, ExportState.RUNNING})
OWN = ""
"""Id of the request for the job's own outputs."""


class BadRequestError(ValueError):
    """The annotation of a job is not an ExportRequest; the message says why."""


def own_request(spec: FineTuneJobSpec) -> ExportRequest | None:
    """Return the request for the outputs of the manifest that an export pod writes; None if there are none."""
    outputs = written_by_export(spec.outputs)
    return ExportRequest(outputs=outputs) if outputs else None


def user_request(view: View) -> ExportRequest | None:
    """Return the request in the job's annotation; None if there is none.

    Raises:
        BadRequestError: the annotation is not a request.
    """
    text = view.job.metadata.annotations.get(EXPORT)
    if not text:
        return None
    try:
        request = ExportRequest.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        raise BadRequestError(f"{'.'.join(map(str, first['loc'])) or 'JSON'}: {first['msg']}") from error
    if not request.id:
        raise BadRequestError("id: it is missing; write a new text for each request")
    return request


def has_trained(view: View, status: FineTuneJobStatus) -> bool:
    """Return whether all ranks have finished what the spec requests, and only an export pod still has to."""
    entry = current(status)
    if entry is None or entry.reason != Reason.FINISHED or is_finished(status):
        return False
    return entry.target is None or entry.target == hash_target(view.spec)


def find_export(status: FineTuneJobStatus, *, own: bool) -> ExportStatus | None:
    """Return the export of the job's own outputs, or the newest requested one; None if there was none."""
    return next((each for each in status.exports if (each.request == OWN) is own), None)


def active_export(status: FineTuneJobStatus) -> ExportStatus | None:
    """Return the export that is in progress."""
    return next((each for each in status.exports if each.state in ACTIVE), None)


def put_export(status: FineTuneJobStatus, export: ExportStatus) -> FineTuneJobStatus:
    """Return the status with an export in the place of the earlier one of its kind."""
    others = tuple(each for each in status.exports if (each.request == OWN) is not (export.request == OWN))
    return revise(status, exports=tuple(sorted((*others, export), key=lambda each: each.request != OWN)))


def drop_own(status: FineTuneJobStatus) -> FineTuneJobStatus:
    """Return the status without the export of the job's own outputs: it begins again."""
    return revise(status, exports=tuple(each for each in status.exports if each.request != OWN))
