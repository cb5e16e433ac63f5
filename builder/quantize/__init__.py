"""Snapshot -> Checkpoint, one module per backend. `modelopt` is the only backend so far."""
