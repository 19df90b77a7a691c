"""`mxd-lens train`: an option for every field of the config classes, and a run for every layer asked for."""

import inspect
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import mxd_lens
from mxd_lens.cli.application import command
from mxd_lens.cli.config_fields import COMPUTED, ConfigField, architecture_names, fields_of, package_file
from mxd_lens.cli.loading import load_language_model, n_blocks_of
from mxd_lens.cli.options import (
    Bridge,
    Device,
    Model,
    Text,
    best_device,
    checked,
    integers,
    is_finite,
    is_folder_to_write,
    is_list_of_integers,
    is_training_dtype,
    one_of,
)

if TYPE_CHECKING:
    from mxd_lens.training.config import TranscoderRunnerConfig

PACKAGE = Path(mxd_lens.__file__).parent
LAYER_FILES = tuple(sorted((PACKAGE / "architectures").glob("*.py")))
SAELENS_CONFIG = package_file("sae_lens", "config.py")

RUN = fields_of("TranscoderRunnerConfig", PACKAGE / "training" / "config.py", SAELENS_CONFIG)
LOGGING = fields_of("LoggingConfig", SAELENS_CONFIG)
ARCHITECTURES = architecture_names(*LAYER_FILES)
"""The config class of every architecture that can be trained, by the architecture's name."""
LAYER = {
    name: field
    for config in ARCHITECTURES.values()
    for name, field in fields_of(config, *LAYER_FILES).items()
}

NOT_OPTIONS = {
    # given in another form, below
    *("sae", "logger", "metadata", "d_in", "d_out", "k", "hook_eval", "device", "dtype", "seed"),
    *("model_name", "dataset_path", "output_path"),
    # set by SAELens, or with one value allowed
    *("sae_lens_version", "sae_lens_training_version", "apply_b_dec_to_input", "decoder_init_norm"),
    # refused by TranscoderRunnerConfig
    *("hook_head_index", "prefetch_llm_batches", "compile_llm", "compile_sae", "model_class_name"),
    *("model_from_pretrained_kwargs", "dataset_trust_remote_code", "llm_compilation_mode"),
    "sae_compilation_mode",
}
SHORT = {
    "training_tokens": "tokens",
    "train_batch_size_tokens": "batch",
    "context_size": "context",
    "hook_name": "hook-in",
    "hook_name_out": "hook-out",
    "lr_warm_up_steps": "warm-up",
    "lr_decay_steps": "decay",
    "n_checkpoints": "checkpoints",
    "standardize_activations": "standardize",
    "d_sae": "experts",
    "d_hidden": "hidden",
    "hidden_activation": "activation",
    "l1_coefficient": "l1",
    "log_to_wandb": "wandb",
}
"""Shorter names of options, beside the names of their fields."""
DEFAULTS: dict[str, Any] = {
    "training_tokens": 2_000_000,
    "lr": 4e-3,
    "standardize_activations": True,
    "log_to_wandb": False,
}
"""Where the command's default is not the config's: a recipe for a small model and a text of this machine."""
TOLD: dict[str, str] = {
    "hook_name": "the MLP's input",
    "hook_name_out": "the output of the same MLP",
    "d_sae": "as many parameters as a transcoder of --match-width",
    "d_hidden": "4 x d_in",
    "lr_warm_up_steps": "a twentieth of the steps",
    "lr_decay_steps": "half of the steps",
    "n_batches_in_buffer": "eight batches, at least 256",
}
"""Defaults that depend on the model or on other options."""
UNDOCUMENTED = {
    "log_to_wandb": "Log the run to Weights & Biases",
    "log_activations_store_to_wandb": "Upload the state of the activation store with each checkpoint",
    "log_optimizer_state_to_wandb": "Upload the state of the optimiser with each checkpoint",
    "log_weights_to_wandb": "Upload the weights with each checkpoint",
    "wandb_project": "Project of the run",
    "wandb_id": "Identifier of the run, to log to an existing one",
    "run_name": "Name of the run in Weights & Biases",
    "wandb_entity": "User or team that the project belongs to",
    "wandb_log_frequency": "Steps between two logged values",
    "eval_every_n_wandb_logs": "Logged values between two evaluations; there are none for these layers",
}
"""What SAELens' `LoggingConfig` does not say about its fields."""
AT_LEAST = {
    **dict.fromkeys(("training_tokens", "train_batch_size_tokens", "d_sae", "d_hidden"), 1),
    **dict.fromkeys(("n_batches_in_buffer", "store_batch_size_prompts", "n_checkpoints_kept"), 1),
    "context_size": 2,
}
AT_MOST = {
    **dict.fromkeys(("d_sae", "d_hidden"), 2**29),
    **dict.fromkeys(("adam_beta1", "adam_beta2", "activations_mixing_fraction"), 1),
}


