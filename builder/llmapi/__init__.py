"""The llmapi target: the LLM API's arguments, their validation, and a repository around it."""
