"""The experiments of the simulator: which runs there are (`plan`), the runs (`runner`), the evidence (`report`).

`python -m moe_lab.experiments run` writes one JSON line for each run, with the versions and the sources that it came
from, and goes on where it was interrupted. `python -m moe_lab.experiments report` makes `docs/results/` of them.
"""
