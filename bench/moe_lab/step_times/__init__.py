"""Measured engine steps of a published table, fitted and compared: `python -m moe_lab.step_times`."""
