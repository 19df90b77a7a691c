"""What every architecture promises in `architectures/base.py`, tried on all that are registered."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from small_layers import sizes_of

from mxd_lens import MxD, MxDConfig, SkipMxD, TopKTranscoder, TopKTranscoderConfig, matched_n_experts, sparse
from mxd_lens.architectures import ARCHITECTURES
from mxd_lens.architectures.base import transcoder_parameters
from mxd_lens.sparse.coefficients import Active, Dense

WIDTHS: dict[str, Any] = {"d_in": 6, "d_out": 5, "d_sae": 24, "k": 4, "dtype": "float64"}


def settings_of(name: str) -> dict[str, Any]:
    return WIDTHS | sizes_of(ARCHITECTURES[name].config)


def random_layer(name: str, **changes: Any) -> Any:
    layer_class, config_class, _, _ = ARCHITECTURES[name]
    layer = layer_class(config_class(**settings_of(name) | changes))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return layer


@pytest.fixture(params=list(ARCHITECTURES))
def layer(request: pytest.FixtureRequest) -> Any:
    return random_layer(request.param)


X = torch.randn(9, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_the_output_is_what_the_experts_write_and_what_none_of_them_writes(layer: Any) -> None:
    values, experts = layer.active_experts(X)
    written = values.unsqueeze(-1) * layer.written_by(experts, layer.expert_input(X))
    skip = layer.skip_out(X)
    rest = layer.b_dec + (0 if skip is None else skip)
    torch.testing.assert_close(layer(X), written.sum(1) + rest, rtol=1e-12, atol=1e-12)
    # With no coefficient, only the rest is left.
    torch.testing.assert_close(layer.decode(torch.zeros(9, 24, dtype=X.dtype), X), rest.expand(9, -1))


def test_the_mixture_is_linear_and_the_output_is_linear_in_it(layer: Any) -> None:
    a, b = torch.rand(2, 9, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    m, n = layer.mixture(Dense(a)), layer.mixture(Dense(b))
    torch.testing.assert_close(layer.mixture(Dense(2 * a - b)), 2 * m - n)
    s = layer.expert_input(X)
    torch.testing.assert_close(
        layer.experts_out(2 * m - n, s), 2 * layer.experts_out(m, s) - layer.experts_out(n, s)
    )


def test_sparse_and_dense_coefficients_say_the_same(layer: Any) -> None:
    sparse = layer.coefficients(X)
    torch.testing.assert_close(sparse.dense(), layer.encode(X))
    torch.testing.assert_close(layer.mixture(sparse), layer.mixture(Dense(sparse.dense())))
    torch.testing.assert_close(sparse.sparse().to_dense(), sparse.dense())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("implementation", ["cpu", "reference"])
def test_every_way_of_running_selects_the_same_experts(dtype: str, implementation: Any) -> None:
    """In 8 bits of mantissa many pre-activations tie, so that rounding once or twice chooses others."""
    layer = TopKTranscoder(TopKTranscoderConfig(d_in=64, d_out=8, d_sae=4096, k=32, dtype=dtype))
    x = torch.randn(5, 40, 64, generator=torch.Generator().manual_seed(3)).to(layer.dtype)
    with torch.no_grad(), sparse.implementation(implementation):
        torch.nn.init.normal_(layer.b_enc, generator=torch.Generator().manual_seed(4))
        _, experts = layer.active_experts(x)
        in_forward = layer.encode(x) != 0
    chosen = torch.zeros_like(in_forward).scatter(-1, experts, True)
    assert torch.equal(chosen & in_forward, in_forward)
    assert in_forward.sum() == 5 * 40 * 32
    layer.encode(x.requires_grad_()).sum().backward()  # it has gradients too
    assert x.grad is not None


def test_dense_coefficients_name_their_active_experts() -> None:
    a = torch.tensor([[0.0, 3, 0, 1], [0, 0, 0, 2]])
    values, experts = Dense(a).active()
    assert torch.equal(Active(values, experts, 4).dense(), a)
    assert values.shape == (2, 2)


def test_matched_size_is_the_largest_within_the_budget(layer: Any) -> None:
    config = type(layer.cfg)
    settings = {k: v for k, v in settings_of(config.architecture()).items() if k not in ("d_sae", "k")}
    for budget in (500, 513, 10_000):
        n = config.matched_size(budget, **settings)

        def parameters(d_sae: int) -> int:
            made = random_layer(config.architecture(), d_sae=d_sae)
            return sum(p.numel() for p in made.parameters())

        assert parameters(n) <= budget < parameters(n + 1)
        assert replace(layer.cfg, d_sae=n).n_parameters == parameters(n)


def test_matched_size_gives_the_papers_size() -> None:
    budget = transcoder_parameters(768, 768, 24_576)
    assert MxDConfig.matched_size(budget, d_in=768, d_out=768, d_hidden=3_072) in range(21_490, 21_505)
    assert matched_n_experts(768, 768, 3_072, 24_576) == 24_576 - 3_072


def test_every_layer_describes_itself(layer: Any) -> None:
    assert layer.formula()[-1].startswith("y = ")
    assert layer.title != "A transcoder"
    assert layer.about
    (values,) = layer.singular_values([torch.tensor([3, 5])])
    for n, of_n in zip((3, 5), values, strict=True):
        torch.testing.assert_close(of_n[:1], torch.linalg.svdvals(layer.expert_weight(n))[:1])


def test_a_layer_that_computes_something_else_does_not_inherit_what_its_parent_says() -> None:
    class Squared(MxD):
        def hidden(self, x: torch.Tensor) -> torch.Tensor:
            return super().hidden(x) ** 2

    class Cosine(TopKTranscoder):
        def expert_input(self, x: torch.Tensor) -> torch.Tensor:
            return x[..., :5].cos()

    class Renamed(SkipMxD):
        title = "Another name"

    squared = Squared(MxDConfig(**settings_of("mxd")))
    with pytest.raises(NotImplementedError, match=r"Squared .* does not say its formula"):
        squared.formula()
    assert squared.expert_weight(0).shape == (6, 5)  # still D diag(c_n), of another z
    cosine = Cosine(TopKTranscoderConfig(**WIDTHS))
    for says in (cosine.formula, cosine.expert_weight):
        with pytest.raises(NotImplementedError, match=r"Cosine .* does not say its"):
            says(*[0] * (says == cosine.expert_weight))
    assert Renamed.formula is SkipMxD.formula


def test_singular_values_follow_a_weight_that_a_subclass_defines() -> None:
    class Twice(MxD):
        def expert_weight(self, n: int) -> torch.Tensor:
            return 2 * super().expert_weight(n)

    layer = Twice(MxDConfig(**settings_of("mxd")))
    with torch.no_grad():
        layer.W_out.normal_()
    (values,) = layer.singular_values([torch.tensor([1])])
    torch.testing.assert_close(values[0], torch.linalg.svdvals(2 * layer.W_out * layer.W_dec[1]))


def test_only_a_layer_whose_output_depends_on_its_input_needs_one_to_decode(layer: Any) -> None:
    one_each = torch.eye(24, dtype=torch.float64)
    if layer.decode_needs_input:
        with pytest.raises(ValueError, match="no encode is waiting"):
            layer.decode(one_each)
    else:
        torch.testing.assert_close(layer.decode(one_each), layer.W_dec + layer.b_dec)
    needs = {"skip", "mxd", "molt"}
    assert layer.decode_needs_input == any(part in layer.cfg.architecture() for part in needs)


@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_saelens_idiom_decodes_what_encode_with_hidden_pre_returned(name: str) -> None:
    _, _, layer_class, config_class = ARCHITECTURES[name]
    layer = layer_class(config_class(**WIDTHS | sizes_of(config_class)))
    torch.nn.init.normal_(layer.W_dec)
    torch.testing.assert_close(layer.decode(layer.encode_with_hidden_pre(X)[0]), layer(X))


def test_an_encode_that_nobody_will_decode_does_not_wait() -> None:
    layer = random_layer("mxd")
    layer.encode(X.clone())  # neither its input nor what it returned is alive
    edited = layer.encode(X) * 2
    torch.testing.assert_close(layer.decode(edited), layer.decode(edited, X))
    other = X.clone()
    kept = layer.encode(other)
    edited = layer.encode(X) * 2
    with pytest.raises(ValueError, match="more than one encode"):
        layer.decode(edited)
    del other, kept
    torch.testing.assert_close(layer.decode(edited), layer.decode(edited, X))
