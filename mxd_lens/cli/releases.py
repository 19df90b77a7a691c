"""The commands about saved layers: convert, push, pretrained."""

from pathlib import Path
from typing import Annotated

import typer

from mxd_lens.cli.application import command, show
from mxd_lens.cli.loading import FOREIGN, check_layer_folder, load_its_model
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


SOURCE = "A folder, a checkpoint file, a release or a repository on the hub; :LAYER after it names one layer."
Source = Annotated[str, typer.Argument(help=SOURCE)]


def split_source(source: str) -> tuple[str, str | None]:
    """A source, and the layer in it that was named."""
    if Path(source).expanduser().exists():
        return source, None
    release, _, layer = source.partition(":")
    is_path = release.startswith((".", "/", "~")) or Path(release).suffix in FOREIGN
    if not release or (is_path and not Path(release).expanduser().exists()):
        raise typer.BadParameter(f"there is no folder or file {release!r}.", param_hint="SOURCE")
    return release, layer or None


@command
def inspect(source: Source, json: Json = None) -> None:
    """Describe the files of a layer, whoever wrote them.

    Its format, the layers in it; of one layer the hook points, sizes and conventions.
    """
    release, layer = split_source(source)

    from mxd_lens.pretrained.released import inspect_source

    show(inspect_source(release, layer), json)


@command
def convert(
    source: Source,
    output: Annotated[Path, output_folder("The folder to write; it must be new or empty.")],
    to: Annotated[
        str,
        typer.Option(
            help="SAELens, circuit-tracer or sparsify.",
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
    """Convert a layer to another format; nothing in it is executed."""
    release, layer_id = split_source(source)

    from mxd_lens.pretrained.released import convert

    layer = convert(release, output, layer_id, to, dtype=dtype)
    typer.echo(f"Saved in {output}: {type(layer).__name__} of {layer.cfg.metadata.model_name!r}.")


@command
def check(
    source: Source,
    model: ItsModel = None,
    bridge: Bridge = False,
    device: Device = "auto",
    json: Json = None,
) -> None:
    """Check that a layer fits its model.

    Tests hook points, input convention, scale and skip. The exit code is 1 if something is wrong.
    """
    release, layer = split_source(source)

    from mxd_lens import check_layer, load_layer

    device = best_device(device)
    sae = load_layer(release, layer, device)
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
