"""Intel processors: what they support, and models that IPEX (intel_extension_for_pytorch) optimizes."""
