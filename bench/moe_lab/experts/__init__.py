"""Placement of experts: our decision beside vLLM's, DeepSeek's, Gimbal's and none, on loads made or recorded.

`python -m moe_lab.experts compare` asks each once; `python -m moe_lab.experts replay` lets each follow a load that
changes, with the cost of what it moves.
"""
