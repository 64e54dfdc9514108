"""Documents and facts that cross rooms: configuration, state, input errors, tenancy, control tokens."""
