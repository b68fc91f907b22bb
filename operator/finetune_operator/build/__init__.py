"""Pure: job and attempt -> manifests."""
