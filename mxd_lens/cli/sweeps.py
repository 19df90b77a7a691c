"""The commands that train and evaluate in one: frontier and demo."""

from pathlib import Path
from typing import Annotated, Any

import typer

from mxd_lens.cli.application import command, show
from mxd_lens.cli.loading import load_language_model, n_blocks_of, width_of
from mxd_lens.cli.options import (
    Bridge,
    Device,
    Json,
    Model,
    Text,
    best_device,
    checked,
    integers,
    is_folder_to_write,
    is_list_of_integers,
    is_text,
    one_of,
    output_folder,
)
from mxd_lens.evals.recipes import PRESETS, RECIPES


@command
def frontier(
    context: typer.Context,
    output: Annotated[
        Path,
        typer.Argument(
            help="The folder to write to; an interrupted sweep is resumed there.",
            callback=checked(is_folder_to_write),
        ),
    ],
    model: Model = "smollm2-135m-instruct",
    layers: Annotated[
        str,
        typer.Option(help="Which blocks' MLPs, as 2,11,12.", callback=checked(is_list_of_integers())),
    ] = "12",
    k: Annotated[
        str,
        typer.Option(help="Active experts per token, as 8,32,128.", callback=checked(is_list_of_integers(1))),
    ] = "8,16,32,64,128,256",
    architectures: Annotated[
        str | None, typer.Option(help="Which architectures, as mxd,topk_transcoder. Default: all.")
    ] = None,
    text: Text = "embedded",
    other_text: Annotated[
        str | None, typer.Option(help="A second text to evaluate on.", callback=checked(is_text))
    ] = None,
    tokens: Annotated[int, typer.Option(help="Training tokens for each layer.", min=1)] = 1_000_000,
    text_tokens: Annotated[
        int, typer.Option(help="Tokens of the text to train on; more are repeats. 0: all.", min=0)
    ] = 0,
    match_width: Annotated[
        int, typer.Option(help="Features of the transcoder to match in parameters. 0: 8 x d_in.", min=0)
    ] = 0,
    hidden: Annotated[int, typer.Option(help="Width of the decoder branch. 0: 4 x d_in.", min=0)] = 0,
    seeds: Annotated[
        str,
        typer.Option(help="Seeds of the initial weights, as 0,1,2.", callback=checked(is_list_of_integers())),
    ] = "0",
    batch: Annotated[int, typer.Option(help="Tokens in a step.", min=1)] = 2048,
    sequences: Annotated[
        int, typer.Option(help="Held-out sequences of 128 tokens of each text.", min=1)
    ] = 32,
    at_once: Annotated[int, typer.Option(help="Layers trained together; memory is the limit.", min=1)] = 32,
    bf16: Annotated[
        bool, typer.Option("--bf16", help="Train with bfloat16 products, weights in float32.")
    ] = False,
    recipe: Annotated[
        str,
        typer.Option(help="Learning rate and schedule: tuned, or paper.", callback=checked(one_of(*RECIPES))),
    ] = "tuned",
    preset: Annotated[
        str | None,
        typer.Option(
            help="A run of the paper, as paper-gpt2: its model, block, K, sizes, text, tokens and recipe, "
            "where no other option says otherwise.",
            callback=checked(one_of(*PRESETS)),
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would be trained, and load nothing.")
    ] = False,
    bridge: Bridge = False,
    device: Device = "auto",
    json: Json = None,
) -> None:
    """Train and evaluate every architecture at every K."""
    d_model = width_of(model)
    if preset is not None:
        run = PRESETS[preset]

        def chosen(name: str, given: Any, preset: Any) -> Any:
            source = context.get_parameter_source(name)
            return given if source is not None and source.name == "COMMANDLINE" else preset

        d_model = chosen("model", d_model, run.d_model)
        model = chosen("model", model, run.model)
        layers = chosen("layers", layers, str(run.layer))
        k = chosen("k", k, ",".join(map(str, run.ks)))
        text = chosen("text", text, run.text)
        tokens = chosen("tokens", tokens, run.tokens)
        batch = chosen("batch", batch, run.batch)
        match_width = chosen("match_width", match_width, run.transcoder_width)
        hidden = chosen("hidden", hidden, run.d_hidden)
        recipe = chosen("recipe", recipe, run.recipe)
    if tokens < batch:
        raise typer.BadParameter(
            f"{tokens:,} tokens are less than one batch of {batch:,}.", param_hint="--tokens"
        )
    if 0 < text_tokens < 128:
        raise typer.BadParameter("one sequence has 128 tokens.", param_hint="--text-tokens")
    blocks, n_blocks = integers(layers), n_blocks_of(model)
    if n_blocks is not None and max(blocks) >= n_blocks:
        raise typer.BadParameter(
            f"there is no block {max(blocks)}: the model has {n_blocks}, 0 to {n_blocks - 1}.",
            param_hint="--layers",
        )

    from datasets import Dataset

    from mxd_lens import frontier
    from mxd_lens.evals.frontier import CONTENDERS, Size, plan
    from mxd_lens.reports.frontier import write_frontier_page, write_frontier_png
    from mxd_lens.text import load_text, split_text, token_sequences

    names = list(CONTENDERS) if architectures is None else architectures.split(",")
    if unknown := set(names) - CONTENDERS.keys():
        raise typer.BadParameter(
            f"there is no architecture {', '.join(sorted(unknown))!r}. Choose from {', '.join(CONTENDERS)}.",
            param_hint="--architectures",
        )
    contenders = {name: CONTENDERS[name] for name in names}
    if dry_run:
        if d_model is None:
            raise typer.BadParameter(
                f"the width of {model} is not known without its config.json. Give a folder or a preset.",
                param_hint="--model",
            )
        size = Size(d_model, d_model, hidden or 4 * d_model, match_width or 8 * d_model)
        planned = plan(size, blocks, integers(k), integers(seeds), tokens, batch, RECIPES[recipe], contenders)
        show(planned, json, f"Model {model}, text {text}. Nothing was trained.")
        return
    language_model = load_language_model(model, device, bridge)
    train, rest = split_text(load_text(text, streaming=False))
    held_out = {text: token_sequences(language_model, rest, sequences)}
    if other_text:
        _, other = split_text(load_text(other_text, streaming=False))
        held_out[other_text] = token_sequences(language_model, other, sequences)
    if text_tokens:
        rows = token_sequences(language_model, train, text_tokens // 128)
        train = Dataset.from_dict({"tokens": rows.tolist()})
    result = frontier(
        language_model,
        train,
        held_out,
        output,
        layers=blocks,
        ks=integers(k),
        contenders=contenders,
        seeds=integers(seeds),
        transcoder_width=match_width or None,
        d_hidden=hidden or None,
        training_tokens=tokens,
        batch=batch,
        layers_at_once=at_once,
        text_name=text,
        recipe=RECIPES[recipe],
        run_settings={"device": best_device(device), "autocast": bf16},
    )
    page = write_frontier_page(output / "index.html", result)
    show(result, json, f"The page: {page}")
    try:
        for i, name in enumerate(held_out):
            write_frontier_png(output / f"frontier-{i}.png", result, name)
    except (ImportError, RuntimeError, ValueError) as e:  # which one depends on plotly's version
        typer.echo(f"No PNG was written ({e}).", err=True)
    if result.failures:
        reasons = "; ".join(f"{name}: {why}" for name, why in result.failures.items())
        typer.echo(f"Failed: {reasons}", err=True)
        raise typer.Exit(1)


@command
def demo(
    output: Annotated[Path, output_folder("The folder to write to.")] = Path("mxd-lens-demo"),
    layer: Annotated[
        int, typer.Option(help="Which block's MLP of SmolLM2-135M, 0 to 29.", min=0, max=29)
    ] = 12,
    tokens: Annotated[int, typer.Option(help="Training tokens.", min=2048)] = 500_000,
    sequences: Annotated[
        int, typer.Option(help="Held-out sequences of 128 tokens to evaluate on.", min=1)
    ] = 24,
) -> None:
    """Train and evaluate an MxD offline, in a few minutes."""
    from mxd_lens.demo import run_demo

    run_demo(output, layer, training_tokens=tokens, n_sequences=sequences)
