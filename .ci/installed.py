"""What a user finds who installs the wheel: run by the Python of an empty environment.

    make package              # builds the wheel, installs it, runs this
    make package DEMO=--demo  # and `mxd-lens demo`, which takes minutes

Fails where an import warns, where the import costs more than `LIMIT` over sae_lens', or where a part of the
package was left behind.
"""

import subprocess
import sys
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from tempfile import TemporaryDirectory

LIMIT = 0.3
"""Seconds that importing mxd_lens may add to importing sae_lens."""
ROUNDS = 5

# Warnings of our own modules are errors. Those that dependencies cause in each other are theirs.
OURS_ARE_ERRORS = """
import warnings
warnings.simplefilter("ignore")
warnings.filterwarnings("error", module=r"mxd_lens(\\.|$)")
"""
EVERY_MODULE = """
import importlib, pkgutil, mxd_lens
for module in pkgutil.walk_packages(mxd_lens.__path__, "mxd_lens."):
    if module.name not in ("mxd_lens.sparse.triton",):  # needs Triton
        importlib.import_module(module.name)
for name in mxd_lens.__all__:
    getattr(mxd_lens, name)
"""
ADDED_TIME = """
import time, sae_lens
start = time.process_time()  # of the processor: a busy machine does not change it
import mxd_lens
mxd_lens.MxD
print(time.process_time() - start)
"""
BUNDLED_LAYER = """
import torch
from mxd_lens import MxD, list_pretrained
for layer in list_pretrained():
    print(layer.release, layer.sae_id, f"{layer.n_parameters:,} parameters")
mxd = MxD.from_pretrained("smollm2-135m-mxd", "blocks.11.mlp", dtype="float32")
x = torch.randn(2, mxd.cfg.d_in)
torch.testing.assert_close(mxd.decode(mxd.encode(x)), mxd(x))
"""


def python(code: str, *options: str) -> str:
    """What a fresh interpreter prints."""
    return subprocess.run(
        [sys.executable, *options, "-c", code], check=True, stdout=subprocess.PIPE, text=True
    ).stdout.strip()


def main() -> None:
    where = Path(str(files("mxd_lens")))
    if "site-packages" not in where.parts:
        raise SystemExit(f"this is for an installed mxd_lens, and here it is imported from {where}.")
    if not (where / "py.typed").is_file():
        raise SystemExit("the wheel has no py.typed: type checkers would not read its annotations.")
    print(f"mxd_lens {version('mxd-lens')} in {where}")

    python("import mxd_lens", "-W", "error")
    python(OURS_ARE_ERRORS + EVERY_MODULE)
    print("no warning of ours on import")

    added = min(float(python(ADDED_TIME)) for _ in range(ROUNDS))
    print(f"importing mxd_lens after sae_lens takes {added:.3f} s of CPU (the least of {ROUNDS})")
    if added > LIMIT:
        raise SystemExit(f"that is more than {LIMIT} s.")

    print(python(BUNDLED_LAYER))
    command = Path(sys.executable).with_name("mxd-lens")
    subprocess.run([command, "--help"], check=True, stdout=subprocess.DEVNULL)
    if "--demo" in sys.argv[1:]:
        with TemporaryDirectory() as folder:
            subprocess.run([command, "demo", "--output", folder], check=True)
            if not (Path(folder) / "index.html").is_file():
                raise SystemExit("the demo wrote no page.")


if __name__ == "__main__":
    main()
