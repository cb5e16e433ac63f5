"""Inspection of a quantized checkpoint: files, configuration, tensors, and how scales compare with each other."""
