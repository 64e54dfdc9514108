"""Tools that users run: replay, compare, demo, model, simulate, calibrate."""
