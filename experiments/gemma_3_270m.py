"""An MxD and a TopK transcoder of one MLP of Gemma 3 270M, whose blocks have a norm after the MLP too.

    python -m experiments.gemma_3_270m --output FOLDER [--tokens 200000] [--layer 5] [--sequences 16]

Both have the parameters of a transcoder with 4 x 640 features, read what the MLP reads and predict what the
block adds to the residual stream. They are trained together through HookedTransformer and evaluated through
SAETransformerBridge, which runs transformers' own model. FOLDER gets both layers, report.json for each,
summary.json, index.html and README.md.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge
from torch import Tensor

from experiments.at_scale_report import write
from mxd_lens import (
    MxD,
    TopKTranscoder,
    TrainingMxDConfig,
    TrainingTopKTranscoderConfig,
    TranscoderRunnerConfig,
    load_model,
    replacement_hooks,
)
from mxd_lens.architectures.base import transcoder_parameters
from mxd_lens.artifacts.tables import Table
from mxd_lens.evals.faithfulness import evaluate_all
from mxd_lens.models import GEMMA3
from mxd_lens.text import load_text, split_text, token_sequences
from mxd_lens.training.multi_runner import MultiTranscoderTrainingRunner

BATCH, K = 1024, 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=200_000)
    parser.add_argument("--layer", type=int, default=5)
    parser.add_argument("--sequences", type=int, default=16, help="held-out sequences of 128 tokens")
    args = parser.parse_args()

    train_rows, held_out_rows = split_text(load_text("nltk:brown"))
    model = load_model(GEMMA3)
    d = model.cfg.d_model
    train = token_sequences(model, train_rows, max(1, args.tokens // 128))
    held_out = token_sequences(model, held_out_rows, args.sequences)
    budget = transcoder_parameters(d, d, 4 * d)
    common = {"d_in": d, "d_out": d, "k": K}
    branch = {"d_hidden": d, "hidden_activation": "gelu"}
    saes = {
        "mxd": TrainingMxDConfig(
            d_sae=TrainingMxDConfig.matched_size(budget, d_in=d, d_out=d, **branch), **common, **branch
        ),
        "transcoder": TrainingTopKTranscoderConfig(d_sae=4 * d, **common),
    }
    steps = args.tokens // BATCH
    hook_name, hook_name_out = f"blocks.{args.layer}.mlp.hook_in", f"blocks.{args.layer}.hook_mlp_out"
    cfgs = {
        name: TranscoderRunnerConfig(
            sae=sae,
            model_name=GEMMA3,
            hook_name=hook_name,
            hook_name_out=hook_name_out,
            dataset_path="nltk:brown",
            training_tokens=steps * BATCH,
            train_batch_size_tokens=BATCH,
            n_batches_in_buffer=8,
            store_batch_size_prompts=8,
            context_size=128,
            standardize_activations=True,
            lr=4e-3,
            lr_warm_up_steps=min(20, steps // 4),
            lr_decay_steps=steps // 2,
            n_checkpoints=0,
            output_path=str(args.output / name),
        )
        for name, sae in saes.items()
    }
    MultiTranscoderTrainingRunner(
        cfgs,
        override_dataset=Dataset.from_dict({"tokens": train.tolist()}),
        override_model=model,
    ).run()

    del model
    summary = {
        "training_tokens": steps * BATCH,
        "layer": args.layer,
        "k": K,
        **judge(args.output, args.layer, held_out),
    }
    (args.output / "summary.json").write_text(json.dumps(summary, indent=1), encoding="utf-8")
    report(args.output, summary)


def judge(output: Path, layer: int, held_out: Tensor) -> dict[str, Any]:
    """What the two layers in `output` do in place of the MLP, beside PyTorch's own forward hooks."""
    bridge = load_model(GEMMA3, model_class=SAETransformerBridge)
    layers = {
        "mxd": MxD.from_pretrained(output / "mxd"),
        "transcoder": TopKTranscoder.from_pretrained(output / "transcoder"),
    }
    reports = evaluate_all(
        bridge, layers, held_out, batch_size=4, text_name="the Brown corpus, held-out rows"
    )
    tokens = held_out[:4]
    differences: dict[str, dict[str, float]] = {}
    for name, sae in layers.items():
        reports[name].save(output / name / "report.json")
        expected = by_forward_hooks(bridge.original_model, layer, sae, tokens)
        with torch.no_grad():
            by_hooks = bridge.run_with_hooks(tokens, fwd_hooks=replacement_hooks(sae))
            with bridge.saes(saes=[sae]):
                attached = bridge(tokens)
        differences[name] = {
            "replacement_hooks": (by_hooks - expected).abs().max().item(),
            "attached": (attached - expected).abs().max().item(),
            "largest_logit": expected.abs().max().item(),
        }
    return {
        "logits_minus_forward_hooks": differences,
        "reports": {name: report.to_dict() for name, report in reports.items()},
    }


@torch.no_grad()
def by_forward_hooks(model: Any, layer: int, sae: Any, tokens: Tensor) -> Tensor:
    """Logits with PyTorch's forward hooks alone: what follows the norm after the MLP is replaced."""
    block, read = model.model.layers[layer], []
    hooks = [
        block.pre_feedforward_layernorm.register_forward_hook(lambda _m, _x, y: read.append(y)),
        block.post_feedforward_layernorm.register_forward_hook(lambda *_: sae(read.pop())),
    ]
    try:
        return model(tokens).logits
    finally:
        for hook in hooks:
            hook.remove()


def report(folder: Path, summary: dict[str, Any]) -> None:
    """The page of the results, and README.md with the same tables."""
    reports = summary["reports"]
    first = reports["mxd"]
    errors = [
        [
            name,
            f"{r['n_experts']:,}",
            f"{r['normalized_mse']:.3f}",
            f"{r['normalized_mse_mean_gate']:.3f}",
            f"{r['ce_loss_replaced'] - r['ce_loss']:+.3f}",
            f"{r['ce_loss_zero_ablated'] - r['ce_loss']:+.3f}",
        ]
        for name, r in reports.items()
    ]
    differences = [
        [name, f"{d['replacement_hooks']:.1e}", f"{d['attached']:.1e}", f"{d['largest_logit']:.1f}"]
        for name, d in summary["logits_minus_forward_hooks"].items()
    ]
    write(
        folder,
        "An MLP of Gemma 3 270M",
        "How well do an MxD and a TopK transcoder replace an MLP of Gemma 3, whose blocks have a norm after "
        f"the MLP too? Block {summary['layer']}, K {summary['k']}, {first['n_parameters']:,} parameters "
        f"each, trained on {summary['training_tokens']:,} tokens of Brown through HookedTransformer, and "
        f"judged on {first['n_tokens']:,} held-out tokens through SAETransformerBridge. One seed.",
        [
            (
                "Errors",
                "The layers in place of the MLP. Cross-entropies are what is added, in nats.",
                Table(
                    [
                        "layer",
                        "experts",
                        "normalised MSE",
                        "under mean ablation",
                        "cross-entropy",
                        "with the MLP zero-ablated",
                    ],
                    errors,
                ),
            ),
            (
                "The right tensor",
                "The largest difference in any logit of 4 sequences to PyTorch's forward hooks on "
                "transformers' pre_feedforward_layernorm and post_feedforward_layernorm.",
                Table(["layer", "replacement_hooks", "attached by SAELens", "largest logit"], differences),
            ),
        ],
        "\n    python -m experiments.gemma_3_270m --output FOLDER\n",
    )


if __name__ == "__main__":
    main()
