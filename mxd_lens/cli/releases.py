"""The commands about saved layers: convert, inspect, check, push, pretrained."""

from pathlib import Path
from typing import Annotated

import typer

from mxd_lens.cli.application import command, show
from mxd_lens.cli.loading import check_layer_folder, load_its_model
from mxd_lens.cli.options import (
    Bridge,
    Device,
    ItsModel,
    Json,
    best_device,
    checked,
    is_folder_to_write,
    one_of,
    output_folder,
)


def is_layer_folder(folder: Path) -> Path:
    check_layer_folder(folder.expanduser())
    return folder.expanduser()


def is_repository(name: str) -> str:
    if name.count("/") != 1 or not all(name.split("/")):
        raise ValueError(f"{name!r} is not a repository on the Hugging Face hub. Write user/repo.")
    return name


SOURCE = "A folder or file of another library, or user/repo on the hub; docs/guides/released.md lists them."
LayerOf = Annotated[
    str | None,
    typer.Option("--layer", help="Which layer of SOURCE, as layers.11.mlp or layer_5. `inspect` lists them."),
]


def is_source(written: str) -> str:
    path = Path(written).expanduser()
    if not path.exists() and (written.count("/") != 1 or written.startswith((".", "~", "/"))):
        raise ValueError(f"There is no folder or file {written}. A repository on the hub is user/repo.")
    return str(path) if path.exists() else written


@command
def convert(
    source: Annotated[str, typer.Argument(help=SOURCE, callback=checked(is_source))],
    output: Annotated[Path, output_folder("The folder to write; it must be new or empty.")],
    layer: LayerOf = None,
    to: Annotated[
        str,
        typer.Option(
            help="The format to write: SAELens, circuit-tracer or sparsify.",
            callback=checked(one_of("SAELens", "circuit-tracer", "sparsify")),
        ),
    ] = "SAELens",
    dtype: Annotated[
        str | None,
        typer.Option(
            help="dtype of the layer: float32, bfloat16, float16. Default: as in the file.",
            callback=checked(one_of("float32", "bfloat16", "float16")),
        ),
    ] = None,
) -> None:
    """Convert a layer of another library; no code in its files is executed."""
    from mxd_lens.pretrained.released import convert

    made = convert(source, output, layer, to=to, dtype=dtype)
    typer.echo(f"Saved in {output}: {type(made).__name__} of {made.cfg.metadata.model_name!r}.")


@command
def inspect(
    source: Annotated[str, typer.Argument(help=SOURCE, callback=checked(is_source))],
    layer: LayerOf = None,
    json: Json = None,
) -> None:
    """Say what a folder, file or repository holds: its format, its layers, what one reads and writes."""
    from mxd_lens.pretrained.released import inspect_source

    show(inspect_source(source, layer), json)


@command
def check(
    source: Annotated[str, typer.Argument(help=SOURCE, callback=checked(is_source))],
    layer: LayerOf = None,
    model: ItsModel = None,
    bridge: Bridge = False,
    device: Device = "auto",
    json: Json = None,
) -> None:
    """Check that a layer is in its right place: its hook points, input, scale and skip connection."""
    from mxd_lens import check_layer, load_layer

    device = best_device(device)
    sae = load_layer(source, layer, device)
    found = check_layer(load_its_model(sae, model, device, bridge), sae)
    show(found, json)
    if not found.fits:
        raise typer.Exit(1)


@command
def push(
    layer: Annotated[
        Path, typer.Argument(help="The folder of a saved layer.", callback=checked(is_layer_folder))
    ],
    repository: Annotated[
        str,
        typer.Argument(help="Where to: user/repo on the Hugging Face hub.", callback=checked(is_repository)),
    ],
    sae_id: Annotated[
        str | None, typer.Option(help="The layer's folder in the repository. Default: the folder's name.")
    ] = None,
    report: Annotated[
        list[Path] | None,
        typer.Option(
            help="A report of `evaluate --json`, named by its text. Default: LAYER/report.json.", exists=True
        ),
    ] = None,
    license: Annotated[
        str | None, typer.Option(help="The layer's license, by the hub's name for it: mit, apache-2.0.")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    revision: Annotated[str, typer.Option(help="The branch to commit to.")] = "main",
    dry_run: Annotated[
        Path | None,
        typer.Option(
            help="Upload nothing; write the files to this folder.", callback=checked(is_folder_to_write)
        ),
    ] = None,
) -> None:
    """Publish a layer on the Hugging Face hub."""
    from mxd_lens.pretrained.hub import push_to_hub

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
    typer.echo(f"Nothing was uploaded. The files are in {dry_run}." if dry_run else where)


@command
def pretrained(json: Json = None) -> None:
    """List the layers that can be loaded by name."""
    from mxd_lens import list_pretrained

    show(list_pretrained(), json)
