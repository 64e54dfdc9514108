"""The gateway beside vllm-router, in front of the same mock engines, in one run: `python -m moe_lab.gateway`."""
