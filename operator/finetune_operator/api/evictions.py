"""Names of the API of eviction requests (KEP-4563, alpha in Kubernetes 1.37): who wants a pod to leave, and who acts.

Kubernetes turns the EvictionRequests for a pod into one Eviction. The responders of the pod act on it in turn, and
report their progress in its status. The last responder is Kubernetes itself, which uses the older eviction API.
"""

from __future__ import annotations

from finetune_operator.api.job import GROUP

API_VERSION = "lifecycle.k8s.io/v1alpha1"
PLURAL = "evictions"
RESPONDER = f"{GROUP}/saver"
"""Name of the operator as a responder; also the label of an Eviction that it may have to act on."""
ROLES = ("responder", "requester-responder")
"""Values of that label."""
PRIORITY = 10_000
"""Priority of the responder that manages a pod."""
POD_FIELD = "pods/evictionResponders"
"""Name in `Observed.optional_apis`: pods may name their responders."""
FIRST_MINOR_VERSION = 37
"""Minor version of Kubernetes 1 from which pods have this field."""
ACTIVE = "Active"
"""State of the responder whose turn it is."""
