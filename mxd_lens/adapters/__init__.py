"""Layers and results in the formats of other libraries."""
