"""The number of engines, and which of them end first when it falls."""
