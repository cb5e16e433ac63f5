"""The quick quality check that every build makes before it publishes."""
