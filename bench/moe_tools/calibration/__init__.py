"""A real engine's step times as a cost model of the simulator, and the simulator against that engine."""
