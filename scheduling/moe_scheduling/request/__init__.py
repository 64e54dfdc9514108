"""Layer 1: the order of waiting requests, fairness between tenants, and the prefill budget of a step."""
