"""The expert group of one engine: what its ranks record, what its first rank decides, what the agent tells and serves.

Nothing here imports torch or vllm: `moe_agent.vllm.expert_group` carries it into the ranks' workers.
"""
