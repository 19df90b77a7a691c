"""The probing in results/: MxDs, transcoders and an SAE of one MLP on the four tasks that need no network.

    python -m experiments.probing --layers FOLDER --output FOLDER [--texts 600] [--context 48]

FOLDER is where `experiments.frontier` left its trained layers (its output's `trained`), named
layer12-NAME-k32-seed0. nltk must find genesis, udhr, sentence_polarity, movie_reviews, brown and abc.
"""

import argparse
from pathlib import Path

from rich.console import Console
from sae_lens import SAE

from mxd_lens import load_model, sparse_probing
from mxd_lens.evals.frontier import CONTENDERS
from mxd_lens.models import SMOLLM2
from mxd_lens.reports.probing import write_probing_page, write_probing_png


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--layers", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--layer", type=int, default=12)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--texts", type=int, default=600, help="texts of a task")
    parser.add_argument("--context", type=int, default=48, help="tokens of a text that are read")
    args = parser.parse_args()

    saes: dict[str, SAE] = {
        contender.label: SAE.load_from_disk(args.layers / f"layer{args.layer}-{name}-k{args.k}-seed0")
        for name, contender in CONTENDERS.items()
    }
    result = sparse_probing(
        load_model(SMOLLM2), saes, seeds=range(5), n_texts=args.texts, context_size=args.context
    )
    args.output.mkdir(parents=True, exist_ok=True)
    result.save(args.output / "probing.json")
    write_probing_page(args.output / "index.html", result)
    write_probing_png(args.output / "probing.png", result)
    Console(width=200).print(result)


if __name__ == "__main__":
    main()
