"""The operator under many resources, against a real API server without nodes; `make bench-operator` runs it."""
