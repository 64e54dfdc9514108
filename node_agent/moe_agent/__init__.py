"""The node agent: runs one engine on a node, watches it, and publishes what it knows."""
