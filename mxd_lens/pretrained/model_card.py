"""The README.md of a published layer: what it is, how it was trained, how faithful it is, how to use it."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

from huggingface_hub import ModelCardData

from mxd_lens.architectures.base import PairedTranscoder
from mxd_lens.artifacts.tables import printable
from mxd_lens.models import hub_name
from mxd_lens.pretrained.machine_paths import without_machine_paths

SETTINGS = {
    "dataset_path": "text",
    "training_tokens": "training tokens",
    "context_size": "tokens in a sequence",
    "prepend_bos": "BOS before every sequence",
    "exclude_special_tokens": "special tokens left out (or their ids)",
    "standardize_activations": "on standardised activations",
    "train_batch_size_tokens": "tokens in a step",
    "lr": "learning rate (Adam)",
    "lr_scheduler_name": "schedule",
    "lr_warm_up_steps": "steps of warm-up",
    "lr_decay_steps": "steps of decay at the end",
    "adam_beta1": "Adam's beta 1",
    "adam_beta2": "Adam's beta 2",
    "l1_coefficient": "L1 coefficient",
    "l1_warm_up_steps": "steps of L1 warm-up",
    "cached_activations_dtype": "dtype of the activations",
    "autocast": "products in bfloat16",
    "seed": "seed",
    "sae_lens_version": "sae-lens",
}
"""The settings of a training run that a card shows, and what it calls them."""

MEASURES = {
    "normalized_mse_median": "median over tokens of the normalised MSE",
    "fraction_of_variance_unexplained": "fraction of variance unexplained",
    "feature_share": "feature share: (mean gate - the layer) / mean gate, of the normalised MSE",
    "ce_loss_recovered": "cross-entropy recovered, of what zero ablation costs",
    "kl_divergence": "KL divergence from the unmodified model, nats",
    "kl_divergence_zero_ablated": "KL divergence of the zero-ablated model, nats",
    "l0": "active experts per token",
    "silent_fraction": "share of experts that fired on none of the tokens",
}

LATER = {"kl_divergence_zero_ablated"}
"""Numbers that reports of earlier versions lack."""

ENOUGH_TEXTS = 4
"""Of different kinds, from which on a card does not warn that the text decides its numbers."""

MOSTLY_EXPERTS = 0.6
"""The feature share from which on a layer's experts can be said to do most of its work."""


class HasDict(Protocol):
    """A `FaithfulnessReport`."""

    def to_dict(self) -> dict[str, Any]: ...


Report = HasDict | Mapping[str, Any]
"""A `FaithfulnessReport`, or what its `to_dict` returns."""


def model_card(
    sae: PairedTranscoder,
    reports: Mapping[str, Report] | None = None,
    *,
    release: str,
    sae_id: str,
    training: Mapping[str, Any] | None = None,
    top_experts: Mapping[int, str] | None = None,
    base_model: str | None = None,
    license: str | None = None,
) -> str:
    """The README.md of a layer on the hub: YAML metadata, then markdown.

    Args:
        sae: the layer.
        reports: what `evaluate` measured, by the name of the text it was measured on.
        release: the repository, `user/repo`.
        sae_id: the layer's folder in it.
        training: settings of the training run, beside those in the layer's metadata; `training_settings`
            picks them from a runner_cfg.json.
        top_experts: what some experts respond to, by their ids.
        base_model: the language model's repository on the hub. None: if the layer's metadata tells it.
        license: an identifier of the hub, such as "mit".

    Raises:
        ValueError: a report lacks a number.
    """
    metadata = without_machine_paths(sae.cfg.metadata.to_dict())
    model_name = metadata.get("model_name") or ""
    title = sae.title
    parts = [
        front_matter([sae.cfg.architecture()], base_model or hub_name(model_name), license),
        f"# {plain(sae_id)}: {title[0].lower()}{title[1:]} of {plain(model_name) or 'a language model'}",
        f"{title} that replaces one MLP: it reads {code(metadata.get('hook_name'))} and writes "
        f"{code(metadata.get('hook_name_out'))}. Made with mxd_lens, in SAELens' format.",
        "## The layer",
        formula(sae),
        table(("", ""), layer_rows(sae, metadata)),
        "## Training",
        table(("", ""), training_rows(metadata, training)) or "Nothing is known about it.",
        "## How faithful it is",
        *over_texts(reports or {}),
        *(report_section(sae, text, report) for text, report in (reports or {}).items()),
    ]
    if not reports:
        parts.append("It has not been evaluated yet: `mxd_lens.evaluate` does that.")
    if top_experts:
        rows = [(f"{expert:,}", plain(what)) for expert, what in top_experts.items()]
        parts += ["## Experts", table(("expert", "responds to"), rows)]
    parts += ["## Use", usage(sae, model_name, release, sae_id)]
    return "\n\n".join(parts) + "\n"


