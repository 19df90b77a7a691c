"""The command line. Every command is one library call; nothing heavy is imported before it runs."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from mxd_lens import __version__

app = typer.Typer(
    help="Mixtures of Decoders and transcoders of a language model's MLPs.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Model = Annotated[
    str,
    typer.Option(help="A TransformerLens name, a Hugging Face folder, or smollm2-135m-instruct (offline)."),
]
Text = Annotated[
    str,
    typer.Option(help="embedded, nltk:NAME, a text file or folder, or a data set on the Hugging Face hub."),
]
LAYER = "The folder of a trained layer, or RELEASE:SAE_ID."
NAMED = "Each NAME=FOLDER or NAME=RELEASE:SAE_ID; NAME= may be left out."
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps.")]
Layer = Annotated[int, typer.Option(help="Which MLP; ignored where both hooks are given.")]


def show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"mxd_lens {__version__}")
        raise typer.Exit


@app.callback()
def version(
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Mixtures of Decoders and transcoders of a language model's MLPs."""


@app.command()
def train(
    output: Annotated[Path, typer.Argument(help="The folder to write the layer to.")],
    architecture: Annotated[
        str, typer.Option(help="mxd, skip_mxd, topk_transcoder or topk_skip_transcoder.")
    ] = "mxd",
    model: Model = "smollm2-135m-instruct",
    layer: Layer = 12,
    hook_in: Annotated[str, typer.Option(help="The input's hook point. Default: the MLP's input.")] = "",
    hook_out: Annotated[str, typer.Option(help="The target's hook point. Default: the MLP's output.")] = "",
    text: Text = "embedded",
    tokens: Annotated[int, typer.Option(help="Training tokens; a shorter text is repeated.")] = 2_000_000,
    experts: Annotated[
        int, typer.Option(help="Number of experts. 0: as many parameters as a --match-width transcoder.")
    ] = 0,
    match_width: Annotated[int, typer.Option(help="Features of the transcoder to match. 0: 16 x d_in.")] = 0,
    hidden: Annotated[int, typer.Option(help="Width of the decoder branch. 0: 4 x d_in.")] = 0,
    k: Annotated[int, typer.Option(help="Active experts per token. 0: relu sparsity with --l1.")] = 32,
    l1: Annotated[float, typer.Option(help="L1 coefficient, for --k 0.")] = 0.0,
    activation: Annotated[
        str, typer.Option(help="Of the decoder branch: relu, gelu, gelu_pytorch_tanh, sigmoid, silu.")
    ] = "gelu",
    gated: Annotated[bool, typer.Option(help="Whether the decoder branch is a gated linear unit.")] = False,
    standardize: Annotated[
        bool, typer.Option(help="Train on standardised activations; the paper's code does not.")
    ] = True,
    lr: Annotated[float, typer.Option(help="Learning rate of Adam; the paper's is 4e-4.")] = 4e-3,
    warm_up: Annotated[int, typer.Option(help="Steps of linear warm-up. -1: a twentieth of all.")] = -1,
    decay: Annotated[int, typer.Option(help="Steps of linear decay to 0 at the end. -1: half.")] = -1,
    batch: Annotated[int, typer.Option(help="Tokens in a step.")] = 4096,
    context: Annotated[int, typer.Option(help="Tokens in a sequence.")] = 128,
    keep_special_tokens: Annotated[
        bool, typer.Option(help="Train on BOS, EOS and the like too, as the paper's code does.")
    ] = False,
    cache: Annotated[
        Path | None, typer.Option(help="Keep the activations in this folder, for epochs and further runs.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the initial weights and of the order of tokens.")] = 42,
    device: Device = "cpu",
    dtype: Annotated[str, typer.Option(help="Of the layer: float32, bfloat16, float16.")] = "float32",
    checkpoints: Annotated[int, typer.Option(help="How many to write on the way; the last two stay.")] = 10,
    hold_out: Annotated[
        bool, typer.Option(help="Leave out the rows of the text that evaluate --held-out judges on.")
    ] = False,
    resume: Annotated[bool, typer.Option(help="Go on from the last checkpoint in OUTPUT.")] = False,
    wandb: Annotated[bool, typer.Option(help="Log to Weights & Biases.")] = False,
) -> None:
    """Train an MxD or transcoder of one MLP and save it as a folder that SAELens reads."""
    from sae_lens import LoggingConfig

    from mxd_lens import (
        MxDConfig,
        TranscoderRunnerConfig,
        TranscoderTrainingRunner,
        load_model,
        matched_n_experts,
        matched_n_features,
    )
    from mxd_lens.architectures import ARCHITECTURES
    from mxd_lens.architectures.skip import WithSkip
    from mxd_lens.text import load_text, split_text

    steps = tokens // batch
    with errors_for_people():
        if steps < 1:
            raise ValueError(f"--tokens {tokens:,} are less than one batch of --batch {batch:,}.")
        rows = split_text(load_text(text, streaming=False))[0] if hold_out else None
        known = {name: (made.training_layer, made.training_config) for name, made in ARCHITECTURES.items()}
        if architecture not in known:
            raise ValueError(f"there is no {architecture}: choose from {', '.join(known)}.")
        layer_class, config = known[architecture]
        language_model = load_model(model, device)
        d_model = language_model.cfg.d_model
        d_hidden = hidden or 4 * d_model
        width = match_width or 16 * d_model
        has_skip = issubclass(layer_class, WithSkip)
        branch: dict[str, Any] = {}
        if issubclass(config, MxDConfig):
            branch = {"d_hidden": d_hidden, "hidden_activation": activation, "gated": gated}
            matched = matched_n_experts(d_model, d_model, d_hidden, width, gated, has_skip)
        else:
            matched = matched_n_features(d_model, d_model, width) if has_skip else width
        sae = config(
            d_in=d_model,
            d_out=d_model,
            d_sae=experts or matched,
            k=k or None,
            l1_coefficient=l1,
            device=device,
            dtype=dtype,
            **branch,
        )
        cfg = TranscoderRunnerConfig(
            sae=sae,
            model_name=model,
            hook_name=hook_in or f"blocks.{layer}.mlp.hook_in",
            hook_name_out=hook_out or f"blocks.{layer}.hook_mlp_out",
            dataset_path=text,
            training_tokens=tokens,
            train_batch_size_tokens=batch,
            context_size=context,
            n_batches_in_buffer=max(256, 8 * batch // context),
            standardize_activations=standardize,
            lr=lr,
            lr_warm_up_steps=steps // 20 if warm_up < 0 else warm_up,
            lr_decay_steps=steps // 2 if decay < 0 else decay,
            exclude_special_tokens=not keep_special_tokens,
            use_cached_activations=cache is not None,
            cached_activations_path=str(cache) if cache else None,
            seed=seed,
            device=device,
            dtype=dtype,
            n_checkpoints=checkpoints,
            output_path=str(output),
            resume_from_checkpoint="latest" if resume else None,
            logger=LoggingConfig(log_to_wandb=wandb),
        )
        TranscoderTrainingRunner(cfg, override_dataset=rows, override_model=language_model).run()
    judge = f"--text {text} --held-out" if hold_out else "--text SOME-OTHER-TEXT"
    typer.echo(f"Saved in {output}. Judge it with: mxd-lens evaluate {output} {judge}")


@app.command()
def evaluate(
    layer: Annotated[str, typer.Argument(help=LAYER)],
    model: Annotated[str, typer.Option(help="The language model. Default: the one it was trained on.")] = "",
    text: Text = "embedded",
    sequences: Annotated[int, typer.Option(help="How many sequences of the text to judge on.")] = 32,
    skip: Annotated[int, typer.Option(help="How many rows of the text to skip first.")] = 0,
    held_out: Annotated[
        bool, typer.Option(help="Only the rows that train --hold-out, and the demo, leave out.")
    ] = False,
    device: Device = "cpu",
    json: Annotated[Path | None, typer.Option(help="Write the report there.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write a page about it there.")] = None,
) -> None:
    """Judge a layer in the place of its MLP: errors, cross-entropies, and what the experts do of it."""
    from mxd_lens import evaluate, load_model

    with errors_for_people():
        name, sae = named_layer(layer, device)
        if text == sae.cfg.metadata.dataset_path and not held_out and not skip:
            typer.echo(f"The layer was trained on {text}: judge it on another, or --held-out.", err=True)
        language_model = load_model(model or sae.cfg.metadata.model_name, device)
        tokens = read_as_trained(sae, language_model, text, skip, sequences, held_out)
        report = evaluate(language_model, sae, tokens.to(device))
        if json is not None:
            report.save(json)
        if html is not None:
            from mxd_lens.reports.run import read_history, write_run_page

            write_run_page(html, f"{name}: how faithful it is", read_history(layer), report)
    typer.echo(report)


@app.command()
def carry(
    output: Annotated[Path, typer.Argument(help="The folder to write to: index.html and carry.json.")],
    layers: Annotated[list[str], typer.Argument(help=f"Layers of one model. {NAMED}")],
    again: Annotated[
        list[str] | None,
        typer.Option(help="The one layer trained again from another seed, to compare experts with."),
    ] = None,
    model: Annotated[str, typer.Option(help="The language model. Default: the one it was trained on.")] = "",
    text: Text = "embedded",
    sequences: Annotated[int, typer.Option(help="How many sequences firing is read from.")] = 256,
    judged: Annotated[int, typer.Option(help="How many of them gates and ablations are run on.")] = 32,
    skip: Annotated[int, typer.Option(help="How many rows of the text to skip first: held-out text.")] = 0,
    device: Device = "cpu",
) -> None:
    """Say what the experts of layers carry: constant gates, ablation curves, tokens against context."""
    from dataclasses import replace

    from mxd_lens import load_model
    from mxd_lens.evals.ablation import ablation_study, save_ablations
    from mxd_lens.evals.stability import stability
    from mxd_lens.reports.ablation import write_carry_page

    with errors_for_people():
        if again and len(layers) > 1:
            raise ValueError(f"--again is for one layer; {len(layers)} are given.")
        saes = named_layers(layers, device)
        first = next(iter(saes.values()))
        language_model = load_model(model or first.cfg.metadata.model_name, device)
        tokens = read_as_trained(first, language_model, text, skip, sequences).to(device)
        reports = ablation_study(language_model, saes, tokens, judged)
        if again:
            seeds = {f"again: {layer}": named_layer(layer, device)[1] for layer in again}
            found = stability(language_model, saes | seeds, tokens)
            reports = {name: replace(report, stability=found) for name, report in reports.items()}
        output.mkdir(parents=True, exist_ok=True)
        save_ablations(output / "carry.json", reports)
        page = write_carry_page(output / "index.html", reports, {"text": text, "rows skipped": str(skip)})
    for report in reports.values():
        typer.echo(report)
    typer.echo(f"The page: {page}")


@app.command()
def steer(
    layer: Annotated[str, typer.Argument(help=LAYER)],
    expert: Annotated[int, typer.Option(help="Which expert.")],
    sae_id: Annotated[str, typer.Option(help="Which layer of a release; of a folder, the subfolder.")] = "",
    coefficient: Annotated[float, typer.Option(help="By what the expert's coefficient is changed.")] = 100.0,
    mode: Annotated[str, typer.Option(help="add, set or scale.")] = "add",
    prompt: Annotated[str, typer.Option(help="Where the texts begin.")] = "Let's talk about ",
    samples: Annotated[int, typer.Option(help="How many texts.")] = 10,
    new_tokens: Annotated[int, typer.Option(help="Tokens in a text, at most.")] = 32,
    temperature: Annotated[float, typer.Option(help="Of the sampling; 0 takes the likeliest token.")] = 1.0,
    top_p: Annotated[float, typer.Option(help="Share of the probability mass to sample from.")] = 0.1,
    frequency_penalty: Annotated[float, typer.Option(help="Off a token's logit per occurrence.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    model: Annotated[str, typer.Option(help="The language model. Default: the one it was trained on.")] = "",
    device: Device = "cpu",
    json: Annotated[Path | None, typer.Option(help="Write the texts there.")] = None,
) -> None:
    """Show what the model writes with one expert steered, beside what it writes without."""
    from mxd_lens import load_model
    from mxd_lens.evals.steering import steered_samples

    with errors_for_people():
        sae, _ = load_layer(layer, sae_id, device)
        language_model = load_model(model or sae.cfg.metadata.model_name, device)
        try:
            result = steered_samples(
                language_model,
                sae,
                expert,
                coefficient,
                prompt,
                samples,
                new_tokens,
                temperature,
                top_p,
                frequency_penalty,
                seed,
                mode,  # type: ignore[arg-type]
            )
        except IndexError as e:  # there is no such expert
            raise ValueError(str(e)) from e
        if json is not None:
            result.save(json)
    typer.echo(result)


@app.command()
def compare(
    output: Annotated[Path, typer.Argument(help="The HTML file to write.")],
    layers: Annotated[
        list[str],
        typer.Argument(help=f"Layers of one MLP. {NAMED}"),
    ],
    prompt: Annotated[str, typer.Option(help="The text to take apart.")],
    text: Annotated[
        str,
        typer.Option(help="Over which the mean gate is taken: as for train, or prompt for the prompt alone."),
    ] = "embedded",
    sequences: Annotated[int, typer.Option(help="How many sequences of that text.")] = 8,
    k: Annotated[int, typer.Option(help="Experts a token.")] = 5,
    predictions: Annotated[int, typer.Option(help="Next tokens at each position.")] = 5,
    model: Annotated[
        str, typer.Option(help="The language model. Default: the one they were trained on.")
    ] = "",
    device: Device = "cpu",
) -> None:
    """Write a page about one prompt through several decompositions of one MLP, side by side."""
    from mxd_lens import load_model
    from mxd_lens.evals.comparison import compare
    from mxd_lens.reports.comparison import write_comparison_page

    with errors_for_people():
        saes = named_layers(layers, device)
        first = next(iter(saes.values()))
        language_model = load_model(model or first.cfg.metadata.model_name, device)
        tokens = None
        if text != "prompt":
            tokens = read_as_trained(first, language_model, text, 0, sequences)
        comparison = compare(language_model, saes, prompt, tokens, k, predictions)
        page = write_comparison_page(output, comparison)
    typer.echo(comparison)
    typer.echo(f"The page: {page}")


@app.command()
def dashboard(
    layer: Annotated[str, typer.Argument(help=LAYER)],
    output: Annotated[Path, typer.Argument(help="The folder to write; an interrupted run goes on there.")],
    sae_id: Annotated[str, typer.Option(help="Which layer of a release; of a folder, the subfolder.")] = "",
    experts: Annotated[
        str, typer.Option(help="Which have a page, as 3,17 or 0-199. Default: 100 drawn at random.")
    ] = "",
    text: Text = "embedded",
    sequences: Annotated[int, typer.Option(help="How many sequences of the text to read.")] = 512,
    skip: Annotated[int, typer.Option(help="How many rows of the text to skip first: held-out text.")] = 0,
    loss_effects: Annotated[
        bool, typer.Option(help="Measure what an expert does to the loss: most of the time.")
    ] = True,
    model: Annotated[str, typer.Option(help="The language model. Default: the one it was trained on.")] = "",
    device: Device = "cpu",
) -> None:
    """Write pages about a layer's experts: where they fire, what they promote, what they are good for."""
    from mxd_lens import build_dashboard, load_model
    from mxd_lens.dashboards.collect.data import CollectionConfig

    with errors_for_people():
        sae, source = load_layer(layer, sae_id, device)
        language_model = load_model(model or sae.cfg.metadata.model_name, device)
        tokens = read_as_trained(sae, language_model, text, skip, sequences)
        try:
            index = build_dashboard(
                sae,
                language_model,
                tokens.to(device),
                experts=integers(experts) if experts else None,
                output=output,
                text_name=text,
                layer=source,
                cfg=CollectionConfig(loss_effects=loss_effects),
            )
        except IndexError as e:  # there is no such expert
            raise ValueError(str(e)) from e
    typer.echo(f"The dashboard: {index}")


@app.command()
def frontier(
    output: Annotated[Path, typer.Argument(help="The folder to write to; an interrupted sweep goes on.")],
    model: Model = "smollm2-135m-instruct",
    layers: Annotated[str, typer.Option(help="Which MLPs, as 2,11,12.")] = "12",
    k: Annotated[str, typer.Option(help="Active experts per token, as 8,32,128.")] = "8,16,32,64,128,256",
    architectures: Annotated[str, typer.Option(help="Which architectures. Default: all.")] = "",
    text: Text = "embedded",
    other_text: Annotated[str, typer.Option(help="A second text to judge on.")] = "",
    tokens: Annotated[int, typer.Option(help="Training tokens for each layer.")] = 1_000_000,
    text_tokens: Annotated[int, typer.Option(help="How many of them are different. 0: all.")] = 0,
    match_width: Annotated[int, typer.Option(help="Features of the transcoder to match. 0: 8 x d_in.")] = 0,
    hidden: Annotated[int, typer.Option(help="Width of the decoder branch. 0: 4 x d_in.")] = 0,
    seeds: Annotated[str, typer.Option(help="Seeds of the initial weights, as 0,1,2.")] = "0",
    batch: Annotated[int, typer.Option(help="Tokens in a step.")] = 2048,
    sequences: Annotated[int, typer.Option(help="Held-out sequences of 128 tokens of each text.")] = 32,
    at_once: Annotated[int, typer.Option(help="Layers trained together; memory is the limit.")] = 32,
    bf16: Annotated[bool, typer.Option(help="Train with bfloat16 products, weights in float32.")] = False,
    device: Device = "cpu",
) -> None:
    """Train every architecture at every K on several MLPs, judge them, and draw the frontier."""
    from datasets import Dataset

    from mxd_lens import frontier, load_model
    from mxd_lens.evals.frontier import CONTENDERS
    from mxd_lens.reports.frontier import write_frontier_page, write_frontier_png
    from mxd_lens.text import load_text, split_text, token_sequences

    with errors_for_people():
        names = architectures.split(",") if architectures else list(CONTENDERS)
        if unknown := set(names) - CONTENDERS.keys():
            raise ValueError(f"there is no {', '.join(unknown)}: choose from {', '.join(CONTENDERS)}.")
        language_model = load_model(model, device)
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
            layers=integers(layers),
            ks=integers(k),
            contenders={name: CONTENDERS[name] for name in names},
            seeds=integers(seeds),
            transcoder_width=match_width or None,
            d_hidden=hidden or None,
            training_tokens=tokens,
            batch=batch,
            layers_at_once=at_once,
            text_name=text,
            run_settings={"device": device, "autocast": bf16},
        )
        page = write_frontier_page(output / "index.html", result)
        typer.echo(result)
        typer.echo(f"The page: {page}")
        try:
            for i, name in enumerate(held_out):
                write_frontier_png(output / f"frontier-{i}.png", result, name)
        except (ImportError, RuntimeError, ValueError) as e:  # which one depends on plotly's version
            typer.echo(f"No PNG was written ({e}).", err=True)
        if result.failures:
            typer.echo("Failed: " + "; ".join(f"{name}: {why}" for name, why in result.failures.items()))
            raise typer.Exit(1)


@app.command()
def probe(
    layers: Annotated[list[str], typer.Argument(help=f"Layers of one model. {NAMED}")],
    tasks: Annotated[
        str,
        typer.Option(help="Which tasks; beside the default ones, which need no network, there are hub's."),
    ] = "language,sentiment,topic,code",
    seeds: Annotated[str, typer.Option(help="Of the splits, as 0,1,2.")] = "0,1,2",
    k: Annotated[str, typer.Option(help="Experts in the k-sparse probes, as 1,5,20.")] = "1,2,5,20,100",
    candidates: Annotated[int, typer.Option(help="Experts tried one at a time, for each class.")] = 100,
    texts: Annotated[int, typer.Option(help="Texts of a task, at most.")] = 1000,
    context: Annotated[int, typer.Option(help="Tokens of a text that are read. 0: as in training.")] = 0,
    model: Annotated[str, typer.Option(help="The language model. Default: the one of the first layer.")] = "",
    device: Device = "cpu",
    json: Annotated[Path | None, typer.Option(help="Write the results there.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write a page about them there.")] = None,
) -> None:
    """Probe layers: how well one expert, or a few, tell the classes of a text apart."""
    from mxd_lens import load_model, sparse_probing

    with errors_for_people():
        saes = named_layers(layers, device)
        first = next(iter(saes.values()))
        language_model = load_model(model or first.cfg.metadata.model_name, device)
        result = sparse_probing(
            language_model,
            saes,
            tasks.split(","),
            integers(seeds),
            integers(k),
            candidates,
            texts,
            context or None,
        )
        if json is not None:
            result.save(json)
        if html is not None:
            from mxd_lens.reports.probing import write_probing_page

            write_probing_page(html, result)
    typer.echo(result)


@app.command()
def pretrained() -> None:
    """List the layers that can be loaded by name."""
    from mxd_lens import list_pretrained

    typer.echo(list_pretrained())


def load_layer(layer: str, sae_id: str, device: str) -> tuple[Any, str | tuple[str, str]]:
    """A layer that a command names, and where it was loaded from: a folder, or a release and an id.

    Raises:
        FileNotFoundError: there is no such folder, and no id for a release.
    """
    from sae_lens import SAE

    folder = Path(layer).expanduser() / sae_id
    if folder.is_dir():
        return SAE.load_from_disk(folder, device=device), str(folder)
    release, _, its_id = (layer, "", sae_id) if sae_id else layer.partition(":")
    if not its_id:
        from mxd_lens.pretrained.registry import list_pretrained

        known = [of.sae_id for of in list_pretrained() if of.release == layer]
        listed = f" The layers of {layer}: {', '.join(known)}." if known else ""
        raise FileNotFoundError(f"{folder} is not a folder; a layer of a release is RELEASE:SAE_ID.{listed}")
    return SAE.from_pretrained(release, its_id, device=device), (release, its_id)


def named_layer(given: str, device: str) -> tuple[str, Any]:
    """A layer and its name, from FOLDER or RELEASE:SAE_ID, with NAME= before it or named by its end."""
    is_folder = Path(given).expanduser().is_dir()
    name, _, where = ("", "", given) if is_folder or "=" not in given else given.partition("=")
    layer, source = load_layer(where, "", device)
    return name or (Path(source).resolve() if isinstance(source, str) else Path(where)).name, layer


def named_layers(given: Sequence[str], device: str) -> dict[str, Any]:
    """Several layers by name.

    Raises:
        ValueError: two have one name.
    """
    layers = dict(named_layer(layer, device) for layer in given)
    if len(layers) < len(given):
        raise ValueError(f"two of these layers have one name: write NAME=FOLDER. Got {', '.join(given)}.")
    return layers


def read_as_trained(
    sae: Any, model: Any, text: str, skip: int, sequences: int, held_out: bool = False
) -> Any:
    """Token sequences of a text, of the length the layer was trained on, and with BOS where it had it."""
    from mxd_lens.text import load_text, split_text, token_sequences

    metadata = sae.cfg.metadata
    rows = split_text(load_text(text, streaming=False))[1] if held_out else load_text(text)
    return token_sequences(
        model,
        rows.skip(skip),
        sequences,
        metadata.context_size or 128,
        prepend_bos=metadata.prepend_bos is not False,
    )


def integers(text: str) -> list[int]:
    """The numbers in "1,2,7-9", both ends of a range included."""
    found: list[int] = []
    try:
        for part in text.split(","):
            first, _, last = part.partition("-")
            found += range(int(first), int(last or first) + 1)
    except ValueError:
        raise ValueError(f"expected numbers separated by commas, as 3,17 or 3-17, got {text!r}.") from None
    return found


@app.command()
def convert(
    file: Annotated[Path, typer.Argument(help="A checkpoint of the paper's code: .pt, .pkl or .pkl.gz.")],
    folder: Annotated[Path, typer.Argument(help="The folder to write; it must be new or empty.")],
    dtype: Annotated[
        str, typer.Option(help="Of the layer: float32, bfloat16, float16. Default: as in the file.")
    ] = "",
) -> None:
    """Turn a checkpoint of the paper's code into a folder that SAELens reads; nothing in it is run."""
    from mxd_lens.pretrained.formats.paper import convert

    with errors_for_people():
        layer = convert(file, folder, dtype=dtype or None)
    typer.echo(f"Saved in {folder}: {type(layer).__name__} of {layer.cfg.metadata.model_name!r}.")


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="The folder to write to.")] = Path("mxd-lens-demo"),
    layer: Annotated[int, typer.Option(help="Which MLP of SmolLM2-135M.")] = 12,
    tokens: Annotated[int, typer.Option(help="Training tokens.")] = 500_000,
    sequences: Annotated[int, typer.Option(help="Held-out sequences of 128 tokens to judge on.")] = 24,
) -> None:
    """Train an MxD of SmolLM2-135M on text this machine has, judge it, and write a page about it."""
    from mxd_lens.demo import run_demo

    with errors_for_people():
        run_demo(output, layer, training_tokens=tokens, n_sequences=sequences)


