"""Calibration texts: a file, a bundled set or a Hub dataset becomes rows."""
