"""What the experts of SmolLM2-135M's layers carry: four architectures, an SAE, and the bundled pair.

    python -m experiments.carry --text FOLDER --trained FOLDER --output FOLDER [--layers 12,11] [--seeds 0]

TEXT holds WikiText-2's valid.txt and test.txt, prepared as `experiments.wikitext` says; the sequences read
here are held out from the training of all layers. TRAINED holds layers that `experiments.frontier` trained
(OUTPUT/trained), of which layer 12's at K 32 are compared; layer 11's are those that come with the package.
With several --seeds, the stability of layer 12's experts over these is measured too. OUTPUT gets a JSON
file, a page and pictures for either layer. A run that was interrupted goes on: what is in the files stays.
"""

import argparse
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from sae_lens import SAE

from experiments.wikitext import HELD_OUT, wikitext_sequences
from mxd_lens import load_model
from mxd_lens.cli.options import integers
from mxd_lens.evals.ablation import AblationReport, ablation_study, load_ablations, save_ablations
from mxd_lens.evals.stability import stability
from mxd_lens.models import SMOLLM2
from mxd_lens.reports.ablation import write_ablation_page, write_ablation_pictures

K = 32
NAMES = {
    "mxd": "MxD",
    "skip_mxd": "SkipMxD",
    "topk_transcoder": "transcoder",
    "topk_skip_transcoder": "skip transcoder",
    "topk_sae": "SAE of the output",
}
BUNDLED = {"mxd": "smollm2-135m-mxd", "topk_transcoder": "smollm2-135m-transcoder"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--trained", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--layers", type=integers, default=[12, 11], help="12, 11 or both")
    parser.add_argument("--architectures", default=",".join(NAMES))
    parser.add_argument("--seeds", type=integers, default=[0])
    parser.add_argument("--judged", type=int, default=16, help="sequences that gates and ablations run on")
    parser.add_argument("--sequences", type=int, default=256, help="sequences that firing is read from")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)

    model = load_model(SMOLLM2)
    tokens = wikitext_sequences(args.text, model.tokenizer)[: min(args.sequences, HELD_OUT)]
    for layer in args.layers:
        file = args.output / f"layer{layer}.json"
        reports = load_ablations(file) if file.is_file() else {}
        for architecture in args.architectures.split(","):
            name = NAMES[architecture]
            seeds = of_seeds(architecture, layer, args.trained, args.seeds)
            if not seeds:
                continue
            if name not in reports:
                reports |= ablation_study(model, {name: next(iter(seeds.values()))}, tokens, args.judged)
            if len(seeds) > 1:
                reports[name] = replace(reports[name], stability=stability(model, seeds, tokens))
            save_ablations(file, reports)
            Console(width=120).print(reports[name])
        draw(file, layer, reports)


def of_seeds(architecture: str, layer: int, trained: Path, seeds: list[int]) -> dict[str, SAE[Any]]:
    """The layers of one architecture, one a seed; none where there is no such layer."""
    if layer == 12:
        folders = {seed: trained / f"layer{layer}-{architecture}-k{K}-seed{seed}" for seed in seeds}
        return {f"seed {seed}": SAE.load_from_disk(folder) for seed, folder in folders.items()}
    if architecture not in BUNDLED:
        return {}
    return {"bundled": SAE.from_pretrained(BUNDLED[architecture], f"blocks.{layer}.mlp")}


def draw(file: Path, layer: int, reports: Mapping[str, AblationReport]) -> None:
    """The page and the pictures beside a JSON file."""
    notes = {
        "text": f"WikiText-2, of {HELD_OUT} held-out sequences of 128 tokens the first; BOS excluded",
        "layers": f"layer {layer}, K {K}",
    }
    write_ablation_page(file.with_suffix(".html"), reports, notes)
    write_ablation_pictures(file.with_suffix(".png"), reports)


if __name__ == "__main__":
    main()
