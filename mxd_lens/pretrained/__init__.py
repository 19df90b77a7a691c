"""Trained layers from elsewhere: read, converted, published and found again."""
