"""The MxD against its formula, computed another way: explicit sums in float64."""

import pytest
import torch
from sae_lens import SkipTranscoder, Transcoder
from sae_lens.saes.sae import TrainStepInput

from mxd_lens import MxD, MxDConfig, TrainingMxD, TrainingMxDConfig, matched_n_experts
from mxd_lens.architectures.mxd import HIDDEN_ACTIVATIONS

D_IN, D_OUT, D_HIDDEN, N, K = 7, 5, 11, 13, 4


def random_mxd(gated: bool = False, activation: str = "gelu", k: int | None = K) -> MxD:
    mxd = MxD(
        MxDConfig(
            d_in=D_IN,
            d_out=D_OUT,
            d_sae=N,
            d_hidden=D_HIDDEN,
            k=k,
            gated=gated,
            hidden_activation=activation,
            dtype="float64",
        )
    )
    torch.manual_seed(0)
    for parameter in mxd.parameters():
        torch.nn.init.normal_(parameter)
    return mxd.requires_grad_(False)


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(6, D_IN, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def gate_and_hidden(mxd: MxD, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """a and z of every token, from the parameters alone, one number at a time where it matters."""
    pre = torch.einsum("bi,in->bn", x, mxd.W_enc) + mxd.b_enc
    a = torch.zeros_like(pre)
    for row, out in zip(pre, a, strict=True):
        for n in sorted(range(N), key=lambda n: -row[n])[: mxd.cfg.k or N]:
            out[n] = max(row[n], 0.0)
    phi = {
        "identity": lambda u: u,
        "relu": lambda u: u.clamp(min=0),
        "gelu": lambda u: u * 0.5 * (1 + torch.erf(u / 2**0.5)),
        "gelu_pytorch_tanh": lambda u: (
            0.5 * u * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (u + 0.044715 * u**3)))
        ),
        "sigmoid": lambda u: 1 / (1 + torch.exp(-u)),
        "silu": lambda u: u / (1 + torch.exp(-u)),
    }[mxd.cfg.hidden_activation]
    linear = torch.einsum("bi,ih->bh", x, mxd.W_hidden) + mxd.b_hidden
    if not mxd.cfg.gated:
        return a, phi(linear)
    return a, phi(torch.einsum("bi,ih->bh", x, mxd.W_hidden_gate) + mxd.b_hidden_gate) * linear


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", HIDDEN_ACTIVATIONS)
@pytest.mark.parametrize("k", [1, K, N, None])
def test_forward_is_the_explicit_sum_over_experts(gated, activation, k, x):
    mxd = random_mxd(gated, activation, k)
    a, z = gate_and_hidden(mxd, x)
    y = mxd.b_dec.expand(len(x), D_OUT).clone()
    for n in range(N):
        W_n = mxd.W_out @ torch.diag(mxd.W_dec[n])
        y += a[:, n : n + 1] * (z @ W_n)
    torch.testing.assert_close(mxd(x), y, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("gated", [False, True])
def test_forward_is_the_khatri_rao_and_the_two_mode_product(gated, x):
    mxd = random_mxd(gated)
    a, z = gate_and_hidden(mxd, x)
    # W_(3) = (C ⊙ D)^T, the columnwise Khatri-Rao product, times the Kronecker product of a and z.
    unfolded = torch.stack(
        [torch.kron(mxd.W_dec[:, o].contiguous(), mxd.W_out[:, o].contiguous()) for o in range(D_OUT)]
    )
    khatri_rao = torch.stack([unfolded @ torch.kron(a_t, z_t) for a_t, z_t in zip(a, z, strict=True)])
    W = torch.stack([mxd.expert_weight(n) for n in range(N)])
    two_mode = torch.einsum("nho,bn,bh->bo", W, a, z)
    for product in (khatri_rao, two_mode):
        torch.testing.assert_close(mxd(x), product + mxd.b_dec, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rank", [1, 3, 5])
def test_every_expert_has_the_rank_of_D(rank):
    mxd = random_mxd()
    mxd.W_out.copy_(
        torch.randn(D_HIDDEN, rank, dtype=torch.float64) @ torch.randn(rank, D_OUT, dtype=torch.float64)
    )
    assert torch.linalg.matrix_rank(mxd.W_out) == rank
    assert all(torch.linalg.matrix_rank(mxd.expert_weight(n)) == rank for n in range(N))


def test_expert_weight_refuses_what_is_not_there():
    mxd = random_mxd()
    for n in (-1, N):
        with pytest.raises(IndexError, match=f"expert {n} does not exist: there are {N}"):
            mxd.expert_weight(n)


def mlp_as_mxd(mlp, activation: str) -> MxD:
    """A gated MLP as an MxD of one expert with c = 1 and a = 1."""
    d_model, d_mlp = mlp.W_in.shape
    mxd = MxD(
        MxDConfig(
            d_in=d_model,
            d_out=d_model,
            d_sae=1,
            d_hidden=d_mlp,
            k=1,
            gated=True,
            hidden_activation=activation,
        )
    ).requires_grad_(False)
    for ours, theirs in (
        ("W_hidden_gate", mlp.W_gate),
        ("W_hidden", mlp.W_in),
        ("b_hidden", mlp.b_in),
        ("W_out", mlp.W_out),
        ("b_dec", mlp.b_out),
    ):
        getattr(mxd, ours).copy_(theirs)
    mxd.W_enc.zero_()
    mxd.b_enc.fill_(1.0)
    mxd.W_dec.fill_(1.0)
    return mxd


def test_one_expert_is_the_models_own_mlp(tiny_model):
    _, cache = tiny_model.run_with_cache("the cat sat on the mat")
    mxd = mlp_as_mxd(tiny_model.blocks[1].mlp, "silu")
    y = cache["blocks.1.hook_mlp_out"]
    torch.testing.assert_close(mxd(cache["blocks.1.mlp.hook_in"]), y, rtol=1e-5, atol=1e-6)


@pytest.mark.real_model
def test_one_expert_is_smollm2s_own_layer_12(smollm2):
    _, cache = smollm2.run_with_cache(
        "Mixtures of decoders are exact where they should be.", stop_at_layer=13
    )
    mxd = mlp_as_mxd(smollm2.blocks[12].mlp, "silu")
    y = cache["blocks.12.hook_mlp_out"]
    assert (mxd(cache["blocks.12.mlp.hook_in"]) - y).norm() <= 1e-5 * y.norm()


def test_it_is_a_transcoder_and_its_names_are_saelens():
    mxd = random_mxd(gated=True)
    assert isinstance(mxd, Transcoder)
    assert not isinstance(mxd, SkipTranscoder)
    shapes = {name: tuple(p.shape) for name, p in mxd.named_parameters()}
    assert shapes == {
        "W_enc": (D_IN, N),
        "b_enc": (N,),
        "W_dec": (N, D_OUT),
        "b_dec": (D_OUT,),
        "W_hidden": (D_IN, D_HIDDEN),
        "b_hidden": (D_HIDDEN,),
        "W_hidden_gate": (D_IN, D_HIDDEN),
        "b_hidden_gate": (D_HIDDEN,),
        "W_out": (D_HIDDEN, D_OUT),
    }


def test_hook_points_carry_what_their_names_say(x):
    mxd = random_mxd(gated=True)
    _, cache = mxd.run_with_cache(x)
    a, z = gate_and_hidden(mxd, x)
    expected = {
        "hook_sae_input": x,
        "hook_sae_acts_post": a,
        "hook_hidden_pre": x @ mxd.W_hidden_gate + mxd.b_hidden_gate,
        "hook_hidden_linear": x @ mxd.W_hidden + mxd.b_hidden,
        "hook_hidden_post": z,
        "hook_decoder_out": z @ mxd.W_out,
        "hook_expert_out": (a @ mxd.W_dec) * (z @ mxd.W_out),
        "hook_sae_recons": mxd(x),
        "hook_sae_output": mxd(x),
    }
    for name, value in expected.items():
        torch.testing.assert_close(cache[name], value)


@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (2, 1, 3)])
def test_any_leading_shape(shape):
    mxd = random_mxd()
    x = torch.randn(*shape, D_IN, dtype=torch.float64)
    assert mxd.encode(x).shape == (*shape, N)
    torch.testing.assert_close(mxd(x).reshape(-1, D_OUT), mxd(x.reshape(-1, D_IN)))


