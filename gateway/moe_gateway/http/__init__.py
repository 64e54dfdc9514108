"""HTTP of the gateway: client and engine connections, heads, replies, routes."""
