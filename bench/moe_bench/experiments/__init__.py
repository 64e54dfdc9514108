"""The experiments of the simulator: what is compared with what (`plan`), the runs (`runner`), the evidence (`report`).

`moeserving experiments run` writes one JSON line for each run, with the versions and the sources that it came from, and
goes on where it was interrupted. `moeserving experiments report` makes `docs/results/` of them.
"""
