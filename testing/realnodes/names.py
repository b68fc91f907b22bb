"""What a run makes in its cluster: names that nobody else has, so that a run knows what an earlier one left."""

from __future__ import annotations

RELEASE = "finetune-test"
HOME, TEAM = "finetune-test", "finetune-test-jobs"
"""Namespaces of the chart and of the jobs."""
NAME = "finetune-test-finetune-operator"
"""Full name of the release."""
CRD = "crd/finetunejobs.finetune-operator.io"
OURS = "finetune.test/run"
"""Label of both namespaces, and of a node that is being drained."""
FAULT_TAINT = "finetune.test/termination"
OF_CHART = f"app.kubernetes.io/instance={RELEASE}"
CLUSTER_KINDS = "clusterroles,clusterrolebindings"
