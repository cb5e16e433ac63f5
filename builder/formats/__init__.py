"""Number formats: what each one is, how it is stored, computed and served, one module per format."""
