"""Every scheduling decision of MoEServing, pure: request order, engine choice, and what they read.

Nothing in this package does I/O, reads a clock, draws a random number or logs: time, seeds and ids are arguments.
"""
