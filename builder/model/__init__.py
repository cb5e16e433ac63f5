"""The source model: its files, config.json and tensors, validated before any weight is read."""
