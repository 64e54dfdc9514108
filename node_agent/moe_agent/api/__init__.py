"""HTTP of the agent: state, control, metrics."""
