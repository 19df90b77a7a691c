"""The commands that look at layers: evaluate, ablation, steer, compare, dashboard, probe."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from mxd_lens.cli.application import GroupedHelp, app, command, show
from mxd_lens.cli.loading import (
    Layer,
    Layers,
    LayerSource,
    check_expert,
    load_its_model,
    load_layers,
    load_with_model,
    sequences_of,
    several_layers,
)
from mxd_lens.cli.options import (
    Bridge,
    Device,
    HeldOut,
    Html,
    ItsModel,
    Json,
    Sequences,
    Skip,
    Text,
    checked,
    integers,
    is_finite,
    is_list_of_integers,
    is_text,
    one_of,
    output_file,
    output_folder,
)


@command
def evaluate(
    layer: Layer,
    model: ItsModel = None,
    text: Text = "embedded",
    sequences: Annotated[int, typer.Option(help="Sequences of the text to evaluate on.", min=1)] = 32,
    skip: Skip = 0,
    held_out: HeldOut = False,
    bridge: Bridge = False,
    device: Device = "auto",
    json: Json = None,
    html: Html = None,
) -> None:
    """Evaluate a layer in place of its MLP."""
    from mxd_lens import evaluate

    source = LayerSource.parse(layer)
    sae = source.load(device)
    if text == sae.cfg.metadata.dataset_path and not held_out and not skip:
        typer.echo(
            f"The layer was trained on {text}: add --held-out, or evaluate it on another text.", err=True
        )
    language_model = load_its_model(sae, model, device, bridge)
    tokens = sequences_of(text, language_model, sae, sequences, skip, held_out)
    report = evaluate(model=language_model, sae=sae, tokens=tokens, text_name=text)
    if html is not None:
        from mxd_lens.reports.run import read_history, write_run_page

        history = read_history(source.folder) if source.folder else []
        write_run_page(html, f"{source.name}: how faithful it is", history, report)
    show(report, json)


@command
def ablation(
    layers: Layers,
    output: Annotated[Path, output_folder("The folder to write index.html and the report to.")],
    again: Annotated[
        list[str] | None,
        typer.Option(
            help="The one layer trained again from another seed, to match experts with.",
            callback=checked(several_layers),
        ),
    ] = None,
    model: ItsModel = None,
    text: Text = "embedded",
    sequences: Annotated[int, typer.Option(help="Sequences that firing is read from.", min=1)] = 256,
    judged: Annotated[
        int, typer.Option("--evaluated", "--judged", help="How many of them are evaluated on.", min=1)
    ] = 32,
    skip: Skip = 0,
    held_out: HeldOut = False,
    bridge: Bridge = False,
    device: Device = "auto",
    json: Json = None,
) -> None:
    """Measure what the experts of layers contribute.

    Mean, resample and best-constant ablation of all experts, sufficiency and necessity of the strongest,
    and how far the current token alone determines them.
    """
    if again and len(layers) > 1:
        raise typer.BadParameter(f"it is for one layer, {len(layers)} are given.", param_hint="--again")

    from mxd_lens import ablation_study, stability
    from mxd_lens.evals.ablation import save_ablations
    from mxd_lens.reports.ablation import write_ablation_page

    saes = load_layers(layers, device)
    first = next(iter(saes.values()))
    language_model = load_its_model(first, model, device, bridge)
    tokens = sequences_of(text, language_model, first, sequences, skip, held_out)
    reports = ablation_study(language_model, saes, tokens, min(judged, len(tokens)))
    if again:
        seeds = {f"again: {name}": sae for name, sae in load_layers(again, device).items()}
        found = stability(language_model, saes | seeds, tokens)
        reports = {name: replace(report, stability=found) for name, report in reports.items()}
    output.mkdir(parents=True, exist_ok=True)
    save_ablations(output / "ablation.json", reports)
    page = write_ablation_page(output / "index.html", reports, {"text": text, "rows skipped": str(skip)})
    show(reports, json, f"The page: {page}")


app.command("carry", cls=GroupedHelp, hidden=True, deprecated=True)(ablation)  # its name until version 0.1


@command
def steer(
    layer: Layer,
    expert: Annotated[int, typer.Option(help="Which expert.", min=0)],
    coefficient: Annotated[
        float,
        typer.Option(
            help="Added to the expert's coefficient; with --mode set its value, with scale its factor.",
            callback=checked(is_finite),
        ),
    ] = 100.0,
    mode: Annotated[
        str, typer.Option(help="add, set or scale.", callback=checked(one_of("add", "set", "scale")))
    ] = "add",
    prompt: Annotated[str, typer.Option(help="The beginning of every text.")] = "Let's talk about ",
    samples: Annotated[int, typer.Option(help="How many texts.", min=1)] = 10,
    new_tokens: Annotated[int, typer.Option(help="Tokens of a text, at most.", min=1)] = 32,
    temperature: Annotated[
        float,
        typer.Option(
            help="Temperature of the sampling; 0 is greedy decoding.", min=0, callback=checked(is_finite)
        ),
    ] = 1.0,
    top_p: Annotated[
        float,
        typer.Option(help="Probability mass to sample from.", min=1e-9, max=1, callback=checked(is_finite)),
    ] = 0.1,
    frequency_penalty: Annotated[
        float,
        typer.Option(
            help="Subtracted from a token's logit each time it has occurred.",
            min=0,
            callback=checked(is_finite),
        ),
    ] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.", min=0)] = 0,
    model: ItsModel = None,
    bridge: Bridge = False,
    device: Device = "auto",
    json: Json = None,
) -> None:
    """Generate texts with one expert steered, and without."""
    source = LayerSource.parse(layer)
    check_expert(source, [expert], "--expert")

    from mxd_lens.evals.steering import steered_samples

    language_model, sae = load_with_model(source, model, device, bridge)
    result = steered_samples(
        model=language_model,
        sae=sae,
        expert=expert,
        coefficient=coefficient,
        prompt=prompt,
        n_samples=samples,
        max_new_tokens=new_tokens,
        temperature=temperature,
        top_p=top_p,
        frequency_penalty=frequency_penalty,
        seed=seed,
        mode=mode,  # type: ignore[arg-type]
    )
    show(result, json)


@command
def compare(
    layers: Layers,
    output: Annotated[Path, output_file("The HTML file to write.")],
    prompt: Annotated[str, typer.Option(help="The text to decompose the MLP on.")],
    text: Annotated[
        str,
        typer.Option(
            help="The text to take means over, as for train; or prompt, for the prompt alone.",
            callback=checked(lambda text: text if text == "prompt" else is_text(text)),
        ),
    ] = "embedded",
    sequences: Annotated[int, typer.Option(help="Sequences of that text.", min=1)] = 8,
    skip: Skip = 0,
    held_out: HeldOut = False,
    k: Annotated[int, typer.Option(help="Experts to show for each token.", min=1)] = 5,
    predictions: Annotated[int, typer.Option(help="Next tokens to show at each position.", min=1)] = 5,
    model: ItsModel = None,
    bridge: Bridge = False,
    device: Device = "auto",
    json: Json = None,
) -> None:
    """Compare decompositions of one MLP on one prompt."""
    from mxd_lens.evals.comparison import compare
    from mxd_lens.reports.comparison import write_comparison_page

    saes = load_layers(layers, device)
    first = next(iter(saes.values()))
    language_model = load_its_model(first, model, device, bridge)
    tokens = None
    if text != "prompt":
        tokens = sequences_of(text, language_model, first, sequences, skip, held_out)
    comparison = compare(language_model, saes, prompt, tokens, k, predictions)
    page = write_comparison_page(output, comparison)
    show(comparison, json, f"The page: {page}")


@command
def dashboard(
    layer: Layer,
    output: Annotated[Path, output_folder("The folder to write to; an interrupted run is resumed there.")],
    experts: Annotated[
        str,
        typer.Option(
            help="Which experts get a page, as 3,17 or 0-199; live: all that fire. Default: 100 that fire.",
            callback=checked(is_list_of_integers(0, "live")),
        ),
    ] = "",
    deep: Annotated[
        str,
        typer.Option(
            help="With --experts live: which of them also get effects on the loss and singular values.",
            callback=checked(is_list_of_integers()),
        ),
    ] = "",
    text: Text = "embedded",
    sequences: Sequences = 512,
    skip: Skip = 0,
    held_out: HeldOut = False,
    loss_effects: Annotated[
        bool, typer.Option(help="Measure the loss without each expert; takes most of the time.")
    ] = True,
    model: ItsModel = None,
    bridge: Bridge = False,
    device: Device = "auto",
) -> None:
    """Write pages about the experts of a layer."""
    source = LayerSource.parse(layer)
    named: Sequence[int] | None = integers(experts) if experts not in ("", "live") else None
    closely: Sequence[int] | None = integers(deep) if deep else None
    check_expert(source, named or [], "--experts")
    check_expert(source, closely or [], "--deep")

    from mxd_lens import build_dashboard
    from mxd_lens.dashboards.collect.data import CollectionConfig

    language_model, sae = load_with_model(source, model, device, bridge)
    index = build_dashboard(
        model=language_model,
        sae=sae,
        tokens=sequences_of(text, language_model, sae, sequences, skip, held_out),
        experts="live" if experts == "live" else named,
        deep=closely,
        output=output,
        text_name=text,
        layer=source.origin,
        cfg=(CollectionConfig.light if experts == "live" else CollectionConfig)(loss_effects=loss_effects),
    )
    typer.echo(f"The dashboard: {index}")


@command
def probe(
    layers: Layers,
    tasks: Annotated[
        str,
        typer.Option(help="Which tasks. The default ones need no network; bias_in_bios and others do."),
    ] = "language,sentiment,topic,code",
    seeds: Annotated[
        str, typer.Option(help="Seeds of the splits, as 0,1,2.", callback=checked(is_list_of_integers()))
    ] = "0,1,2",
    k: Annotated[
        str,
        typer.Option(
            help="Experts in the k-sparse probes, as 1,5,20.", callback=checked(is_list_of_integers(1))
        ),
    ] = "1,2,5,20,100",
    candidates: Annotated[
        int, typer.Option(help="Experts tried one at a time, for each class.", min=1)
    ] = 100,
    texts: Annotated[int, typer.Option(help="Texts of a task, at most.", min=4)] = 1000,
    context: Annotated[int, typer.Option(help="Tokens read of a text. 0: as in training.", min=0)] = 0,
    model: ItsModel = None,
    bridge: Bridge = False,
    device: Device = "auto",
    json: Json = None,
    html: Html = None,
) -> None:
    """Probe how well a few experts separate classes of text."""
    for option, wanted in (("--k", max(integers(k))), ("--candidates", candidates)):
        for source in map(LayerSource.parse, layers):
            if (n := source.n_experts) is not None and wanted > n:
                raise typer.BadParameter(f"{source.name} has only {n:,} experts.", param_hint=option)

    from mxd_lens import sparse_probing

    saes = load_layers(layers, device)
    result = sparse_probing(
        model=load_its_model(next(iter(saes.values())), model, device, bridge),
        saes=saes,
        tasks=tasks.split(","),
        seeds=integers(seeds),
        ks=integers(k),
        n_candidates=candidates,
        n_texts=texts,
        context_size=context or None,
    )
    if html is not None:
        from mxd_lens.reports.probing import write_probing_page

        write_probing_page(html, result)
    show(result, json)
