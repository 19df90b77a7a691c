"""What a layer does, read from its weights and its activations."""
