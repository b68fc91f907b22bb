"""Formats of outputs: files for diffusers, the web UIs, ComfyUI, kohya's scripts and OpenVINO."""
