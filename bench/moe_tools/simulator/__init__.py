"""The simulator: N engines that are N real vLLM schedulers, the product's own decisions, virtual time, no model.

Real: vLLM's scheduler and KV manager (with our scheduler above it, or stock), prefix caching, preemption, and every
decision of `moe_scheduling` through the product's own shells (`moe_gateway.engines.dispatcher`,
`moe_agent.vllm.scheduler`).
Modelled: the time of a step (`costs`), the network, and the age of signals (`signals`).

Read in this order: `workload` (requests), `rank` (one scheduler), `group` (ranks that step together), `router` (choice
of the engine), `world` (clock and events), `outcome` (figures), `scenario` (the file that describes a run).

Importing this package imports neither vllm nor torch.
"""
