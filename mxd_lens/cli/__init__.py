"""The command line, `mxd-lens`.

Every command is one library call. Arguments are checked as they are read; what is heavy is imported when a
command runs.
"""

from mxd_lens.cli import train

# isort: split
# In the order in which --help lists the commands.
from mxd_lens.cli import experts

# isort: split
from mxd_lens.cli import layers, sweeps

# isort: split
from mxd_lens.cli import releases
from mxd_lens.cli.application import app, main

__all__ = ["app", "experts", "layers", "main", "releases", "sweeps", "train"]
