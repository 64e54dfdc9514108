"""The one exception for what went wrong without the input being at fault."""


class Failure(Exception):
    """What was asked for did not happen; the text says so in a line, `details` has lines of a log to show below it."""

    def __init__(self, message: str, details: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.details = details
