"""Unique names of the objects that a run creates, so that a later run recognizes and removes leftovers."""

from __future__ import annotations

RELEASE = "finetune-test"
HOME, TEAM = "finetune-test", "finetune-test-jobs"
"""Namespaces of the chart and of the jobs."""
NAME = "finetune-test-finetune-operator"
"""Full name of the release."""
CRD = "crd/finetunejobs.finetune-operator.io"
OURS = "finetune.test/run"
"""Label of both namespaces, and of a node while it is drained."""
FAULT_TAINT = "finetune.test/termination"
OF_CHART = f"app.kubernetes.io/instance={RELEASE}"
CLUSTER_KINDS = "clusterroles,clusterrolebindings"
