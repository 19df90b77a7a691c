"""Checkpoint formats of other libraries, one file per format."""
