"""Prefill and decode together and apart on the same GPUs: `python -m moe_lab.disaggregation`. See docs/simulator.md."""
