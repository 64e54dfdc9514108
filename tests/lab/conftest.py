"""The OpenAI-like server of the tools' tests, for the laboratory's."""

from tests.tools.conftest import server

__all__ = ["server"]
