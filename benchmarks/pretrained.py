"""The layers that come with the package: trained, judged, rounded to bfloat16, described.

    python -m benchmarks.pretrained --text FOLDER --output FOLDER [--layer 11] [--k 32] [--epochs 3]

FOLDER holds WikiText-2's valid.txt and test.txt; nltk must find the Brown corpus. The MxD and the
transcoder of as many parameters are trained on one stream of both texts, and judged on sequences of
each that were held out. What is written to OUTPUT/weights belongs into mxd_lens/pretrained/weights.
"""

import argparse
from pathlib import Path

import torch
from datasets import Dataset

from benchmarks.wikitext import BOS, CONTEXT, HELD_OUT, wikitext_sequences
from mxd_lens import TranscoderRunnerConfig, load_model
from mxd_lens.evals.frontier import CONTENDERS, Size
from mxd_lens.models import SMOLLM2
from mxd_lens.training.multi_runner import MultiTranscoderTrainingRunner
from mxd_lens.training.text import load_text, split_text, token_sequences

RELEASES = {"mxd": "smollm2-135m-mxd", "topk_transcoder": "smollm2-135m-transcoder"}
TRANSCODER_WIDTH = 8192
"""9.4 M parameters: 19 MB in bfloat16."""
BATCH = 2048
TEXT = "WikiText-2 (validation, test) and the Brown corpus"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--layer", type=int, default=11)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=3)
    args = parser.parse_args()

    model = load_model(SMOLLM2)
    wikitext = wikitext_sequences(args.text, model.tokenizer)
    brown_train, brown_rest = split_text(load_text("nltk:brown"))
    every_sequence = 2**20
    train = torch.cat([wikitext[HELD_OUT:], token_sequences(model, brown_train, every_sequence)])
    train = train[torch.randperm(len(train), generator=torch.Generator().manual_seed(0))]
    tokens = len(train) * (CONTEXT - 1)
    steps = args.epochs * tokens // BATCH
    d_model = model.cfg.d_model
    size = Size(d_model, d_model, 4 * d_model, TRANSCODER_WIDTH)
    print(f"{tokens:,} different tokens, {steps:,} steps.", flush=True)
    cfgs = {
        name: TranscoderRunnerConfig(
            sae=CONTENDERS[name].config(size, args.k),
            model_name=SMOLLM2,
            hook_name=f"blocks.{args.layer}.mlp.hook_in",
            hook_name_out=f"blocks.{args.layer}.hook_mlp_out",
            dataset_path=TEXT,
            training_tokens=steps * BATCH,
            train_batch_size_tokens=BATCH,
            n_batches_in_buffer=1024,
            lr=CONTENDERS[name].lr,
            lr_warm_up_steps=50,
            lr_decay_steps=steps // 2,
            standardize_activations=True,
            autocast=True,
            exclude_special_tokens=[BOS],
            use_cached_activations=True,
            cached_activations_path=str(args.output / "activations"),
            n_checkpoints=8,
            n_checkpoints_kept=1,
            output_path=str(args.output / name),
            seed=0,
        )
        for name in RELEASES
    }
    runner = MultiTranscoderTrainingRunner(
        cfgs,
        args.output / "checkpoints",
        resume=True,
        override_dataset=Dataset.from_dict({"tokens": train.tolist()}),
        override_model=model,
    )
    runner.run()


if __name__ == "__main__":
    main()
