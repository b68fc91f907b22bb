"""Forward and backward passes of a step: eager, or captured once per shape as a CUDA graph and replayed."""