def option(field: ConfigField) -> inspect.Parameter:
    """The option of a field. It is None where it was not given."""
    names = [field.name.replace("_", "-"), *([SHORT[field.name]] if field.name in SHORT else [])]
    kind, check, extra = KINDS.get(field.type, (str, is_json, {}))
    literal = re.fullmatch(r"Literal\[(.*)\]", field.type)
    if literal:
        kind, check = str, one_of(*re.findall(r"'(\w+)'", literal[1]))
    if kind in (int, float):
        extra = {"min": AT_LEAST.get(field.name, 0), "max": AT_MOST.get(field.name)}
    flags = [f"--{name}/--no-{name}" if kind is bool else f"--{name}" for name in names]
    default = DEFAULTS.get(field.name, field.default)
    told = TOLD.get(field.name) or ("" if default is None or default is COMPUTED else str(default))
    help = sentence(field.help or UNDOCUMENTED[field.name])
    return inspect.Parameter(
        field.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[
            kind | None,
            typer.Option(
                *flags,
                help=f"{help}  [default: {told}]" if told else help,
                callback=checked(check) if check else None,
                rich_help_panel=panel(field),
                **extra,
            ),
        ],
    )


def is_json(written: str) -> str:
    """Checks a value that is written as JSON; a word needs no quotes, and none is null."""
    if not re.fullmatch(r"[\w./:-]+", written):
        try:
            json.loads(written)
        except ValueError:
            raise ValueError(f"{written!r} is not JSON.") from None
    return written


def value_of(name: str, value: Any) -> Any:
    """An option's value as its field has it."""
    field = RUN.get(name) or LAYER.get(name) or LOGGING[name]
    if field.type in KINDS or field.type.startswith("Literal"):
        return value
    try:
        return None if value == "none" else json.loads(value)
    except ValueError:
        return value  # a word


KINDS: dict[str, tuple[type, Callable[[Any], Any] | None, dict[str, Any]]] = {
    "int": (int, None, {}),
    "float": (float, is_finite, {}),
    "bool": (bool, None, {}),
    "str": (str, None, {}),
}
"""The types of fields; the value of any other is read as JSON."""


def sentence(text: str) -> str:
    """A field's help as a sentence."""
    return re.sub(r" *\(default[^)]*\)", "", text).replace("`", "").rstrip(". ") + "."


def panel(field: ConfigField) -> str:
    """The group of options that --help shows a field in."""
    if field.name in LAYER:
        return "The layer"
    if field.name in LOGGING:
        return "Weights & Biases"
    if re.match(r"lr|adam|n_restart|train_batch|training_tokens|standardize|autocast$", field.name):
        return "Optimisation"
    if re.search(r"checkpoint|output|verbose", field.name):
        return "Checkpoints"
    return "Activations and text"


def generated_options() -> list[inspect.Parameter]:
    """The options that come from the config classes."""
    fields = {**LAYER, **RUN, **LOGGING}
    return [option(field) for name, field in fields.items() if name not in NOT_OPTIONS]


def with_generated_options(function: Callable[..., None]) -> Callable[..., None]:
    """Gives a command that takes **settings an option for each of them."""
    signature = inspect.signature(function)
    own = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    own = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own]
    parameters = [*own, *generated_options()]
    function.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    function.__annotations__ = {p.name: p.annotation for p in parameters}
    return function


