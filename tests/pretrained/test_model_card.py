"""The page about a published layer: true, complete, and safe whatever the names in it."""

import dataclasses
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from datasets import Dataset
from hub_stand_in import HubStandIn
from markdown_reader import markdown, tables_of
from sae_lens.saes.sae import SAEMetadata
from test_hub import NAMES, REPO, REPORT, RUN, random_layer
from tiny import D_MODEL, HOOK_IN, HOOK_OUT

from mxd_lens import MxD, evaluate
from mxd_lens.pretrained.hub import push_to_hub
from mxd_lens.pretrained.model_card import MEASURES, model_card, plain, table, training_settings
from mxd_lens.text import token_sequences


def card_of(sae: Any, reports: Any = None, **options: Any) -> str:
    return model_card(sae, reports, **({"release": REPO, "sae_id": "layer12"} | options))


def metadata_of(card: str) -> dict[str, Any]:
    assert card.startswith("---\n")
    return yaml.safe_load(card.split("---\n")[1])


# The metadata


@pytest.mark.parametrize("architecture", NAMES)
def test_the_metadata(architecture: str) -> None:
    metadata = metadata_of(card_of(random_layer(architecture), license="mit"))
    assert metadata == {
        "library_name": "saelens",
        "tags": ["mechanistic-interpretability", "mxd-lens", architecture],
        "base_model": "openai-community/gpt2",
        "license": "mit",
    }


@pytest.mark.parametrize(
    ("model_name", "base_model"),
    [
        ("gpt2-small", "openai-community/gpt2"),
        ("pythia-410m", "EleutherAI/pythia-410m"),
        ("smollm2-135m-instruct", "HuggingFaceTB/SmolLM2-135M-Instruct"),
        ("someone/llama", "someone/llama"),
        ("/models/someone/llama", None),
        ("llama: [of] words", None),
        ("", None),
    ],
)
def test_the_base_model(model_name: str, base_model: str | None) -> None:
    layer = random_layer(metadata=SAEMetadata(model_name=model_name))
    assert metadata_of(card_of(layer)).get("base_model") == base_model
    assert metadata_of(card_of(layer, base_model="a/b"))["base_model"] == "a/b"


# The formula

PHI: dict[str, Callable[[Any], Any]] = {
    "relu": lambda x: np.maximum(x, 0),
    "silu": lambda x: x / (1 + np.exp(-x)),
    "gelu": lambda x: x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2,
}


def topk(pre: Any, k: int) -> Any:
    smallest = np.sort(pre, axis=-1)[..., -k, None]
    return np.where(pre >= smallest, pre, 0)


