"""A language model with a layer in the place of one MLP, against the model as it is: tokens per second.

    python -m benchmarks.inference [--layer 12] [--sequences 8] [--rounds 5] [--device cpu] [--json FILE]

In turn in one process, medians and spread: the unmodified model; an MxD at the size that matches a
transcoder of 16 x d_in features, attached by SAELens (dense activations) and by `replacement_hooks`;
and its output alone from values and indices, as `evaluate` computes it. Hooks leave the original MLP
running: what is measured is what the layer adds to it.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from sae_lens.saes.sae import SAEMetadata

from benchmarks.train_step import Setting, machine
from mxd_lens import MxD, MxDConfig, load_model, matched_n_experts, replacement_hooks
from mxd_lens.analysis.decomposition import decompose
from mxd_lens.hooks.replace import Replaced
from mxd_lens.hooks.site import hook_names
from mxd_lens.models import SMOLLM2

CONTEXT = 128


def contestants(model: Any, mxd: MxD, tokens: torch.Tensor) -> dict[str, Callable[[], Any]]:
    """What is timed, by name; each runs the model over the tokens once."""

    def sparse(x: torch.Tensor, _y: torch.Tensor) -> torch.Tensor:
        return decompose(mxd, x.flatten(0, -2)).y.unflatten(0, x.shape[:-1])

    def sparsely() -> torch.Tensor:
        with Replaced(model, *hook_names(mxd), sparse):
            return model(tokens)

    return {
        "unmodified": lambda: model(tokens),
        "attached by SAELens": lambda: model.run_with_saes(tokens, saes=[mxd]),
        "replacement_hooks": lambda: model.run_with_hooks(tokens, fwd_hooks=replacement_hooks(mxd)),
        "values and indices": sparsely,
    }


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--layer", type=int, default=12)
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    torch.manual_seed(0)
    setting = Setting(args.device, torch.float32)
    model = load_model(SMOLLM2, args.device)
    d_model = model.cfg.d_model
    mxd = MxD(
        MxDConfig(
            d_in=d_model,
            d_out=d_model,
            d_hidden=4 * d_model,
            d_sae=matched_n_experts(d_model, d_model, 4 * d_model, 16 * d_model),
            k=32,
            device=args.device,
            metadata=SAEMetadata(
                hook_name=f"blocks.{args.layer}.mlp.hook_in",
                hook_name_out=f"blocks.{args.layer}.hook_mlp_out",
            ),
        )
    )
    tokens = torch.randint(10, model.cfg.d_vocab, (args.sequences, CONTEXT), device=args.device)
    runs = contestants(model, mxd, tokens)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(args.rounds + 1):
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            setting.synchronize()
            seconds[name].append(time.perf_counter() - started)

    speeds = {
        name: {
            "median": tokens.numel() / statistics.median(times[1:]),
            "min": tokens.numel() / max(times[1:]),
            "max": tokens.numel() / min(times[1:]),
        }
        for name, times in seconds.items()
    }
    size = f"{mxd.cfg.d_sae:,} experts, K {mxd.cfg.k}, {args.sequences} x {CONTEXT} tokens"
    table = Table(
        "", "tokens/s", "from", "to", "of unmodified", title=f"{SMOLLM2}, layer {args.layer}: {size}"
    )
    for name, speed in speeds.items():
        share = speed["median"] / speeds["unmodified"]["median"]
        numbers = (f"{speed[key]:.0f}" for key in ("median", "min", "max"))
        table.add_row(name, *numbers, f"{share:.2f}")
    Console().print(table)
    if args.json:
        result = {
            "machine": machine(setting),
            "layer": args.layer,
            "tokens": tokens.numel(),
            "experts": mxd.cfg.d_sae,
            "k": mxd.cfg.k,
            "tokens_per_second": speeds,
        }
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
