"""Every scheduling decision of MoEServing, as pure functions: requests, engines, experts, size of the fleet.

Nothing in this package does I/O, reads a clock, draws a random number or logs: time, seeds and ids are arguments.
"""