def front_matter(architectures: Iterable[str], base_model: str | None, license: str | None) -> str:
    """The YAML metadata of the hub, between its marks."""
    data = ModelCardData(
        library_name="saelens",
        tags=["mechanistic-interpretability", "mxd-lens", *architectures],
        base_model=base_model,
        license=license,
    )
    return f"---\n{data.to_yaml()}\n---"


def formula(sae: PairedTranscoder) -> str:
    """The layer as Python in the names of its weights, and what its experts write."""
    try:
        lines = "\n".join(sae.formula())
    except NotImplementedError:
        return f"{type(sae).__name__} computes something of its own, and its code does not state the formula."
    return f"```python\n{lines}\n```\n\n{sae.about}"


def layer_rows(sae: PairedTranscoder, metadata: Mapping[str, Any]) -> list[tuple[str, str]]:
    cfg = sae.cfg
    rows = [
        ("architecture", code(cfg.architecture())),
        ("language model", plain(metadata.get("model_name") or "unknown")),
        ("reads", code(metadata.get("hook_name"))),
        ("writes", code(metadata.get("hook_name_out"))),
        ("d_in, d_out", f"{cfg.d_in:,}, {cfg.d_out:,}"),
        (f"{sae.unit}s (d_sae)", f"{cfg.d_sae:,}"),
        ("active on a token (k)", "as many as are above 0" if cfg.k is None else f"{cfg.k:,}"),
        ("parameters", f"{sum(p.numel() for p in sae.parameters()):,}"),
        ("dtype", cfg.dtype),
    ]
    if hasattr(cfg, "d_hidden"):
        rows.insert(6, ("width of the decoder branch (d_hidden)", f"{cfg.d_hidden:,}"))
    return [(plain(name), value) for name, value in rows]


def training_settings(runner: Mapping[str, Any]) -> dict[str, Any]:
    """What a card shows of SAELens' runner_cfg.json."""
    known = {**runner, **{k: v for k, v in runner.get("sae", {}).items() if k.startswith("l1_")}}
    if not known.get("l1_coefficient"):
        known = {name: value for name, value in known.items() if not name.startswith("l1_")}
    return {name: known[name] for name in SETTINGS if known.get(name) is not None}


