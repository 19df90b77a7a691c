"""The page and the figures of each evaluation."""
