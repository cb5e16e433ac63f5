"""Sweeps: many recipes from one file, built and measured with shared work done once, and compared."""
