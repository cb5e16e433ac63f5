"""The Triton model repository of the engine and reference targets."""
