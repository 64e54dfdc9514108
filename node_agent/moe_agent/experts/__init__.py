"""The expert group of one engine: recorded load, decisions on its first rank, moves on all ranks, the served document.

Nothing here imports torch or vllm; `moe_agent.vllm.expert_group` runs it in the ranks' workers. Reading order:

1. `directive.py`: the shape of a group, and the directives that a person can give.
2. `sync_round.py`: the broadcast that all ranks enter together, and a move cut into such rounds.
3. `load.py`: recorded tokens by expert as a sliding window; inter-layer affinity, recorded on request.
4. `step_times.py`: step times before and after a move, compared under the same load; the cost of expert work.
5. `planning.py`: a decision as a request and a result, computed in a thread.
6. `bookkeeping.py`: decisions made, their gains and costs, and present problems.
7. `controller.py`: the state machine: gather counts, plan, move, measure, keep or roll back.
8. `coordinator.py`: the first rank around its controller: control record, directive file, publication.
9. `document.py`: the published document, its writer in the engine and its reader in the agent; `metrics.py`: its
   Prometheus series.
"""
