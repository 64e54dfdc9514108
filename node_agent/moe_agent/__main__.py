"""`python -m moe_agent --config FILE`."""

from moe_agent.cli import app

if __name__ == "__main__":
    app(prog_name="moe_agent")
