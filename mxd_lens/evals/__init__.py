"""Judging a layer."""
