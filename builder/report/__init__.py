"""A finished build as an HTML page, a model card, tables and CSV."""
