"""`python -m moe_operator.cli`."""

from moe_operator.cli import main

main()
