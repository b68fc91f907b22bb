"""Labels of the objects that the operator creates, and the annotations."""

from __future__ import annotations

from finetune_operator.api.job import GROUP

MANAGED_BY = "app.kubernetes.io/managed-by"
"""Standard label; OPERATOR on every object that the operator creates."""
JOB = f"{GROUP}/job"
"""Label of every child: the name of its job."""
ATTEMPT = f"{GROUP}/attempt"
"""Label of a pod: the number of its attempt."""
NODE_RANK = f"{GROUP}/node-rank"
"""Label of a pod: its index in the gang, from 0."""

TEMPLATE = f"{GROUP}/template"
"""Label of a pod: a hash of the fields of the spec that only new pods read."""

CAPACITY = f"{GROUP}/capacity"
"""Label of a pod that requests other nodes than the job's spec alone implies: a `Capacity`."""

EXPORT = f"{GROUP}/export"
"""Label of an export pod: a hash of its ExportRequest. Annotation of a job: an ExportRequest as JSON, which a user adds
and the operator carries out once."""

REQUEST = f"{GROUP}/request"
"""Annotation of a Workload of Kueue: a hash of the request from which the operator created it."""