@app.command()
def push(
    layer: Annotated[Path, typer.Argument(help="The folder of a trained layer.")],
    repository: Annotated[str, typer.Argument(help="Where to: user/repo on the Hugging Face hub.")],
    sae_id: Annotated[
        str | None, typer.Option(help="The layer's folder in the repository. Default: the folder's name.")
    ] = None,
    report: Annotated[
        list[Path] | None,
        typer.Option(help="What evaluate wrote with --json, named by its text. Default: LAYER/report.json."),
    ] = None,
    license: Annotated[str | None, typer.Option(help="Of the layer, in the hub's words: mit.")] = None,
    private: Annotated[bool, typer.Option(help="Whether a repository that is created is private.")] = False,
    revision: Annotated[str, typer.Option(help="The branch to commit to.")] = "main",
    dry_run: Annotated[
        Path | None, typer.Option(help="Write what would be uploaded into this folder instead.")
    ] = None,
) -> None:
    """Publish a layer on the Hugging Face hub, with a page about it."""
    from mxd_lens.pretrained.hub import push_to_hub

    with errors_for_people():
        where = push_to_hub(
            layer,
            repository,
            sae_id,
            reports={file.stem: file for file in report or []},
            license=license,
            private=private,
            revision=revision,
            dry_run=dry_run,
        )
    typer.echo(where)


class errors_for_people:
    """An error a person can do something about is shown as its message, not as a traceback."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if isinstance(error, KeyboardInterrupt):
            typer.echo(str(error) or "Interrupted.", err=True)
            raise typer.Exit(130) from error
        for_people = (ValueError, OSError, ImportError, FloatingPointError)
        if isinstance(error, for_people) or type(error) is LookupError:
            typer.echo(f"Error: {error}", err=True)
            raise typer.Exit(1) from error


def main() -> None:
    app()


if __name__ == "__main__":
    main()
