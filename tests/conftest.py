"""For all tests: fixtures of the test clusters; Hypothesis with the same examples at each run, no time limit for one.

`--hypothesis-profile=explore` looks further; `soak` is for the malformed messages of `make soak`, 10,000 in all.
"""

from hypothesis import settings

pytest_plugins = ["cluster_fixtures"]

settings.register_profile("deterministic", derandomize=True, database=None, deadline=None)
settings.register_profile("explore", max_examples=2000, database=None, deadline=None, print_blob=True)
settings.register_profile("soak", derandomize=True, max_examples=2000, database=None, deadline=None)
settings.load_profile("deterministic")
