"""Turns a Hugging Face causal LM and a GPU name into a tested Triton repository that serves it quantized."""

__version__ = "0.1.0"
