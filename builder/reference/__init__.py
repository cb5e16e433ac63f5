"""The reference executor: TensorRT-LLM checkpoints on torch, and a Triton backend around it."""
