"""What a person can put right: printed as one line by the command, without a traceback."""


class ClusterProblem(Exception):
    """The message names the cause and the command or setting that mends it."""
