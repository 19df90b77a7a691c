"""The headline run: an MxD of one SmolLM2-135M layer on WikiText-2, trained by the real runner.

    python -m experiments.wikitext --text FOLDER --output FOLDER [--layer 12] [--k 32] [--lr 4e-3] [--raw]

FOLDER holds WikiText-2's valid.txt and test.txt. The text is detokenised, its lines of more than 40
characters shuffled, joined with the end-of-text token and cut into 127 tokens after a BOS; the first
256 sequences are held out. Recipe: 4 epochs, batches of 2,048 tokens, Adam, 50 steps of warm-up, linear
decay over the last half, standardised activations unless --raw, parameters matched to a transcoder of
16 x d_in features.
"""

import argparse
import json
import random
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from mxd_lens import (
    TrainingMxDConfig,
    TranscoderRunnerConfig,
    TranscoderTrainingRunner,
    evaluate,
    load_model,
    matched_n_experts,
)
from mxd_lens.models import SMOLLM2

BOS, EOS, CONTEXT, HELD_OUT, EPOCHS, BATCH = 1, 2, 128, 256, 4, 2048


def wikitext_sequences(folder: Path, tokenizer: Any) -> torch.Tensor:
    """WikiText-2's validation and test text as token sequences [n, 128], BOS first."""
    lines: list[str] = []
    for name in ("valid.txt", "test.txt"):
        for line in (folder / name).read_text(encoding="utf-8").splitlines():
            for written, read in ((" @-@ ", "-"), (" @,@ ", ","), (" @.@ ", "."), (" <unk> ", " ")):
                line = line.replace(written, read)
            if len(line) > 40:
                lines.append(line)
    random.Random(0).shuffle(lines)
    tokens: list[int] = []
    for line in lines:
        tokens += tokenizer(line, add_special_tokens=False)["input_ids"] + [EOS]
    n = len(tokens) // (CONTEXT - 1)
    sequences = torch.tensor(tokens[: n * (CONTEXT - 1)]).view(n, CONTEXT - 1)
    return torch.cat([torch.full((n, 1), BOS), sequences], dim=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--layer", type=int, default=12)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--hidden-activation", default="gelu")
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--raw", action="store_true", help="no standardised activations, as the paper's code")
    parser.add_argument("--gated", action="store_true")
    args = parser.parse_args()

    model = load_model(SMOLLM2)
    sequences = wikitext_sequences(args.text, model.tokenizer)
    held_out, train = sequences[:HELD_OUT], sequences[HELD_OUT:]
    d_model = model.cfg.d_model
    d_hidden = 4 * d_model
    n_experts = matched_n_experts(d_model, d_model, d_hidden, 16 * d_model, args.gated)
    tokens = EPOCHS * len(train) * (CONTEXT - 1)
    steps = tokens // BATCH
    cfg = TranscoderRunnerConfig(
        sae=TrainingMxDConfig(
            d_in=d_model,
            d_out=d_model,
            d_sae=n_experts,
            d_hidden=d_hidden,
            k=args.k,
            hidden_activation=args.hidden_activation,
            gated=args.gated,
        ),
        model_name=SMOLLM2,
        hook_name=f"blocks.{args.layer}.mlp.hook_in",
        hook_name_out=f"blocks.{args.layer}.hook_mlp_out",
        dataset_path="wikitext-2 (valid, test)",
        training_tokens=steps * BATCH,
        train_batch_size_tokens=BATCH,
        n_batches_in_buffer=512,
        lr=args.lr,
        lr_warm_up_steps=50,
        lr_decay_steps=steps // 2,
        standardize_activations=not args.raw,
        exclude_special_tokens=[BOS],
        use_cached_activations=True,
        cached_activations_path=str(args.output.with_name(args.output.name + "-activations")),
        output_path=str(args.output),
        resume_from_checkpoint="latest",
    )
    runner = TranscoderTrainingRunner(
        cfg, override_dataset=Dataset.from_dict({"tokens": train.tolist()}), override_model=model
    )
    sae = runner.run()
    report = evaluate(model, sae, held_out)
    report.save(args.output / "report.json")
    print(json.dumps(report.to_dict(), indent=1))


if __name__ == "__main__":
    main()
