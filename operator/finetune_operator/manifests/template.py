"""A hash of the fields of a spec that only new pods read: it tells whether a pod contains the newest edit.

The hash depends on the spec only. An upgrade of the operator must not replace the pods of running jobs.
"""

from __future__ import annotations

import hashlib
import json

from finetune_operator.api.job import FineTuneJobSpec, SchedulingMode

HASH_CHARACTERS = 10


def hash_template(spec: FineTuneJobSpec) -> str:
    """Return the hash of the fields that change with the next attempt (`api.rules.edits`).

    Of `recovery.spot`, new pods read only whether it is set.
    """
    # A job without them keeps the hash of the version that did not know them.
    of_outputs = sorted({output.secret.name for output in spec.outputs if output.secret is not None})
    of_topology = {"pack": spec.topology.pack, "claim": spec.topology.gpu_claim_template_name}
    fields = (
        spec.topology.resources,
        spec.recovery.notice_seconds,
        spec.recovery.spot is not None,
        spec.priority_class_name,
        [secret.name for secret in spec.secrets],
        spec.pod_template,
        *([of_outputs] if of_outputs else []),
        *([spec.scheduling.value] if spec.scheduling is not SchedulingMode.AUTO else []),
        *({name: value} for name, value in of_topology.items() if value is not None),
    )
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:HASH_CHARACTERS]
