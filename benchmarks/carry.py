"""What the experts of SmolLM2-135M's layers carry: four architectures, an SAE, and the bundled pair.

    python -m benchmarks.carry --text FOLDER --trained FOLDER --output FOLDER [--seeds 0]

TEXT holds WikiText-2's valid.txt and test.txt, prepared as `benchmarks.wikitext` says; the sequences read
here are held out from the training of all layers. TRAINED holds layers that `benchmarks.frontier` trained
(OUTPUT/trained), of which layer 12's at K 32 are compared; with several --seeds, their stability over
these is measured too. OUTPUT gets a page and a JSON file for layer 12 and for the bundled layer 11.
"""

import argparse
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from sae_lens import SAE

from benchmarks.wikitext import HELD_OUT, wikitext_sequences
from mxd_lens import load_model
from mxd_lens.cli import integers
from mxd_lens.dashboards.carry_page import write_carry_page, write_carry_png
from mxd_lens.evals.carry import load_carry, save_carry, what_experts_carry
from mxd_lens.evals.stability import stability
from mxd_lens.models import SMOLLM2

LAYER, K = 12, 32
NAMES = {
    "mxd": "MxD",
    "skip_mxd": "SkipMxD",
    "topk_transcoder": "transcoder",
    "topk_skip_transcoder": "skip transcoder",
    "topk_sae": "SAE of the output",
}
BUNDLED = {
    "MxD": ("smollm2-135m-mxd", "blocks.11.mlp"),
    "transcoder": ("smollm2-135m-transcoder", "blocks.11.mlp"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--trained", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--architectures", default=",".join(NAMES))
    parser.add_argument("--seeds", type=integers, default=[0])
    parser.add_argument("--judged", type=int, default=12, help="sequences that gates and ablations run on")
    parser.add_argument("--sequences", type=int, default=192, help="sequences that firing is read from")
    parser.add_argument("--redraw", action="store_true", help="only the pages, from the JSON files")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)

    architectures = args.architectures.split(",")
    notes = {"text": f"WikiText-2, the first of {HELD_OUT} held-out sequences of 128 tokens, BOS excluded"}
    files = {layer: args.output / f"layer{layer}.json" for layer in (LAYER, 11)}
    if not args.redraw:
        model = load_model(SMOLLM2)
        tokens = wikitext_sequences(args.text, model.tokenizer)[: min(args.sequences, HELD_OUT)]

        def measure(saes: Mapping[str, SAE[Any]], seeds: Mapping[str, dict[str, SAE[Any]]], to: Path) -> None:
            reports = what_experts_carry(saes, model, tokens, args.judged)
            for name, layers in seeds.items():
                if len(layers) > 1:
                    reports[name] = replace(reports[name], stability=stability(layers, model, tokens))
            save_carry(to, reports)
            for report in reports.values():
                Console(width=120).print(report)

        seeds = {
            NAMES[architecture]: {
                f"seed {seed}": SAE.load_from_disk(
                    args.trained / f"layer{LAYER}-{architecture}-k{K}-seed{seed}"
                )
                for seed in args.seeds
            }
            for architecture in architectures
        }
        measure({name: next(iter(layers.values())) for name, layers in seeds.items()}, seeds, files[LAYER])
        measure({name: SAE.from_pretrained(*where) for name, where in BUNDLED.items()}, {}, files[11])
    for layer, file in files.items():
        reports = load_carry(file)
        write_carry_page(file.with_suffix(".html"), reports, notes | {"layer": str(layer)})
        write_carry_png(file.with_suffix(".png"), reports)


if __name__ == "__main__":
    main()
