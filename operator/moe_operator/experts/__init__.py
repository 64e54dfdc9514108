"""The experts of deployments that run: what their agents say (`GET /v1/experts`), what it means, how it looks.

One form for one machine and for a cluster; only the way to the agents differs (`reach.py`).
"""
