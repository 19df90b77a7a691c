"""Many layers trained together against the same layers trained one after the other: seconds.

    python -m benchmarks.together [--layers-trained 24] [--tokens 16384] [--layer 12] [--json FILE]

SmolLM2-135M, the architectures of the frontier in turn at growing K. Together the language model runs
once; one after the other it runs for each. The weights that come out are the same.
"""

import argparse
import json
import time
from itertools import cycle, islice, product
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from rich.console import Console

from benchmarks.train_step import Setting, machine
from mxd_lens import TranscoderRunnerConfig, TranscoderTrainingRunner, load_model
from mxd_lens.evals.frontier import CONTENDERS, Size
from mxd_lens.models import SMOLLM2
from mxd_lens.text import EMBEDDED, load_text, token_sequences
from mxd_lens.training.multi_runner import MultiTranscoderTrainingRunner

KS = (8, 16, 32, 64, 128, 256)
BATCH = 2048


def configs(model: Any, n: int, layer: int, tokens: int) -> dict[str, TranscoderRunnerConfig]:
    """The runs, by name."""
    d_model = model.cfg.d_model
    size = Size(d_model, d_model, 4 * d_model, 8 * d_model)
    transcoders = {name: made for name, made in CONTENDERS.items() if made.reads == "input"}
    members = islice(cycle(product(KS, transcoders.items())), n)
    return {
        f"{i} {name} k{k}": TranscoderRunnerConfig(
            sae=contender.config(size, k),
            model_name=SMOLLM2,
            hook_name=f"blocks.{layer}.mlp.hook_in",
            hook_name_out=f"blocks.{layer}.hook_mlp_out",
            dataset_path=EMBEDDED,
            training_tokens=tokens,
            train_batch_size_tokens=BATCH,
            n_batches_in_buffer=2 * BATCH // 128,
            lr=4e-3,
            lr_warm_up_steps=1,
            standardize_activations=True,
            n_checkpoints=0,
            save_final_checkpoint=False,
            output_path=None,
        )
        for i, (k, (name, contender)) in enumerate(members)
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--layers-trained", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=16_384)
    parser.add_argument("--layer", type=int, default=12)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    model = load_model(SMOLLM2)
    sequences = token_sequences(model, load_text(EMBEDDED), 2 * args.tokens // 128 + 64)
    text = Dataset.from_dict({"tokens": sequences.tolist()})
    cfgs = configs(model, args.layers_trained, args.layer, args.tokens)

    start = time.perf_counter()
    together = MultiTranscoderTrainingRunner(cfgs, override_dataset=text, override_model=model).run()
    seconds_together = time.perf_counter() - start
    alone: dict[str, float] = {}
    for name, cfg in cfgs.items():
        start = time.perf_counter()
        sae = TranscoderTrainingRunner(cfg, text, model).run()
        alone[name] = time.perf_counter() - start
        for weight, same in zip(sae.parameters(), together[name].parameters(), strict=True):
            torch.testing.assert_close(weight, same, rtol=1e-3, atol=1e-4)
    measured = {
        "machine": machine(Setting("cpu", torch.float32)),
        "layers_trained": len(cfgs),
        "tokens": args.tokens,
        "seconds_together": seconds_together,
        "seconds_one_after_the_other": sum(alone.values()),
        "share": seconds_together / sum(alone.values()),
        "seconds_each": alone,
    }
    Console().print(
        f"{len(cfgs)} layers on {args.tokens:,} tokens: together {seconds_together:.0f} s, one after the "
        f"other {sum(alone.values()):.0f} s: {measured['share']:.3f} of it."
    )
    if args.json:
        args.json.write_text(json.dumps(measured, indent=1) + "\n")


if __name__ == "__main__":
    main()
