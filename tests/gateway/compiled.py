"""Tests that need the gateway's modules as Python: they replace a part of an object, or give a stand-in for one."""

import moe_gateway.engines.dispatcher
import pytest

# A compiled object takes neither (`make test-compiled`).
interpreted = pytest.mark.skipif(
    not str(moe_gateway.engines.dispatcher.__file__).endswith(".py"), reason="replaces parts of compiled objects"
)
