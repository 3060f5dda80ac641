"""Sparse mathematics: selection of the largest entries, and products at chosen token-feature pairs."""
