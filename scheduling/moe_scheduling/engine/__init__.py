"""Layer 2: the choice of an engine for a request, and the models of time to first token behind it."""
