"""`python -m mxd_lens` is `mxd-lens`: for torchrun, and where the script is not on the path."""

from mxd_lens.cli import main

if __name__ == "__main__":
    main()