# Decoding knows its input


def test_an_unedited_a_always_decodes_with_its_own_input(x):
    mxd = random_mxd()
    x1, x2 = x, -2 * x
    a1 = mxd.encode(x1)
    a2 = mxd.encode(x2)
    torch.testing.assert_close(mxd.decode(a1), mxd(x1))
    torch.testing.assert_close(mxd.decode(a2), mxd(x2))
    torch.testing.assert_close(mxd.decode(a1), mxd(x1))


def test_passing_x_is_always_right(x):
    mxd = random_mxd()
    a = mxd.encode(x)
    mxd.encode(-x)
    torch.testing.assert_close(mxd.decode(a.clone(), x), mxd(x))


def test_an_edited_copy_belongs_to_the_encode_that_waits(x):
    mxd = random_mxd()
    a = mxd.encode(x) * 2
    torch.testing.assert_close(mxd.decode(a), mxd.decode(a, x))


def test_editing_in_a_hook_works_in_place_and_not(x):
    mxd = random_mxd()
    expected = mxd.decode(2 * mxd.encode(x), x)

    def double(a, hook):
        return 2 * a

    def double_in_place(a, hook):
        a.mul_(2)

    for hook in (double, double_in_place):
        mxd.encode(x + 1)  # an encode nobody decodes is no obstacle
        y = mxd.run_with_hooks(x, fwd_hooks=[("hook_sae_acts_post", hook)])
        torch.testing.assert_close(y, expected)


