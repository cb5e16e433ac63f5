"""The arithmetic of number formats: rounding, packing and dequantizing tensors. Its modules import torch."""
