"""Guided decoding: JSON schemas as grammars, and the tokens of a model as the bytes that a grammar reads."""
