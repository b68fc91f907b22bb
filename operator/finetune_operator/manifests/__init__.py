"""Pure: job and attempt -> manifests."""

from finetune_operator.manifests.config import build_config
from finetune_operator.manifests.pods import Surroundings, build_pod
from finetune_operator.manifests.run_spec import build_run_spec, global_batch, num_nodes
from finetune_operator.manifests.service import build_service

__all__ = ["Surroundings", "build_config", "build_pod", "build_run_spec", "build_service", "global_batch", "num_nodes"]
