"""The tokenizer and the chat template of a source model, validated and loaded with limits."""
