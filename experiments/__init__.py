"""The experiments that wrote results/, run by hand: `python -m experiments.<name>`."""
