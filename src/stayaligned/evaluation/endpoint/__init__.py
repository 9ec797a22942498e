"""Models behind an OpenAI-compatible server: the client, and what its replies cost."""