@command
@with_generated_options
def train(
    output: Annotated[
        Path,
        typer.Argument(help="The folder to write to.", callback=checked(is_folder_to_write)),
    ],
    layers: Annotated[
        str,
        typer.Option("--layers", "--layer", help="Which blocks' MLPs: all, 2,12 or 0-29:3 (every third)."),
    ] = "12",
    architectures: Annotated[
        str,
        typer.Option("--architectures", "--architecture", help=f"Which of {', '.join(ARCHITECTURES)}."),
    ] = "mxd",
    k: Annotated[
        str,
        typer.Option(
            help="Active experts per token, as 32 or 32,128. 0: relu sparsity with --l1. JumpReLU has "
            "--l0-coefficient in its place.",
            callback=checked(is_list_of_integers()),
        ),
    ] = "32",
    seeds: Annotated[
        str,
        typer.Option(
            "--seeds",
            "--seed",
            help="Seeds of the initial weights and of the order of tokens, as 0 or 0-2.",
            callback=checked(is_list_of_integers()),
        ),
    ] = "42",
    match_width: Annotated[
        int, typer.Option(help="Features of the transcoder to match in parameters. 0: 16 x d_in.", min=0)
    ] = 0,
    model: Model = "smollm2-135m-instruct",
    text: Text = "embedded",
    hold_out: Annotated[
        bool,
        typer.Option("--hold-out", help="Leave out the rows of the text that `evaluate --held-out` uses."),
    ] = False,
    keep_special_tokens: Annotated[
        bool, typer.Option("--keep-special-tokens", help="Train on BOS, EOS and the like too.")
    ] = False,
    cache: Annotated[
        Path | None,
        typer.Option(
            help="Keep the activations in this folder, for epochs and further runs.",
            callback=checked(is_folder_to_write),
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Resume from the last checkpoint in OUTPUT.")
    ] = False,
    dtype: Annotated[
        str, typer.Option(help="Of the layer: float32 or bfloat16.", callback=checked(is_training_dtype))
    ] = "float32",
    bridge: Bridge = False,
    device: Device = "auto",
    **settings: Any,
) -> None:
    """Train MxDs or transcoders of one or several MLPs.

    Each becomes a folder that SAELens reads. With several layers, architectures, K or seeds, one pass of the
    language model feeds all of them, and each is written to a folder of its own in OUTPUT.
    """
    given = {name: value_of(name, value) for name, value in settings.items() if value is not None}
    check_settings(given)
    wanted = members(layers, architectures, k, seeds, n_blocks_of(model))
    several = len(wanted) != 1 or layers == "all"
    for member in wanted.values():
        check_member(member, layers, given)
    folders = [output / name for name in wanted] if several else [output]
    if resume and wanted and all((folder / "cfg.json").is_file() for folder in folders):
        raise typer.BadParameter(
            f"{output} holds a finished run: nothing is left to resume. Evaluate it, or name another folder.",
            param_hint="--resume",
        )

    from mxd_lens import TranscoderTrainingRunner
    from mxd_lens.text import load_text, split_text
    from mxd_lens.training.multi_runner import MultiTranscoderTrainingRunner
    from mxd_lens.training.progress import summary

    rows = split_text(load_text(text, streaming=False))[0] if hold_out else None
    language_model = load_language_model(model, given.get("llm_device") or device, bridge)
    wanted = wanted or members(layers, architectures, k, seeds, language_model.cfg.n_layers)
    given |= {"model_name": model, "dataset_path": text, "device": best_device(device), "dtype": dtype}
    if keep_special_tokens:
        given["exclude_special_tokens"] = False
    if cache is not None:
        given |= {"use_cached_activations": True, "cached_activations_path": str(cache)}
    if resume:
        given["resume_from_checkpoint"] = "latest"
    cfgs = {
        name: run_config(member, language_model, match_width, given, output / name if several else output)
        for name, member in wanted.items()
    }
    if several:
        runner: Any = MultiTranscoderTrainingRunner(
            cfgs, output / "checkpoints", resume, override_dataset=rows, override_model=language_model
        )
        saes = list(runner.trainer.saes.values())
    else:
        [cfg] = cfgs.values()
        runner = TranscoderTrainingRunner(cfg, override_dataset=rows, override_model=language_model)
        saes = [runner.sae]
    typer.echo(summary(cfgs.values(), saes))
    runner.run()
    held_out = f"--text {text} --held-out" if hold_out else "--text SOME-OTHER-TEXT"
    failures = getattr(runner, "failures", {})
    for name, cfg in cfgs.items():
        if name not in failures:
            typer.echo(f"{name}: {score(str(cfg.output_path))}mxd-lens evaluate {cfg.output_path} {held_out}")
    for name, reason in failures.items():
        typer.echo(f"{name} failed: {reason}", err=True)
    if failures:
        raise typer.Exit(1)


@dataclass(frozen=True)
class Member:
    """One layer to train."""

    block: int
    architecture: str
    k: int
    seed: int


def members(
    layers: str, architectures: str, k: str, seeds: str, n_blocks: int | None = None
) -> dict[str, Member]:
    """Every layer to train, by the name of its folder; empty if all blocks are wanted and not counted yet.

    Raises:
        typer.BadParameter: a block or an architecture that does not exist.
    """
    if layers == "all" and n_blocks is None:
        return {}
    blocks = list(range(n_blocks or 0)) if layers == "all" else integers(layers)
    if n_blocks is not None and max(blocks) >= n_blocks:
        raise typer.BadParameter(
            f"there is no block {max(blocks)}: the model has {n_blocks}, 0 to {n_blocks - 1}.",
            param_hint="--layers",
        )
    names = [name.strip() for name in architectures.split(",")]
    for name in names:
        if name not in ARCHITECTURES:
            raise typer.BadParameter(
                f"there is no architecture {name!r}. Choose from {', '.join(ARCHITECTURES)}.",
                param_hint="--architectures",
            )
    ks, numbers = integers(k), integers(seeds)
    found = {}
    for block, name in product(blocks, names):
        its_ks = [0] if has_thresholds(name) else ks
        for sparsity, seed in product(its_ks, numbers):
            parts = [f"blocks.{block}.mlp"]
            parts += [name] if len(names) > 1 else []
            parts += [f"k{sparsity}"] if len(its_ks) > 1 else []
            parts += [f"seed{seed}"] if len(numbers) > 1 else []
            found["-".join(parts)] = Member(block, name, sparsity, seed)
    return found


def has_thresholds(architecture: str) -> bool:
    """Whether thresholds decide how many features are active: a penalty on their number takes K's place."""
    return "l0_coefficient" in fields_of(ARCHITECTURES[architecture], *LAYER_FILES)


def check_settings(given: dict[str, Any]) -> None:
    """Checks what can be said of the settings before anything is loaded.

    Raises:
        typer.BadParameter: they contradict each other.
    """

    def setting(name: str) -> int:
        return given.get(name, DEFAULTS.get(name, RUN[name].default))

    tokens, batch = setting("training_tokens"), setting("train_batch_size_tokens")
    if tokens < batch:
        raise typer.BadParameter(
            f"{tokens:,} tokens are less than one batch of {batch:,} (--batch).", param_hint="--tokens"
        )
    steps = tokens // batch
    warm_up, decay = (given.get(name, 0) for name in ("lr_warm_up_steps", "lr_decay_steps"))
    if warm_up + decay > steps:
        raise typer.BadParameter(
            f"{warm_up:,} steps of warm-up and {decay:,} of decay are more than the run's {steps:,} steps.",
            param_hint="--warm-up" if warm_up else "--decay",
        )
    if setting("n_checkpoints") > steps:
        raise typer.BadParameter(
            f"{setting('n_checkpoints'):,} checkpoints are more than the run's {steps:,} steps.",
            param_hint="--checkpoints",
        )


def check_member(member: Member, layers: str, given: dict[str, Any]) -> None:
    """Checks what can be said of one layer before anything is loaded.

    Raises:
        typer.BadParameter: its architecture has no such setting, or its hooks cannot be guessed.
    """
    known = fields_of(ARCHITECTURES[member.architecture], *LAYER_FILES)
    for name in given.keys() & LAYER.keys() - known.keys():
        raise typer.BadParameter(
            f"{member.architecture} has no {name}.", param_hint=f"--{SHORT.get(name, name)}"
        )
    if member.k > given.get("d_sae", member.k):
        raise typer.BadParameter(
            f"{member.k} active experts are more than --experts {given['d_sae']}.", param_hint="--k"
        )
    if has_thresholds(member.architecture):
        if not given.get("l0_coefficient"):
            raise typer.BadParameter(
                f"{member.architecture} needs a penalty on the number of active features: add "
                "--l0-coefficient 0.01.",
                param_hint="--l0-coefficient",
            )
    elif member.k == 0 and not given.get("l1_coefficient"):
        raise typer.BadParameter(
            "0 means relu sparsity, which needs an L1 penalty: add --l1 0.01.", param_hint="--k"
        )
    hooks(member, layers, given)


def hooks(member: Member, layers: str, given: dict[str, Any]) -> tuple[str, str]:
    """The hook points to train on: those given, or those of the member's MLP.

    Raises:
        typer.BadParameter: one is given and the other cannot be told from it, or they are given for
            several layers.
    """
    of_mlp = re.compile(r"blocks\.(\d+)\.(?:mlp\.|hook_mlp_|ln2\.)\w+")
    hook_in, hook_out = given.get("hook_name"), given.get("hook_name_out")
    block = member.block
    if hook_in or hook_out:
        if layers == "all" or len(integers(layers)) > 1:
            raise typer.BadParameter("--hook-in and --hook-out are for one layer.", param_hint="--layers")
        match = of_mlp.fullmatch(hook_in or hook_out or "")
        if not (hook_in and hook_out) and match is None:
            raise typer.BadParameter(
                f"{hook_in or hook_out} is not a hook point of an MLP: give both --hook-in and --hook-out.",
                param_hint="--hook-in" if hook_in else "--hook-out",
            )
        block = int(match[1]) if match else block
    return hook_in or f"blocks.{block}.mlp.hook_in", hook_out or f"blocks.{block}.hook_mlp_out"


def run_config(
    member: Member, model: Any, match_width: int, given: dict[str, Any], output: Path
) -> "TranscoderRunnerConfig":
    """The run of one layer.

    Args:
        member: the layer.
        model: the language model.
        match_width: features of the transcoder whose parameters the layer matches; 0: 16 d_model.
        given: fields of the config classes that were set.
        output: the layer's folder.
    """
    from sae_lens import LoggingConfig

    from mxd_lens import TranscoderRunnerConfig
    from mxd_lens.architectures.base import ARCHITECTURES as CLASSES
    from mxd_lens.architectures.base import transcoder_parameters

    d_model = model.cfg.d_model
    config = CLASSES[member.architecture].training_config
    known = fields_of(ARCHITECTURES[member.architecture], *LAYER_FILES)
    layer = {name: value for name, value in given.items() if name in known or name in ("device", "dtype")}
    layer |= {"d_in": d_model, "d_out": d_model, "k": member.k or None}
    if "d_hidden" in known:
        layer.setdefault("d_hidden", 4 * d_model)
    if "d_sae" not in layer:
        budget = transcoder_parameters(d_model, d_model, match_width or 16 * d_model)
        layer["d_sae"] = config.matched_size(budget, **layer)
    run = {name: field.default for name, field in RUN.items()} | DEFAULTS | given
    steps = run["training_tokens"] // run["train_batch_size_tokens"]
    warm_up = given.get("lr_warm_up_steps", steps // 20)
    hook_in, hook_out = hooks(member, str(member.block), given)
    computed = {
        "lr_warm_up_steps": warm_up,
        "lr_decay_steps": min(steps // 2, steps - warm_up),
        "n_batches_in_buffer": max(256, 8 * run["train_batch_size_tokens"] // run["context_size"]),
        **{name: value for name, value in (DEFAULTS | given).items() if name in RUN},
        "hook_name": hook_in,
        "hook_name_out": hook_out,
    }
    logging = {name: value for name, value in (DEFAULTS | given).items() if name in LOGGING}
    return TranscoderRunnerConfig(
        sae=config(**layer),
        seed=member.seed,
        output_path=str(output),
        logger=LoggingConfig(**logging),
        **computed,
    )


def score(folder: str | Path) -> str:
    """How well training ended, from the layer's training curve."""
    from mxd_lens.reports.run import read_history

    last = read_history(folder)[-1:]
    return f"normalised MSE {last[0]['normalized_mse']:.3f} on its last batch. " if last else ""
