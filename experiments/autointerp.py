"""How far the token alone explains experts: detection and fuzzing of token lists, five architectures.

    python -m experiments.autointerp --text FOLDER --trained FOLDER --output FOLDER [--layer 12]

TEXT holds WikiText-2's valid.txt and test.txt, prepared as `experiments.wikitext` says; the held-out
sequences are read. TRAINED holds layers that `experiments.frontier` trained (OUTPUT/trained); those at K 32
are compared. The interpreter is the local one, which names the tokens that an expert fires on; another that
knows meanings should do better. OUTPUT/ARCHITECTURE keeps every passage, OUTPUT/autointerp.json the scores.
A run that was interrupted goes on.
"""

import argparse
import math
from pathlib import Path
from statistics import stdev
from typing import Any

from rich.console import Console
from rich.table import Table
from sae_lens import SAE

from experiments.carry import NAMES, K
from experiments.wikitext import HELD_OUT, wikitext_sequences
from mxd_lens import load_model
from mxd_lens.evals.autointerp import Autointerp, Task, autointerp
from mxd_lens.models import SMOLLM2
from mxd_lens.training.runner import write_json

TASKS: tuple[Task, ...] = ("detection", "fuzzing")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--trained", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--layer", type=int, default=12)
    parser.add_argument("--architectures", default=",".join(NAMES))
    parser.add_argument("--experts", type=int, default=100, help="of each architecture, drawn at random")
    parser.add_argument("--sequences", type=int, default=HELD_OUT)
    args = parser.parse_args()

    model = load_model(SMOLLM2)
    tokens = wikitext_sequences(args.text, model.tokenizer)[: args.sequences]
    found = {}
    for architecture in args.architectures.split(","):
        sae = SAE.load_from_disk(args.trained / f"layer{args.layer}-{architecture}-k{K}-seed0")
        found[NAMES[architecture]] = autointerp(
            sae, model, tokens, args.output / architecture, experts=args.experts
        )
        write_json(args.output / "autointerp.json", {name: scores(of) for name, of in found.items()})
    table = Table("", "scored", *TASKS)
    for name, result in found.items():
        cells = [f"{m:.2f} ± {error:.2f}" for m, error in (spread(result, task) for task in TASKS)]
        table.add_row(name, f"{len(result.accuracies('detection'))} of {args.experts}", *cells)
    Console().print(table)


def spread(result: Autointerp, task: Task) -> tuple[float, float]:
    """Mean and standard error over experts."""
    accuracies = result.accuracies(task)
    return result.mean(task), stdev(accuracies) / len(accuracies) ** 0.5


def scores(result: Autointerp) -> dict[str, Any]:
    """What is kept: everything but the passages."""
    experts = [
        {
            "expert": i.expert,
            "n_firing": i.n_firing,
            **{task: None if math.isnan(a := i.accuracy(task)) else round(a, 4) for task in TASKS},
            "explanation": i.explanation,
            "failure": i.failure,
        }
        for i in result.interpretations
    ]
    found: dict[str, Any] = {"settings": result.settings}
    for task in TASKS:
        found[task] = dict(zip(("mean", "standard_error"), spread(result, task), strict=True))
    return found | {"experts": experts}


if __name__ == "__main__":
    main()
