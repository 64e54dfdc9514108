"""Hypothesis for all tests: the same examples at each run, and no time limit for one.

`--hypothesis-profile=explore` looks further.
"""

from hypothesis import settings

settings.register_profile("deterministic", derandomize=True, database=None, deadline=None)
settings.register_profile("explore", max_examples=2000, database=None, deadline=None, print_blob=True)
settings.load_profile("deterministic")
