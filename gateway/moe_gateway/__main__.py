"""`python -m moe_gateway --config FILE`."""

from moe_gateway.cli import app

app()
