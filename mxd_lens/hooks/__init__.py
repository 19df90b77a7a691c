"""A layer in a hooked model: where it belongs, how it replaces the MLP, how it is steered."""
