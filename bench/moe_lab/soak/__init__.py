"""A long run of the gateway under faults, in which each request is accounted for: `python -m moe_lab.soak`."""
