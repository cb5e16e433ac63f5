"""The Hugging Face Hub: a model id becomes a verified snapshot."""
