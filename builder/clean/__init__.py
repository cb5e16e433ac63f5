"""Removing what nothing needs from a store."""
