"""Everything that can be rejected before work begins: this machine, the model, memory."""
