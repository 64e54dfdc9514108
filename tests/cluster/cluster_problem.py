"""What a person can put right: printed as one line by the command, without a traceback."""


class ClusterProblem(Exception):
    """The message says what is wrong and which command or setting mends it."""
