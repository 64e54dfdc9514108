"""One request in the gateway: its body, its attempts, its answer."""
