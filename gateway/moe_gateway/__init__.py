"""The gateway: an OpenAI-compatible proxy that sends each request to the engine that will answer first."""
