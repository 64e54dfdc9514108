"""Requests that are split between real engines while these fail, each accounted for: `make bench-serving ARGS=--roles`.

`traffic` plans the requests, `owed` asks a plain engine for their tokens, `testbed` starts engines with fixed roles and
a gateway, `faults` and `injection` break them, `judgement` compares the answers, `run` does it all in order.
"""
