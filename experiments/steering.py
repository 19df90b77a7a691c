"""The paper's steering experiment on several decompositions of one MLP of SmolLM2-135M.

    python -m experiments.steering --text FOLDER --output FOLDER --layers NAME=FOLDER [NAME=FOLDER ...]
        [--experts 100] [--strength 2]

FOLDER of --text holds WikiText-2's valid.txt and test.txt, as `experiments.wikitext` says. Each layer's
experts are drawn at random from those active on held-out text; each layer has one coefficient, with
which its median expert moves the layer's output equally far (`matched_coefficient`). The local judge
rates. A run that was interrupted goes on.
"""

import argparse
import random
from pathlib import Path

import torch
from rich.console import Console
from sae_lens import SAE
from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge

from experiments.wikitext import BOS, wikitext_sequences
from mxd_lens import load_model
from mxd_lens.analysis.decomposition import active_experts
from mxd_lens.analysis.firings import layer_input
from mxd_lens.evals.steering_scores import matched_coefficient, steering_scores
from mxd_lens.models import SMOLLM2
from mxd_lens.reports.steering import write_steering_page, write_steering_png

SEQUENCES = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--layers", nargs="+", required=True)
    parser.add_argument("--experts", type=int, default=100)
    parser.add_argument("--strength", type=float, default=2.0)
    args = parser.parse_args()

    torch.set_grad_enabled(False)
    # A token of generation costs half as much with it as with a HookedTransformer.
    model = load_model(SMOLLM2, model_class=SAETransformerBridge)
    held_out = wikitext_sequences(args.text, model.tokenizer)[:SEQUENCES]
    saes, chosen, coefficients = {}, {}, {}
    for layer in args.layers:
        name, folder = layer.split("=", 1)
        sae = SAE.load_from_disk(folder)
        x = layer_input(model, sae, held_out)[held_out != BOS]
        a, ids = active_experts(sae, x)
        alive = ids[a > 0].unique().tolist()
        saes[name] = sae
        chosen[name] = random.Random(0).sample(alive, args.experts)
        coefficients[name] = matched_coefficient(sae, x, args.strength)
    scores = steering_scores(model, saes, args.output, chosen, coefficient=coefficients)
    write_steering_png(args.output / "steering.png", scores)
    write_steering_page(args.output / "index.html", scores, picture_file="steering.png")
    Console(width=120).print(scores)


if __name__ == "__main__":
    main()