def test_decode_refuses_what_was_not_encoded(x):
    mxd = random_mxd()
    a = torch.rand(len(x), N, dtype=torch.float64)
    with pytest.raises(ValueError, match="no encode is waiting"):
        mxd.decode(a)
    mxd.encode(x)
    with pytest.raises(ValueError, match="do not belong to an input"):
        mxd.decode(a[:2])
    mxd.decode(mxd.encode(x))
    with pytest.raises(ValueError, match="no encode is waiting"):
        mxd.decode(a)


def test_decode_refuses_an_edited_copy_where_two_inputs_are_possible(x):
    mxd = random_mxd()
    a = mxd.encode(x)
    x2 = x + 1
    mxd.encode(x2)
    with pytest.raises(ValueError, match="more than one encode"):
        mxd.decode(a * 2)


def test_nothing_stays_alive_after_use():
    import gc
    import weakref

    mxd = random_mxd().requires_grad_(True)
    x = torch.randn(3, D_IN, dtype=torch.float64)
    a = mxd.encode(x)
    y = mxd.decode(a)
    references = [weakref.ref(tensor) for tensor in (x, a, y)]
    del x, a, y
    gc.collect()
    assert [reference() for reference in references] == [None, None, None]


def test_gradients_flow_to_the_input_and_every_parameter(x):
    mxd = random_mxd(gated=True).requires_grad_(True)
    x.requires_grad_()
    torch.autograd.gradcheck(lambda x: mxd.decode(mxd.encode(x)), (x,))
    mxd(x).pow(2).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in mxd.parameters())


# Training


def training_mxd(**changes) -> TrainingMxD:
    settings = {"d_in": D_IN, "d_out": D_OUT, "d_sae": N, "d_hidden": D_HIDDEN, "k": K} | changes
    torch.manual_seed(0)
    return TrainingMxD(TrainingMxDConfig(**settings))


def step_input(pairs: torch.Tensor, **coefficients: float) -> TrainStepInput:
    return TrainStepInput(
        sae_in=pairs,
        coefficients=coefficients,
        dead_neuron_mask=None,
        n_training_steps=0,
        is_logging_step=False,
    )


def test_at_the_start_the_output_is_b():
    sae = training_mxd()
    x = torch.randn(4, D_IN)
    assert torch.equal(sae(x), sae.b_dec.expand(4, D_OUT))
    torch.testing.assert_close(sae.W_dec.norm(dim=-1), torch.ones(N))
    assert sae.W_enc.abs().max() <= D_IN**-0.5
    assert sae.W_out.abs().max() == 0


@pytest.mark.parametrize("k", [K, None])
def test_the_training_step_is_the_papers_loss(k):
    sae = training_mxd(k=k, l1_coefficient=0.0 if k else 0.3, dtype="float64")
    torch.nn.init.normal_(sae.W_out)
    pairs = torch.randn(8, D_IN + D_OUT, dtype=torch.float64)
    output = sae.training_forward_pass(step_input(pairs, **({} if k else {"l1": 0.3})))
    x, y = pairs[:, :D_IN], pairs[:, D_IN:]
    y_hat = sae(x)
    loss = ((y_hat - y) ** 2 / y.norm(dim=-1, keepdim=True)).mean()
    a = sae.encode(x)
    torch.testing.assert_close(output.losses["mse_loss"], loss, rtol=1e-12, atol=0)
    if k is None:
        torch.testing.assert_close(output.losses["l1_loss"], 0.3 * a.sum(-1).mean())
        loss = loss + 0.3 * a.sum(-1).mean()
    torch.testing.assert_close(output.loss, loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(output.sae_out, y_hat)
    assert torch.equal(output.sae_in, y)
    torch.testing.assert_close(output.feature_acts.to_dense(), a)


def test_gradients_are_those_of_the_dense_formula_but_for_the_parallel_part():
    sae = training_mxd(dtype="float64")
    torch.nn.init.normal_(sae.W_out)
    pairs = torch.randn(8, D_IN + D_OUT, dtype=torch.float64)
    sae.training_forward_pass(step_input(pairs)).loss.backward()
    ours = {name: p.grad.clone() for name, p in sae.named_parameters()}
    sae.zero_grad()
    x, y = pairs[:, :D_IN], pairs[:, D_IN:]
    ((sae.decode(sae.encode(x), x) - y) ** 2 / y.norm(dim=-1, keepdim=True)).mean().backward()
    C, theirs = sae.W_dec.detach(), {name: p.grad for name, p in sae.named_parameters()}
    theirs["W_dec"] = theirs["W_dec"] - (theirs["W_dec"] * C).sum(-1, keepdim=True) * C
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-9, atol=1e-12)


