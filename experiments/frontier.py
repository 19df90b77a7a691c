"""The frontier in results/: four architectures and the SkipMxD, six Ks, three layers of SmolLM2-135M.

    python -m experiments.frontier --text FOLDER --output FOLDER [--layers 12,2,11] [--k 32,8,128,16,64,256]
        [--architectures mxd,skip_mxd,topk_transcoder,topk_skip_transcoder,topk_sae]

FOLDER holds WikiText-2's valid.txt and test.txt, prepared as `experiments.wikitext` says: the first
sequences are held out, the rest is trained on. The second text to judge on is the Brown corpus, which
nltk must find. A sweep that was interrupted goes on; its points are measured a layer and a K at a time.

--architectures mxd_more_experts,skip_mxd_more_experts trains the MxDs with as many experts as the transcoder
has features, on top of the decoder branch: what the matching of parameters takes from them.
"""

import argparse
from dataclasses import replace
from pathlib import Path

from datasets import Dataset
from rich.console import Console
from sae_lens.saes.sae import TrainingSAEConfig

from experiments.wikitext import BOS, HELD_OUT, wikitext_sequences
from mxd_lens import frontier, load_model
from mxd_lens.cli.options import integers
from mxd_lens.evals.frontier import CONTENDERS, Contender, Size
from mxd_lens.models import SMOLLM2
from mxd_lens.reports.frontier import write_frontier_page, write_frontier_png
from mxd_lens.text import load_text, token_sequences

TRAINING_TOKENS = 2**20


def _with_more_experts(name: str) -> Contender:
    matched = CONTENDERS[name]

    def config(size: Size, k: int) -> TrainingSAEConfig:
        return replace(matched.config(size, k), d_sae=size.transcoder_width)

    return Contender(f"{matched.label}, as many experts as features", config, matched.lr)


UNMATCHED = {f"{name}_more_experts": _with_more_experts(name) for name in ("mxd", "skip_mxd")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--layers", type=integers, default=[12, 2, 11])
    parser.add_argument("--k", type=integers, default=[32, 8, 128, 16, 64, 256])
    parser.add_argument("--architectures", default=",".join(CONTENDERS))
    parser.add_argument("--seeds", type=integers, default=[0])
    parser.add_argument("--sequences", type=int, default=16, help="held-out sequences of each text")
    parser.add_argument("--raw", action="store_true", help="the paper's recipe: no standardised activations")
    args = parser.parse_args()

    contenders = {name: {**CONTENDERS, **UNMATCHED}[name] for name in args.architectures.split(",")}
    model = load_model(SMOLLM2)
    sequences = wikitext_sequences(args.text, model.tokenizer)
    held_out = {
        "WikiText-2": sequences[: args.sequences],
        "Brown": token_sequences(model, load_text("nltk:brown").shuffle(seed=0), args.sequences),
    }
    result = frontier(
        model,
        Dataset.from_dict({"tokens": sequences[HELD_OUT:].tolist()}),
        held_out,
        args.output,
        layers=args.layers,
        ks=args.k,
        contenders=contenders,
        seeds=args.seeds,
        training_tokens=TRAINING_TOKENS,
        layers_at_once=len(contenders) * len(args.seeds),
        text_name="WikiText-2",
        run_settings={
            "exclude_special_tokens": [BOS],
            "autocast": True,
            "standardize_activations": not args.raw,
        },
    )
    write_frontier_page(args.output / "index.html", result)
    for text in result.texts:
        write_frontier_png(args.output / f"{text.lower()}.png", result, text)
        write_frontier_png(args.output / f"{text.lower()}-layer12.png", result, text, [12])
    Console(width=160).print(result)


if __name__ == "__main__":
    main()