def training_rows(metadata: Mapping[str, Any], training: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    given = without_machine_paths(dict(training or {}))
    settings = {**metadata, **given}
    shown = [name for name in SETTINGS if name in settings] + list(given)
    return [
        (plain(SETTINGS.get(name, name.replace("_", " "))), setting(settings[name]))
        for name in dict.fromkeys(shown)
        if settings[name] is not None
    ]


def setting(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list | tuple):
        return ", ".join(setting(item) for item in value)
    return plain(str(value))


def over_texts(reports: Mapping[str, Report]) -> list[str]:
    """The numbers of all texts side by side, and how far they are apart: the text decides them."""
    if not reports:
        return []
    found = {plain(without_machine_paths(text)): report_numbers(report) for text, report in reports.items()}
    few = (
        "Texts differ in this more than layers do. How far apart the numbers are on other kinds of text is "
        f"not known: {ENOUGH_TEXTS} texts would show it."
    )
    if len(found) == 1:
        return [f"All numbers were measured on one text, {next(iter(found))}. {few}"]
    rows = [
        (
            text,
            f"{report['n_tokens']:,}",
            *numbers(report, "normalized_mse", "normalized_mse_mean_gate", "feature_share"),
            *numbers(report, "ce_loss_recovered"),
        )
        for text, report in found.items()
    ]
    errors, shares = (
        sorted(report[name] for report in found.values()) for name in ("normalized_mse", "feature_share")
    )
    spread = (
        f"Over {len(found)} texts the normalised MSE is from {number(errors[0])} to {number(errors[-1])}, "
        f"and the feature share from {number(shares[0])} to {number(shares[-1])}."
    )
    head = ("text", "tokens", "normalised MSE", "experts mean-ablated", "feature share", "loss recovered")
    return [spread if len(found) >= ENOUGH_TEXTS else f"{spread} {few}", table(head, rows)]


def report_section(sae: PairedTranscoder, text: str, report: Report) -> str:
    """One text's table, and what its mean gate and shuffled gate say about the experts."""
    found = report_numbers(report)
    replaced = table(
        ("", "the layer", "mean gate", "shuffled gate", "unmodified", "zero ablated"),
        [
            (
                "normalised MSE",
                *numbers(found, "normalized_mse", "normalized_mse_mean_gate", "normalized_mse_shuffled_gate"),
                "",
                "",
            ),
            (
                "cross-entropy, nats",
                *numbers(
                    found,
                    "ce_loss_replaced",
                    "ce_loss_mean_gate",
                    "ce_loss_shuffled_gate",
                    "ce_loss",
                    "ce_loss_zero_ablated",
                ),
            ),
        ],
    )
    tokens = [
        (
            plain(repr(token["token"])),
            *numbers(token, "norm", "normalized_mse", "share_of_squared_norm"),
        )
        for token in found.get("largest_tokens", [])
    ]
    largest = table(("token", "norm of y", "normalised MSE", "share of the squared norms"), tokens)
    parts = [
        f"### On {plain(without_machine_paths(text))}: {found['n_tokens']:,} tokens",
        replaced,
        "Mean gate: the experts are mean-ablated, their coefficients replaced by the means over the tokens. "
        "Shuffled gate: they are resampled from another token of the same text.",
        what_it_means(sae, found),
        table(
            ("", ""),
            [(plain(what), *numbers(found, name)) for name, what in MEASURES.items() if name in found],
        ),
    ]
    if largest:
        parts += ["The tokens with the largest outputs, which decide the variance:", largest]
    return "\n\n".join(parts)


def report_numbers(report: Report) -> Mapping[str, Any]:
    """A report as a mapping. Raises ValueError where it is none."""
    found = dict(report if isinstance(report, Mapping) else report.to_dict())
    if "dead_fraction" in found:  # its name until version 0.1
        found["silent_fraction"] = found.pop("dead_fraction")
    needed = [
        *("normalized_mse", "normalized_mse_mean_gate", "normalized_mse_shuffled_gate", "n_tokens"),
        *("ce_loss", "ce_loss_replaced", "ce_loss_zero_ablated", "ce_loss_mean_gate"),
        *("ce_loss_shuffled_gate", *(name for name in MEASURES if name not in LATER)),
    ]
    if missing := [name for name in needed if not isinstance(found.get(name), int | float)]:
        raise ValueError(
            f"This is not the report of `evaluate`: {', '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} missing, or no number."
        )
    return found


def what_it_means(sae: PairedTranscoder, found: Mapping[str, Any]) -> str:
    """One honest sentence on how much of the layer's work its experts do."""
    error, without = numbers(found, "normalized_mse", "normalized_mse_mean_gate")
    share = found["feature_share"]
    experts = f"{sae.unit}s"
    rest = f"{' and '.join(sae.dense_parts) or 'a constant'} alone"
    if not share > 0:
        return (
            f"On this text the {experts} explain nothing that {rest} would not: the layer's error is "
            f"{error}, and {without} with the mean gate."
        )
    verdict = (
        f"most of what this layer explains, it explains through {experts} that can be looked at one by one."
        if share >= MOSTLY_EXPERTS
        else f"much of what this layer does is done without its {experts}, and they tell that much less."
    )
    return (
        f"Without telling tokens apart by their {experts}, {rest} would have an error of {without} instead "
        f"of {error}, a feature share of {number(share)}: {verdict}"
    )


def usage(sae: PairedTranscoder, model_name: str, release: str, sae_id: str) -> str:
    """Code that loads the layer, attaches it and generates; and the same through SAELens."""
    cls = type(sae).__name__.removeprefix("Training")
    module = type(sae).__module__
    imported, known = f"from mxd_lens import {cls}, load_model", "mxd_lens  # makes its architectures"
    if not module.startswith("mxd_lens."):
        imported, known = (
            f"from {module} import {cls}\nfrom mxd_lens import load_model",
            f"{module}  # makes it",
        )
    kept = "" if sae.cfg.dtype == "float32" else f", dtype={quoted(sae.cfg.dtype)}"
    return f"""```python
{imported}

model = load_model({quoted(model_name or "the model it was trained on")})
layer = {cls}.from_pretrained({quoted(release)}, {quoted(sae_id)})
with model.saes(saes=[layer]):
    print(model.generate("The", max_new_tokens=20, do_sample=False))
```

The same through SAELens:

```python
import {known} known to SAELens
from sae_lens import SAE

layer = SAE.from_pretrained({quoted(release)}, {quoted(sae_id)}{kept})
```"""


def quoted(text: str) -> str:
    """`text` as Python writes it."""
    return f'"{text}"' if re.fullmatch(r"[\w./ -]+", text) else repr(text)


# Markdown


def plain(text: str) -> str:
    """Markdown that shows `text` letter for letter, on one line."""
    return re.sub(r"([\\`*_{}\[\]<>|~$&#])", r"\\\1", printable(text))


def code(text: str | None) -> str:
    """`text` in code type where it is a plain name."""
    return f"`{text}`" if text and re.fullmatch(r"[\w.:/-]+", text) else plain(text or "an unnamed hook")


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A markdown table of cells that are markdown; nothing where there are no rows."""
    lines = [" | ".join(row) for row in rows]
    if not lines:
        return ""
    rule = " | ".join(["---", *["---:" if len(head) > 2 else "---"] * (len(head) - 1)])
    return "\n".join(f"| {line} |" for line in (" | ".join(head), rule, *lines))


def number(value: float) -> str:
    if not math.isfinite(value):
        return "not defined"
    return f"{value:.2g}" if 0 < abs(value) < 0.001 else f"{value:.3f}"


def numbers(found: Mapping[str, Any], *names: str) -> list[str]:
    return [number(found[name]) for name in names]
