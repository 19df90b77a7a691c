"""The layers that come with the package: trained, judged, rounded to bfloat16, described.

    python -m experiments.pretrained --text FOLDER --output FOLDER [--layer 11] [--k 32] [--epochs 3]

FOLDER holds WikiText-2's valid.txt and test.txt; nltk must find the Brown corpus. The MxD and the
transcoder of as many parameters are trained on one stream of both texts, and judged on sequences of
each that were held out. What is written to OUTPUT/weights belongs into mxd_lens/pretrained/weights.
"""

import argparse
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from sae_lens.constants import RUNNER_CFG_FILENAME
from safetensors.torch import load_file, save_file
from torch import Tensor

from experiments.wikitext import BOS, CONTEXT, HELD_OUT, wikitext_sequences
from mxd_lens import ExpertStatistics, FaithfulnessReport, TranscoderRunnerConfig, load_model
from mxd_lens.analysis.decomposition import active_experts
from mxd_lens.analysis.firings import layer_input
from mxd_lens.architectures.base import PairedTranscoder
from mxd_lens.architectures.saved import read_json
from mxd_lens.evals.faithfulness import evaluate_all
from mxd_lens.evals.frontier import CONTENDERS, Size
from mxd_lens.models import SMOLLM2
from mxd_lens.pretrained.model_card import model_card, training_settings
from mxd_lens.pretrained.registry import REPORT_FILENAME
from mxd_lens.text import load_text, split_text, token_sequences
from mxd_lens.training.multi_runner import MultiTranscoderTrainingRunner

RELEASES = {"mxd": "smollm2-135m-mxd", "topk_transcoder": "smollm2-135m-transcoder"}
TRANSCODER_WIDTH = 8192
"""9.4 M parameters: 19 MB in bfloat16."""
BATCH = 2048
HELD_OUT_OF_EACH = 64
"""Sequences of each text to judge on."""
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
            lr=4e-3,
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
    if not all((args.output / name / "cfg.json").exists() for name in cfgs):
        MultiTranscoderTrainingRunner(
            cfgs,
            args.output / "checkpoints",
            resume=True,
            override_dataset=Dataset.from_dict({"tokens": train.tolist()}),
            override_model=model,
        ).run()

    held_out = {
        "WikiText-2, held-out sequences": wikitext[:HELD_OUT_OF_EACH],
        "the Brown corpus, held-out rows": token_sequences(model, brown_rest, HELD_OUT_OF_EACH),
    }
    sae_id = f"blocks.{args.layer}.mlp"
    folders = {name: args.output / "weights" / release / sae_id for name, release in RELEASES.items()}
    for name, folder in folders.items():
        in_bfloat16(args.output / name, folder)
    # What is judged is what is shipped.
    saes = {
        name: PairedTranscoder.load_from_disk(folder, dtype="float32") for name, folder in folders.items()
    }
    reports = {text: evaluate_all(model, saes, tokens) for text, tokens in held_out.items()}
    for name, folder in folders.items():
        judged = {text: by_name[name] for text, by_name in reports.items()}
        write_reports(folder, judged)
        card = model_card(
            PairedTranscoder.load_from_disk(folder),
            judged,
            release=RELEASES[name],
            sae_id=sae_id,
            training=training_settings(read_json(args.output / name / RUNNER_CFG_FILENAME)),
            top_experts=what_fires(saes[name], model, next(iter(held_out.values()))),
            license="mit",
        )
        (folder / "README.md").write_text(card, encoding="utf-8")


def in_bfloat16(trained: Path, folder: Path) -> None:
    """The layer and its sparsity, its weights rounded."""
    sae = PairedTranscoder.load_from_disk(trained, dtype="bfloat16")
    sae.cfg.device = "cpu"
    sae.save_model(folder)
    save_file(load_file(trained / "sparsity.safetensors"), folder / "sparsity.safetensors")


def write_reports(folder: Path, reports: dict[str, FaithfulnessReport]) -> None:
    """report.json on the first text; on the others report-2.json and so on."""
    for i, report in enumerate(reports.values(), start=1):
        report.save(folder / (REPORT_FILENAME if i == 1 else f"report-{i}.json"))


@torch.no_grad()
def what_fires(sae: PairedTranscoder, model: Any, tokens: Tensor, n: int = 20) -> dict[int, str]:
    """The tokens at which the n experts that carry most of the coefficients fire most often."""
    statistics = ExpertStatistics.of(sae)
    counts: dict[int, Counter[int]] = defaultdict(Counter)
    for batch in tokens.split(8):
        kept = batch != BOS
        x = layer_input(model, sae, batch)[kept]
        statistics.add(sae, x)
        values, indices = active_experts(sae, x)
        token_of, slot = (values > 0).nonzero(as_tuple=True)
        fired = zip(indices[token_of, slot].tolist(), batch[kept][token_of].tolist(), strict=True)
        for expert, token in fired:
            counts[expert][token] += 1
    described = {}
    for expert in statistics.load_share.topk(n).indices.tolist():
        common = [
            f"{model.tokenizer.decode([token])!r} {count}" for token, count in counts[expert].most_common(5)
        ]
        described[expert] = f"{statistics.density[expert]:.1%} of tokens; most often at {', '.join(common)}"
    return described


if __name__ == "__main__":
    main()
