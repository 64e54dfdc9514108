"""Shared-memory records between an engine and its agent: memory-mapped files, each with one writer and readers.

| record | writer | readers |
|---|---|---|
| `rank-N.record` | scheduler of rank N | agent |
| `control.record` | agent | scheduler of every rank, first rank of the expert group |
| `experts-N.record` | worker of rank N, where there is an expert group | scheduler of rank N |
| `prefill-N.record` | scheduler of rank N, where ranks step together | schedulers of the other ranks |

A record's layout is derived from the type of its value (`layout`), and a sequence lock guards it (`seqlock`). There is
no notification: readers look when they need a value, the agent ten times a second while anyone watches its state.
"""
