"""Sparse probing: how well single experts, or a few together, separate classes of texts."""
