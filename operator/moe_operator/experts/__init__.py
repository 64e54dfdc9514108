"""The experts of running deployments: read from their agents (`GET /v1/experts`), evaluated, printed.

One form for one machine and for a cluster; only the way to the agents differs (`reach.py`).
"""
