"""The operator: makes real in a cluster what the plan says. Run by `moeserving operator`."""
