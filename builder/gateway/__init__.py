"""The gateway: OpenAI's HTTP API in front of a served repository, as one asyncio process."""
