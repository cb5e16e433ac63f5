"""Which layers of a checkpoint to take from another one in more bits, so that the loss stays within limits."""
