"""`make bench-serving`: stock vLLM behind vllm-router, and MoEServing, on real engines of this machine.

`stock` plans A from the same resource that B is, `processes` runs both, `measurement` measures them in alternating
pairs, `report` says what came out.
"""
