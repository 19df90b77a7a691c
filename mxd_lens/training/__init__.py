"""Paired activations, and the runner that trains a layer on them."""
