"""The quantized checkpoint: its layouts, sharding and validation."""