@pytest.mark.parametrize("k", [2, None])
@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("topk_transcoder", {}),
        ("topk_skip_transcoder", {}),
        *(("mxd", {"gated": gated, "hidden_activation": phi}) for gated in (False, True) for phi in PHI),
        ("skip_mxd", {"gated": True}),
        ("skip_mxd", {"gated": False, "hidden_activation": "silu"}),
    ],
)
def test_the_formula_is_the_layer(architecture: str, changes: dict[str, Any], k: int | None) -> None:
    """Its lines are Python: executed with numpy, they give what the layer gives."""
    layer = random_layer(architecture, k=k, dtype="float64", **changes)
    x = torch.randn(50, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    names = {name: weight.detach().numpy() for name, weight in layer.named_parameters()}
    exec("\n".join(layer.formula()), names := {"x": x.numpy(), "topk": topk, **PHI, **names})
    np.testing.assert_allclose(names["y"], layer(x).detach().numpy(), rtol=1e-12, atol=1e-12)
    assert "```python\n{}\n```".format("\n".join(layer.formula())) in card_of(layer)


@pytest.mark.parametrize("architecture", NAMES)
def test_the_sizes(architecture: str) -> None:
    layer = random_layer(architecture)
    sizes = dict(tables_of(card_of(layer))[0][1:])
    assert sizes["architecture"] == architecture
    assert (sizes["reads"], sizes["writes"]) == (HOOK_IN, HOOK_OUT)
    active = "2" if layer.cfg.k else "as many as are above 0"
    assert (sizes["d_in, d_out"], sizes["active on a token (k)"]) == ("4, 5", active)
    assert sizes["parameters"] == f"{sum(p.numel() for p in layer.parameters()):,}"
    assert ("width of the decoder branch (d_hidden)" in sizes) == ("mxd" in architecture)


# The training


def test_the_training() -> None:
    runner = RUN | {"lr_warm_up_steps": 1000, "seed": 7, "sae": {"l1_coefficient": 0.5}, "verbose": False}
    layer = random_layer(metadata=SAEMetadata(context_size=128, dataset_path="overridden"))
    rows = dict(tables_of(card_of(layer, training=training_settings(runner) | {"GPU hours": 0}))[1][1:])
    assert rows["text"] == "news.txt"
    assert rows["training tokens"] == "4,096"
    assert rows["learning rate (Adam)"] == "0.004"
    assert rows["steps of warm-up"] == "1,000"
    assert (rows["seed"], rows["L1 coefficient"], rows["GPU hours"]) == ("7", "0.5", "0")
    assert rows["tokens in a sequence"] == "128"
    assert "verbose" not in rows
    assert not any("someone" in value for value in rows.values())


def test_a_training_nothing_is_known_of() -> None:
    layer = random_layer()
    layer.cfg.metadata = SAEMetadata(sae_lens_version=None)
    assert "Nothing is known about it." in card_of(layer)


# The report


def shown(value: float) -> set[str]:
    return {f"{value:.3f}", f"{value:.2g}", f"{value:,}"}


@pytest.fixture(scope="module")
def measured(tiny_folder: Path) -> Any:
    """An untrained MxD of the tiny model, and its report."""
    from mxd_lens import load_model

    model = load_model(tiny_folder)
    metadata = SAEMetadata(model_name=str(tiny_folder), hook_name=HOOK_IN, hook_name_out=HOOK_OUT)
    layer = random_layer(d_in=D_MODEL, d_out=D_MODEL, metadata=metadata)
    tokens = torch.randint(3, 20, (4, 16), generator=torch.Generator().manual_seed(0))
    return layer, evaluate(model, layer, tokens, progress=False)


def test_every_number_of_the_tables_stands_in_the_report(measured: Any) -> None:
    layer, report = measured
    values = [v for v in report.to_dict().values() if isinstance(v, int | float)]
    values += [v for token in report.largest_tokens for v in token.values() if isinstance(v, float)]
    known = set().union(*map(shown, values))
    card = card_of(layer, {"prose": report})
    _, _, replaced, rest, largest = tables_of(card)
    cells = [cell for rows in (replaced, rest, largest) for row in rows[1:] for cell in row[1:] if cell]
    assert len(cells) == 3 + 5 + len(MEASURES) + 3 * len(report.largest_tokens)
    assert set(cells) <= known
    assert replaced[0] == ["", "the layer", "mean gate", "shuffled gate", "unmodified", "zero ablated"]
    assert replaced[1][1:4] == [
        f"{value:.3f}"
        for value in (
            report.normalized_mse,
            report.normalized_mse_mean_gate,
            report.normalized_mse_shuffled_gate,
        )
    ]
    assert [row[0] for row in largest[1:]] == [repr(token["token"]) for token in report.largest_tokens]
    assert f"### On prose: {report.n_tokens:,} tokens" in card
    numbers_in_prose = re.findall(r"-?\d+\.\d+", card[card.index("## How faithful") : card.index("## Use")])
    assert set(numbers_in_prose) <= known


def test_every_measure_is_in_the_card(measured: Any) -> None:
    layer, report = measured
    card = card_of(layer, {"prose": report})
    for field in dataclasses.fields(report):
        if field.type in (float, "float"):
            assert shown(getattr(report, field.name)) & set(re.findall(r"-?\d[\d,.e-]*", card)), field.name


def test_a_report_is_a_mapping_too() -> None:
    layer = random_layer()
    reports = {"one": REPORT, "other": REPORT}
    card = card_of(layer, reports)
    assert card == card_of(layer, {name: json.loads(json.dumps(r.to_dict())) for name, r in reports.items()})
    assert card.index("### On one:") < card.index("### On other:")


@pytest.mark.parametrize(
    ("share", "says"),
    [
        (0.65, "most of what this layer explains, it explains through experts"),
        (0.6, "most of what"),
        (0.59, "much of what this layer does is done without its experts"),
        (0.0, "the experts explain nothing that the decoder branch alone would not"),
        (-0.3, "explain nothing"),
        (math.nan, "explain nothing"),
    ],
)
def test_what_the_card_says_about_the_experts(share: float, says: str) -> None:
    card = card_of(random_layer(), {"prose": dataclasses.replace(REPORT, feature_share=share)})
    assert says in card
    assert (f"a feature share of {share:.3f}" in card) == (share > 0)
    assert ("not defined" in card) == math.isnan(share)


@pytest.mark.parametrize(
    ("architecture", "rest"),
    [
        ("mxd", "their experts, the decoder branch alone"),
        ("skip_mxd", "their experts, the decoder branch and the skip connection alone"),
        ("topk_transcoder", "their features, a constant alone"),
        ("topk_skip_transcoder", "their features, the skip connection alone"),
    ],
)
def test_what_is_left_without_the_experts(architecture: str, rest: str) -> None:
    assert rest in card_of(random_layer(architecture), {"prose": REPORT})


def test_the_text_decides_the_numbers_and_the_card_shows_by_how_much() -> None:
    def report(error: float, share: float) -> dict[str, Any]:
        return REPORT.to_dict() | {"normalized_mse": error, "feature_share": share}

    one = card_of(random_layer(), {"WikiText": report(0.18, 0.62)})
    assert "measured on one text, WikiText" in one
    assert "4 texts would show it" in one
    texts = {"WikiText": (0.18, 0.62), "code": (0.25, 0.5), "French": (0.4, 0.41), "papers": (0.32, 0.3)}
    four = card_of(random_layer(), {text: report(*numbers) for text, numbers in texts.items()})
    assert (
        "Over 4 texts the normalised MSE is from 0.180 to 0.400, and the feature share from 0.300 to 0.620."
        in four
    )
    assert "would show it" not in four
    _, *rows = next(table for table in tables_of(four) if table[0][0] == "text")
    assert [row[0] for row in rows] == list(texts)
    assert [row[2] for row in rows] == ["0.180", "0.250", "0.400", "0.320"]


def test_an_architecture_of_somebody_elses_has_a_card_that_says_nothing_false() -> None:
    class Squared(MxD):
        def hidden(self, x: torch.Tensor) -> torch.Tensor:
            return super().hidden(x) ** 2

    Squared.__module__ = "somebody.layers"
    layer = random_layer()
    card = card_of(Squared(layer.cfg))
    assert "its code does not state the formula" in card
    assert "z = gelu(" not in card
    assert "from somebody.layers import Squared" in card
    assert "import somebody.layers  # makes it known to SAELens" in card


def test_a_layer_that_was_not_judged() -> None:
    assert "has not been evaluated yet" in card_of(random_layer())


@pytest.mark.parametrize("missing", ["normalized_mse_mean_gate", "feature_share", "n_tokens"])
@pytest.mark.parametrize("value", [None, "0.3", ...])
def test_a_report_that_lacks(missing: str, value: Any) -> None:
    report = REPORT.to_dict() | {missing: value}
    if value is ...:
        del report[missing]
    with pytest.raises(ValueError, match=f"not the report of `evaluate`: {missing} is missing, or no number"):
        card_of(random_layer(), {"prose": report})


# The code in it


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("architecture", NAMES)
def test_the_code_runs(
    hub: HubStandIn,
    tiny_folder: Path,
    capsys: pytest.CaptureFixture[str],
    architecture: str,
    dtype: str,
) -> None:
    """As it stands in the published page, but for the model, which is a folder here."""
    metadata = SAEMetadata(model_name=str(tiny_folder), hook_name=HOOK_IN, hook_name_out=HOOK_OUT)
    layer = random_layer(architecture, d_in=D_MODEL, d_out=D_MODEL, dtype=dtype, metadata=metadata)
    push_to_hub(layer, REPO, "layers/1")
    page = hub.files(REPO)["layers/1/README.md"].decode()
    blocks = [t.content for t in markdown.parse(page) if t.type == "fence" and "import" in t.content]
    assert len(blocks) == 2
    blocks += [t.content for t in markdown.parse(hub.files(REPO)["README.md"].decode()) if t.type == "fence"]
    for code in blocks:
        exec(code.replace(f'"{tiny_folder.name}"', repr(str(tiny_folder))), names := {})
        loaded = names["layer"]
        assert type(loaded) is type(layer)
        assert all(
            torch.equal(a.float(), b.float())
            for a, b in zip(loaded.parameters(), layer.parameters(), strict=True)
        )
    assert capsys.readouterr().out.strip()


# Names nobody chose well

HOSTILE = [
    "plain",
    "snake_case_name*s*",
    "a | b",
    "`code` ``",
    "<script>alert(1)</script>",
    "[link](http://example.com)",
    "![image](x.png)",
    "&amp; &lt;",
    "$x$ ~~struck~~",
    "back\\slash\\|",
    "line\nbreak\r\ttab",
    "# heading",
    "```",
    "\u202eright to left\u200b",
    "ünïcödé 日本 🙂",
]


def visible(text: str) -> str:
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


@pytest.mark.parametrize("text", HOSTILE)
def test_names_are_shown_letter_for_letter(text: str) -> None:
    tokens = markdown.parse(table(("", ""), [(plain(text), "x")]))
    assert [t.type for t in tokens].count("table_open") == 1
    cells = [t for t in tokens if t.type == "inline"]
    kinds = {child.type for cell in cells for child in cell.children or []}
    assert kinds <= {"text", "text_special"}
    assert "".join(child.content for child in cells[2].children or []) == visible(text).strip()
    assert cells[3].content == "x"


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_names_everywhere(text: str) -> None:
    layer = random_layer(
        metadata=SAEMetadata(model_name=text, hook_name=text, hook_name_out=text, dataset_path=text)
    )
    report = REPORT.to_dict()
    report["largest_tokens"] = [REPORT.largest_tokens[0] | {"token": text}]
    card = card_of(layer, {text: report}, training={text: text}, top_experts={3: text})
    assert metadata_of(card)["library_name"] == "saelens"
    tokens = markdown.parse(card.split("---\n", 2)[2])
    inner = [child.type for token in tokens for child in token.children or []]
    assert not {"html_inline", "link_open", "image", "em_open", "strong_open"} & set(inner)
    assert not any(token.type == "html_block" for token in tokens)
    headings = [
        t.content for t in tokens if t.type == "inline" and t.level == 1 and t.content.startswith("On ")
    ]
    assert len(headings) == 1
    sections = [
        tokens[i + 1].content for i, t in enumerate(tokens) if t.type == "heading_open" and t.tag == "h2"
    ]
    assert sections == ["The layer", "Training", "How faithful it is", "Experts", "Use"]
    assert all(len(row) == len(rows[0]) for rows in tables_of(card) for row in rows)
    for code in (t.content for t in tokens if t.type == "fence"):
        compile(code, "card", "exec")


@pytest.mark.real_model
def test_the_sentences_are_about_the_layer(smollm2: Any) -> None:
    """On the real model: a layer whose experts are all zero has a feature share of nothing."""
    metadata = SAEMetadata(
        model_name="smollm2-135m-instruct",
        hook_name="blocks.12.mlp.hook_in",
        hook_name_out="blocks.12.hook_mlp_out",
    )
    layer = random_layer("topk_transcoder", d_in=576, d_out=576, metadata=metadata)
    layer.W_dec.data.zero_()
    text = Dataset.from_dict({"text": ["The cat sat on the mat. " * 20]})
    tokens = token_sequences(smollm2, text, 1, 32)
    card = card_of(layer, {"a cat": evaluate(smollm2, layer, tokens, progress=False)})
    assert "the features explain nothing that a constant alone would not" in card
    assert metadata_of(card)["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
