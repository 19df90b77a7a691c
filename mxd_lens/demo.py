"""`mxd-lens demo`: train, save, load, attach and evaluate an MxD on text that every machine has."""

import time
from pathlib import Path
from typing import Any

import typer
from datasets import Dataset
from sae_lens.constants import SAE_CFG_FILENAME

from mxd_lens.architectures.base import transcoder_parameters
from mxd_lens.architectures.mxd import MxD, TrainingMxDConfig
from mxd_lens.artifacts.tables import printable
from mxd_lens.evals.faithfulness import FaithfulnessReport, evaluate
from mxd_lens.models import SMOLLM2, load_model
from mxd_lens.reports.run import read_history, write_run_page
from mxd_lens.text import EMBEDDED, load_text, split_text, token_sequences
from mxd_lens.training.runner import (
    TranscoderRunnerConfig,
    TranscoderTrainingRunner,
    refuse_other_settings,
)

PROMPT = "A list is a mutable sequence. It is created with"


def run_demo(
    output: str | Path,
    layer: int = 12,
    training_tokens: int = 500_000,
    text_tokens: int = 180_000,
    n_sequences: int = 24,
    new_tokens: int = 30,
    model_name: str = SMOLLM2,
    k: int = 32,
) -> FaithfulnessReport:
    """Train an MxD of one MLP on text that every machine has, and evaluate what was saved.

    Writes the layer (a SAELens folder), report.json and index.html to `output`.

    Args:
        output: a folder. An interrupted demo in it is resumed; a finished one is evaluated again.
        layer: the block whose MLP is decomposed.
        training_tokens: tokens that the layer is trained on.
        text_tokens: distinct tokens among them; the language model reads each once.
        n_sequences: held-out sequences of 128 tokens to evaluate on.
        new_tokens: tokens that the model continues the prompt with.
        model_name: a name for `load_model`.
        k: active experts per token.

    Raises:
        ValueError: `output` holds a demo with other settings.
    """
    started = time.monotonic()
    output = Path(output)
    model = load_model(model_name)
    training_rows, held_out_rows = split_text(load_text(EMBEDDED))
    train = token_sequences(model, training_rows, max(1, text_tokens // 128))
    held_out = token_sequences(model, held_out_rows, n_sequences)
    typer.echo(f"{model_name}, block {layer}: {len(train) * 128:,} tokens of the Python documentation.")

    d_model = model.cfg.d_model
    d_hidden = 4 * d_model
    budget = transcoder_parameters(d_model, d_model, width=16 * d_model)
    batch = min(2048, training_tokens)
    steps = training_tokens // batch
    cfg = TranscoderRunnerConfig(
        sae=TrainingMxDConfig(
            d_in=d_model,
            d_out=d_model,
            d_sae=TrainingMxDConfig.matched_size(budget, d_in=d_model, d_out=d_model, d_hidden=d_hidden),
            d_hidden=d_hidden,
            k=k,
        ),
        model_name=model_name,
        hook_name=f"blocks.{layer}.mlp.hook_in",
        hook_name_out=f"blocks.{layer}.hook_mlp_out",
        dataset_path=EMBEDDED,
        training_tokens=steps * batch,
        train_batch_size_tokens=batch,
        standardize_activations=True,
        lr=4e-3,
        lr_warm_up_steps=min(20, steps // 4),
        lr_decay_steps=steps // 2,
        use_cached_activations=True,
        cached_activations_path=str(output / "activations"),
        output_path=str(output),
        resume_from_checkpoint="latest",
        n_checkpoints=3,
    )
    if (output / SAE_CFG_FILENAME).exists():
        refuse_other_settings(output, cfg)
    else:
        TranscoderTrainingRunner(
            cfg, override_dataset=Dataset.from_dict({"tokens": train.tolist()}), override_model=model
        ).run()
    minutes = (time.monotonic() - started) / 60

    mxd = MxD.from_pretrained(output)
    report = evaluate(model, mxd, held_out)
    report.save(output / "report.json")
    typer.echo(report)
    texts = continuations(model, mxd, PROMPT, new_tokens)
    for name, text in texts.items():
        lines = [printable(line) for line in text.split("\n")]
        typer.echo("\n".join([name, *lines, ""]))
    page = write_run_page(
        output / "index.html",
        f"A Mixture of Decoders of {model_name}, block {layer}",
        read_history(output),
        report,
        texts,
        {
            "training": f"{cfg.training_tokens:,} tokens, "
            f"{min(cfg.training_tokens, len(train) * 128):,} of them distinct",
            "experts": f"{mxd.cfg.d_sae:,}, {k} active per token; d_hidden {mxd.cfg.d_hidden:,}",
            "time": f"{minutes:.1f} minutes to train, {(time.monotonic() - started) / 60:.1f} in all",
            "to load it": f'MxD.from_pretrained("{output}")',
        },
    )
    typer.echo(f"Done in {(time.monotonic() - started) / 60:.1f} minutes. Layer: {output}. Page: {page}")
    return report


def continuations(model: Any, sae: MxD, prompt: str, new_tokens: int) -> dict[str, str]:
    """Return the model's continuations of `prompt`: unmodified, and with the layer attached."""

    def generate() -> str:
        return model.generate(prompt, max_new_tokens=new_tokens, do_sample=False, verbose=False)

    original = generate()
    with model.saes(saes=[sae]):
        replaced = generate()
    return {"the unmodified model": original, "with the layer in place of the MLP": replaced}
