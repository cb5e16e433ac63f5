"""Where the loss of a checkpoint comes from: its weights, the inputs of its layers, or the KV cache."""
