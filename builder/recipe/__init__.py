"""What to build: the schema of a recipe, its values, and which source set each."""
