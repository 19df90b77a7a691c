"""The texts of the experiments, tokenised once: WikiText-2 and nltk's corpora.

    python -m experiments.texts --wikitext FOLDER --output texts.npz

FOLDER holds WikiText-2's valid.txt and test.txt, prepared as `experiments.wikitext` says; nltk must find the
corpora. Sequences of 128 tokens: BOS, then rows of text joined with the end-of-text token. Held out are the
first 264 sequences of WikiText-2 and 264 of the Brown corpus, 33,528 tokens each; nothing of the Brown corpus
is trained on.
"""

import argparse
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from experiments.wikitext import wikitext_sequences
from mxd_lens.models import SMOLLM2, packaged_folder
from mxd_lens.text import load_text, token_sequences

HELD_OUT = 264
CORPORA = ("movie_reviews", "abc", "genesis", "inaugural", "sentence_polarity", "shakespeare")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--wikitext", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()

    from transformers import AutoTokenizer

    reader = SimpleNamespace(tokenizer=AutoTokenizer.from_pretrained(packaged_folder(SMOLLM2)))
    wikitext = wikitext_sequences(args.wikitext, reader.tokenizer)
    parts = {"WikiText-2": wikitext[HELD_OUT:]}
    for name in CORPORA:
        parts[name] = token_sequences(reader, load_text(f"nltk:{name}"), 10**9, separator="eos")
    for name, sequences in parts.items():
        print(f"{name}: {len(sequences):,} sequences, {127 * len(sequences):,} tokens")
    train = torch.cat(list(parts.values()))
    train = train[torch.randperm(len(train), generator=torch.Generator().manual_seed(0))]
    print(f"together: {127 * len(train):,} tokens of {SMOLLM2}'s")
    brown = token_sequences(reader, load_text("nltk:brown").shuffle(seed=0), HELD_OUT, separator="eos")
    arrays = {"train": train, "WikiText-2": wikitext[:HELD_OUT], "Brown": brown}
    small: dict[str, Any] = {name: tokens.numpy().astype(np.uint16) for name, tokens in arrays.items()}
    np.savez_compressed(args.output, **small)


if __name__ == "__main__":
    main()
