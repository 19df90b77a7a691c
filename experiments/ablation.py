"""What every MLP of SmolLM2-135M is worth to it: the cost of losing it, in nats per token.

    python -m experiments.ablation --json FILE [--sequences 16]

Zero-ablated: the MLP's output is 0 at every token but BOS. Mean-ablated: it is its mean over those
tokens. The text is the Brown corpus, which nltk must find.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import trange

from experiments.wikitext import BOS
from mxd_lens import load_model
from mxd_lens.models import SMOLLM2
from mxd_lens.text import load_text, token_sequences


@torch.no_grad()
def costs(model: Any, tokens: Tensor, batch_size: int = 8) -> dict[str, Any]:
    """Cross-entropy of the unmodified model, and what is added to it by losing each MLP."""
    kept = (tokens != BOS).unsqueeze(-1)

    def cross_entropy(hook_name: str | None = None, value: Tensor | None = None) -> float:
        losses = []
        for batch, keep in zip(tokens.split(batch_size), kept.split(batch_size), strict=True):

            def ablate(y: Tensor, hook: Any, keep: Tensor = keep) -> Tensor:  # noqa: ARG001
                return y if value is None else torch.where(keep, value, y)

            hooks = [] if hook_name is None else [(hook_name, ablate)]
            logits = model.run_with_hooks(batch, fwd_hooks=hooks)[:, :-1]
            losses.append(F.cross_entropy(logits[keep[:, :-1, 0]], batch[:, 1:][keep[:, :-1, 0]]).double())
        return torch.stack(losses).mean().item()

    names = [f"blocks.{layer}.hook_mlp_out" for layer in range(model.cfg.n_layers)]
    _, cache = model.run_with_cache(tokens, names_filter=names)
    means = {name: cache[name][kept.squeeze(-1)].mean(0) for name in names}
    del cache
    unmodified = cross_entropy()
    layers = []
    for layer in trange(model.cfg.n_layers, desc="Ablating"):
        name = names[layer]
        layers.append(
            {
                "layer": layer,
                "zero": cross_entropy(name, torch.zeros_like(means[name])) - unmodified,
                "mean": cross_entropy(name, means[name]) - unmodified,
            }
        )
    return {"ce_loss": unmodified, "layers": layers}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--sequences", type=int, default=16)
    args = parser.parse_args()

    model = load_model(SMOLLM2)
    tokens = token_sequences(model, load_text("nltk:brown").shuffle(seed=0), args.sequences)
    measured = {"model": SMOLLM2, "text": "nltk:brown", "tokens": tokens.numel(), **costs(model, tokens)}
    args.json.write_text(json.dumps(measured, indent=1) + "\n")
    for row in measured["layers"]:
        print(f"layer {row['layer']:2}: zero {row['zero']:6.3f}, mean {row['mean']:6.3f}")


if __name__ == "__main__":
    main()