def test_rows_of_C_are_normalised_before_every_step():
    sae = training_mxd()
    sae.W_dec.data.mul_(3)
    sae.training_forward_pass(step_input(torch.randn(8, D_IN + D_OUT)))
    torch.testing.assert_close(sae.W_dec.norm(dim=-1), torch.ones(N))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_before_the_gradient(bad):
    sae = training_mxd()
    pairs = torch.randn(8, D_IN + D_OUT)
    pairs[3, 2] = bad
    with pytest.raises(FloatingPointError, match="the loss is"):
        sae.training_forward_pass(step_input(pairs))


def test_pairs_of_another_width_are_refused():
    with pytest.raises(ValueError, match=r"d_in \+ d_out = 7 \+ 5, got \(8, 7\)"):
        training_mxd().training_forward_pass(step_input(torch.randn(8, D_IN)))


# Configs


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": 0}, "k must be a positive integer"),
        ({"k": N + 1}, "k must be at most d_sae"),
        ({"k": 2.0}, "k must be a positive integer"),
        ({"d_in": 0}, "d_in must be a positive integer"),
        ({"d_hidden": -3}, "d_hidden must be a positive integer"),
        ({"hidden_activation": "swish"}, "hidden_activation must be one of .*got 'swish'"),
        ({"apply_b_dec_to_input": True}, "apply_b_dec_to_input"),
        ({"normalize_activations": "layer_norm"}, "normalize_activations must be 'none'"),
        ({"reshape_activations": "hook_z"}, "reshape_activations must be 'none'"),
    ],
)
@pytest.mark.parametrize("config", [MxDConfig, TrainingMxDConfig])
def test_a_config_that_cannot_be_is_refused(config, changes, message):
    settings = {"d_in": D_IN, "d_out": D_OUT, "d_sae": N, "d_hidden": D_HIDDEN, "k": K} | changes
    with pytest.raises(ValueError, match=message):
        config(**settings)


def test_relu_sparsity_needs_its_penalty():
    with pytest.raises(ValueError, match="l1_coefficient must be positive where k is None"):
        training_mxd(k=None)
    with pytest.raises(ValueError, match="decoder_init_norm must be None"):
        training_mxd(decoder_init_norm=0.1)


def n_parameters(config: MxDConfig) -> int:
    return sum(p.numel() for p in MxD(config).parameters())


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("d_in", "d_out", "d_hidden", "width"), [(12, 9, 20, 100), (8, 8, 32, 256)])
def test_matched_n_experts_spends_the_transcoders_parameters(d_in, d_out, d_hidden, width, gated):
    n = matched_n_experts(d_in, d_out, d_hidden, width, gated)
    config = MxDConfig(d_in=d_in, d_out=d_out, d_sae=n, d_hidden=d_hidden, k=2, gated=gated)
    transcoder = width * (d_in + d_out + 1) + d_out
    left = transcoder - n_parameters(config)
    assert 0 <= left < d_in + d_out + 1


def test_matched_n_experts_refuses_a_branch_too_wide():
    with pytest.raises(ValueError, match="with one expert has 569 parameters, and 552 are allowed"):
        matched_n_experts(8, 8, 32, 32)


def test_fold_W_dec_norm_is_exact_or_refused():
    relu = random_mxd(k=None)
    x = torch.randn(4, D_IN, dtype=torch.float64)
    y = relu(x)
    relu.fold_W_dec_norm()
    torch.testing.assert_close(relu(x), y)
    topk = random_mxd()
    with pytest.raises(NotImplementedError, match="which k = 4 experts are chosen"):
        topk.fold_W_dec_norm()
    topk.normalize_decoder()
    y = topk(x)
    topk.fold_W_dec_norm()
    assert torch.equal(topk(x), y)


def test_active_experts_are_those_of_encode(x):
    mxd = random_mxd()
    values, indices = mxd.active_experts(x)
    torch.testing.assert_close(torch.zeros(len(x), N).double().scatter(-1, indices, values), mxd.encode(x))
    relu = random_mxd(k=None)
    values, indices = relu.active_experts(x)
    torch.testing.assert_close(torch.zeros(len(x), N).double().scatter(-1, indices, values), relu.encode(x))
