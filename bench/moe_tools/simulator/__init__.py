"""The simulator: N engines that are N real vLLM schedulers, the product's own decisions, virtual time, no model.

What is real: vLLM's scheduler and KV manager (ours on top of it, or stock), prefix caching, preemption, and every
decision of `moe_scheduling` through the product's own shells (`moe_gateway.engines.dispatcher`,
`moe_agent.vllm.scheduler`).
What is modelled: how long a step takes (`costs`), the network, and how old what a gateway knows is (`signals`).

Read in this order: `workload` (what comes), `rank` (one scheduler), `group` (ranks that step together), `router` (who
chooses), `world` (the clock and the events), `outcome` (what users got), `scenario` (the file that names it all).

Importing this package imports neither vllm nor torch.
"""
