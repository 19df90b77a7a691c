"""The commands that ask about experts: read, find, card, stats."""

from typing import Annotated

import typer

from mxd_lens.cli.application import command, show
from mxd_lens.cli.loading import Layer, LayerSource, check_expert, load_with_model, sequences_of
from mxd_lens.cli.options import Bridge, Device, HeldOut, ItsModel, Json, Sequences, Skip, Text


@command
def read(
    layer: Layer,
    prompt: Annotated[str, typer.Option(help="The text to read.")],
    k: Annotated[int, typer.Option("--top", help="Experts to show for each token.", min=1)] = 5,
    model: ItsModel = None,
    bridge: Bridge = False,
    device: Device = "auto",
    json: Json = None,
) -> None:
    """Show the top experts at every token of a prompt."""
    source = LayerSource.parse(layer)

    from mxd_lens import top_experts

    show(top_experts(*load_with_model(source, model, device, bridge), prompt, k), json)


@command
def find(
    layer: Layer,
    positive: Annotated[list[str], typer.Option("--with", help="A text with the concept; several times.")],
    negative: Annotated[
        list[str], typer.Option("--without", help="A text that is alike but for the concept; several times.")
    ],
    n: Annotated[int, typer.Option("--top", help="Experts to show.", min=1)] = 10,
    model: ItsModel = None,
    bridge: Bridge = False,
    device: Device = "auto",
    json: Json = None,
) -> None:
    """Find the experts that fire on a concept."""
    source = LayerSource.parse(layer)

    from mxd_lens import find_experts

    show(find_experts(*load_with_model(source, model, device, bridge), positive, negative, n), json)


@command
def card(
    layer: Layer,
    expert: Annotated[int, typer.Option(help="Which expert.", min=0)],
    text: Text = "embedded",
    sequences: Sequences = 32,
    skip: Skip = 0,
    held_out: HeldOut = False,
    model: ItsModel = None,
    bridge: Bridge = False,
    device: Device = "auto",
    json: Json = None,
) -> None:
    """Show one expert's weights, and how it is used on a text."""
    source = LayerSource.parse(layer)
    check_expert(source, [expert], "--expert")

    from mxd_lens import expert_card, expert_statistics

    language_model, sae = load_with_model(source, model, device, bridge)
    tokens = sequences_of(text, language_model, sae, sequences, skip, held_out)
    show(expert_card(sae, expert, expert_statistics(language_model, sae, tokens)), json)


@command
def stats(
    layer: Layer,
    text: Text = "embedded",
    sequences: Sequences = 32,
    skip: Skip = 0,
    held_out: HeldOut = False,
    model: ItsModel = None,
    bridge: Bridge = False,
    device: Device = "auto",
    json: Json = None,
) -> None:
    """Summarise how experts are used on a text."""
    source = LayerSource.parse(layer)

    from mxd_lens import expert_statistics

    language_model, sae = load_with_model(source, model, device, bridge)
    tokens = sequences_of(text, language_model, sae, sequences, skip, held_out)
    show(expert_statistics(language_model, sae, tokens), json)
