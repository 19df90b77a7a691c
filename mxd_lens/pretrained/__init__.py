"""Layers that others trained, and layers for others: the hub, the registry, the reference files."""
