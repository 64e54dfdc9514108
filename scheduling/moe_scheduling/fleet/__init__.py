"""The number of engines, and the order in which they end when it falls."""
