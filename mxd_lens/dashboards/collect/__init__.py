"""The data that a dashboard shows: model in, data out."""
