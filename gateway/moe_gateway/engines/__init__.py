"""Engines as the gateway knows them: discovery, signals, dispatch."""
