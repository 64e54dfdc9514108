"""One machine: starts, watches, changes and stops the processes of a deployment. Called by the command line alone.

A deployment is a folder (`folder.py`). Its supervisor process (`supervisor.py`) owns `state.json` and the processes;
the commands read that file, ask agents and gateway over HTTP, and send the supervisor signals.
"""
