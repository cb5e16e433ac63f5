"""Snapshot -> Checkpoint, one file per backend. `modelopt` is the default and, so far, the only one."""
