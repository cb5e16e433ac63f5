"""Transforms of a model before it is quantized: rotations that are folded into its weights and leave its function."""
