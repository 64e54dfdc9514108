"""Layer 3: the placement of experts on the ranks of an expert group."""
