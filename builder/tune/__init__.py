"""The search for the settings of a served model that answer the most requests within an objective."""
