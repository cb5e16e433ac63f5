"""What to build: the recipe's schema, its values and where each came from."""
