"""Looks at a cluster and at this machine, and says for each finding what to do; run by `moeserving doctor`."""
