"""What quantization costs, measured on each variant of a model."""
