"""Training and evaluating many layers fast on one GPU: the project's layers, loss and step, and no runner.

The activations of whole texts stay in the device's memory. A training step is the layer's own
`training_forward_pass`, its gradient clipped to norm 1 and Adam, as SAELens' trainer makes it; on a GPU it is
captured once as a CUDA graph and replayed, which takes the time that the kernels take: 2 ms where the same
step issued kernel by kernel takes 4.5 ms on an H200.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from sae_lens.saes.sae import TrainStepInput
from torch import Tensor
from torch.nn import functional as F

from mxd_lens.architectures import ARCHITECTURES
from mxd_lens.architectures.base import PairedTranscoder, transcoder_parameters
from mxd_lens.training.standardizer import Standardizer

Replacement = Callable[[Tensor, Tensor], Tensor]
"""What to put in the place of an MLP's output, from its input and output without the BOS position."""


class LanguageModel:
    """A Llama of transformers, with access to what its MLPs read and write."""

    def __init__(self, folder: Path, device: str) -> None:
        from transformers import AutoModelForCausalLM

        self.device = device
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.model = model.to(device).eval().requires_grad_(False)
        self.d_model: int = self.model.config.hidden_size
        self.n_blocks: int = self.model.config.num_hidden_layers
        self._layers = self.model.model.layers

    @torch.no_grad()
    def activations(
        self, tokens: Int[Tensor, "sequences positions"], blocks: Sequence[int]
    ) -> dict[int, Float[Tensor, "sequences positions_but_bos two_d_model"]]:
        """[x | y] of every block's MLP, without the BOS position."""
        found: dict[int, Tensor] = {}

        def keep(block: int) -> Callable[..., None]:
            def hook(_: Any, given: tuple[Tensor], y: Tensor) -> None:
                found[block] = torch.cat([given[0], y], dim=-1)[:, 1:]

            return hook

        with ExitStack() as hooks:
            for block in blocks:
                hooks.enter_context(self._layers[block].mlp.register_forward_hook(keep(block)))
            # The blocks above the last one wanted are not run.
            self.model.model.layers = self._layers[: max(blocks) + 1]
            hooks.callback(setattr, self.model.model, "layers", self._layers)
            self.model.model(tokens.to(self.device).long(), use_cache=False)
        return found

    @contextmanager
    def replaced(self, replacements: Mapping[int, Replacement]) -> Iterator[None]:
        """MLP outputs replaced at every position but BOS."""

        def hook_of(replacement: Replacement) -> Callable[..., Tensor]:
            def hook(_: Any, given: tuple[Tensor], y: Tensor) -> Tensor:
                return torch.cat([y[:, :1], replacement(given[0][:, 1:], y[:, 1:])], dim=1)

            return hook

        with ExitStack() as hooks:
            for block, replacement in replacements.items():
                hooks.enter_context(self._layers[block].mlp.register_forward_hook(hook_of(replacement)))
            yield

    def logits(self, tokens: Int[Tensor, "sequences positions"]) -> Float[Tensor, "sequences positions v"]:
        """Of the positions after BOS that have a next token."""
        hidden = self.model.model(tokens.to(self.device).long(), use_cache=False).last_hidden_state
        return self.model.lm_head(hidden[:, 1:-1])


@torch.no_grad()
def capture(
    lm: LanguageModel, tokens: Int[Tensor, "sequences positions"], blocks: Sequence[int], batch: int = 512
) -> dict[int, Float[Tensor, "tokens two_d_model"]]:
    """[x | y] of many sequences in bfloat16 on the model's device, one row for each token but BOS."""
    n = len(tokens) * (tokens.shape[1] - 1)
    rows = {b: torch.empty(n, 2 * lm.d_model, dtype=torch.bfloat16, device=lm.device) for b in blocks}
    done = 0
    for part in tokens.split(batch):
        for block, pairs in lm.activations(part, blocks).items():
            rows[block][done : done + pairs.shape[0] * pairs.shape[1]] = pairs.flatten(0, 1)
        done += len(part) * (tokens.shape[1] - 1)
    return rows


def new_layer(
    architecture: str,
    d_model: int,
    width: int,
    k: int,
    seed: int,
    device: str,
    settings: Mapping[str, Any] | None = None,
    attributes: Mapping[str, Any] | None = None,
) -> PairedTranscoder:
    """A layer in training, of at most the parameters of a transcoder of `width` features.

    Args:
        architecture, settings: its name, and its configuration's further fields.
        attributes: set on the layer, to try what is no setting (unit_rows).
    """
    _, config, training, training_config = ARCHITECTURES[architecture]
    widths = {"d_in": d_model, "d_out": d_model, **(settings or {})}
    d_sae = config.matched_size(transcoder_parameters(d_model, d_model, width), **widths)
    torch.manual_seed(seed)
    layer = training(training_config(d_sae=d_sae, k=k, **widths))
    for name, value in (attributes or {}).items():
        setattr(layer, name, value)
    return layer.to(device)


class TrainingRun:
    """A layer in training on batches of pairs [x | y], standardised as `Standardizer` does."""

    def __init__(
        self,
        layer: Any,
        first: Float[Tensor, "batch two_d_model"],
        lr: float,
        steps: int,
        warm_up: int,
        decay: int,
        pool: Any = None,
    ) -> None:
        """Args:
        layer: on its device.
        first: the first batch, from which the scale of the activations is taken.
        lr, steps, warm_up, decay: the learning rate, its linear warm-up and its linear decay to 0 at the end.
        pool: a memory pool that graphs share which never run at the same time.
        """
        self.layer, self.lr, self.steps, self.warm_up, self.decay = layer, lr, steps, warm_up, decay
        self.scaler = Standardizer(layer)
        self.scaler.estimate(first.float())
        self.batch = first.clone()
        on_gpu = first.is_cuda
        rate = torch.zeros((), device=first.device) if on_gpu else 0.0
        self.optimizer: Any = torch.optim.Adam(layer.parameters(), lr=rate, fused=on_gpu, capturable=on_gpu)
        self.done = 0
        self.errors = torch.zeros(steps, device=first.device)
        self.error = torch.zeros((), device=first.device)
        self.graph: Any = None
        if on_gpu:
            try:
                self._capture(pool)
            except RuntimeError as e:
                print(f"not captured, runs kernel by kernel: {e}", flush=True)
                self.graph = None

    def _one_step(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        step = self.layer.training_forward_pass(
            TrainStepInput(
                sae_in=self.scaler.scale(self.batch.float()),
                coefficients={},
                dead_neuron_mask=None,
                n_training_steps=0,
                is_logging_step=False,
            )
        )
        step.loss.backward()
        torch.nn.utils.clip_grad_norm_(self.layer.parameters(), 1.0)
        self.optimizer.step()
        self.error.copy_(step.metrics["normalized_mse"])

    def _capture(self, pool: Any) -> None:
        before = [p.detach().clone() for p in self.layer.parameters()]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # warms up, at learning rate 0
            for _ in range(2):
                self._one_step()
        torch.cuda.current_stream().wait_stream(stream)
        with torch.no_grad():
            for parameter, value in zip(self.layer.parameters(), before, strict=True):
                parameter.copy_(value)
            for state in self.optimizer.state.values():
                for tensor in state.values():
                    tensor.zero_()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, pool=pool):
            self._one_step()

    def rate(self) -> float:
        """The learning rate of the next step."""
        warm = min(1.0, (self.done + 1) / max(1, self.warm_up))
        return self.lr * warm * min(1.0, (self.steps - self.done) / max(1, self.decay))

    def step(self, rows: Float[Tensor, "tokens two_d_model"], chosen: Int[Tensor, " batch"]) -> None:
        """One step on the rows chosen."""
        torch.index_select(rows, 0, chosen, out=self.batch)
        rate, group = self.rate(), self.optimizer.param_groups[0]
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
        if self.graph is None:
            self._one_step()
        else:
            self.graph.replay()
        self.errors[self.done] = self.error
        self.done += 1

    def finish(self) -> Any:
        """The trained layer, for activations as they are.

        Raises:
            FloatingPointError: the loss was not finite at some step.
        """
        bad = (~self.errors[: self.done].isfinite()).nonzero()
        if len(bad):
            raise FloatingPointError(f"The loss is not finite from step {int(bad[0])} on.")
        self.graph = None
        self.optimizer = None
        self.layer.normalize_decoder()
        self.scaler.fold(self.layer)
        for parameter in self.layer.parameters():
            parameter.grad = None
        return self.layer.eval().requires_grad_(False)


def order(n_rows: int, batch: int, steps: int, device: str, seed: int = 0) -> Iterator[Tensor]:
    """The rows of every step: epoch after epoch, each shuffled anew; the same for every layer."""
    generator = torch.Generator().manual_seed(seed)
    left = torch.empty(0, dtype=torch.long, device=device)
    for _ in range(steps):
        if len(left) < batch:
            left = torch.cat([left, torch.randperm(n_rows, generator=generator).to(device)])
        yield left[:batch]
        left = left[batch:]


def train(
    layer: Any, rows: Float[Tensor, "tokens two_d_model"], lr: float, tokens: int, batch: int, seed: int = 0
) -> tuple[Any, dict[str, Any]]:
    """Trains one layer with the frontier's schedule: a 20th of the steps warm-up, the last half decay.

    Returns:
        The layer, and its seconds and training curve.
    """
    steps = tokens // batch
    indices = list(order(len(rows), batch, steps, str(rows.device), seed))
    start = time.perf_counter()
    run = TrainingRun(layer, rows[indices[0]], lr, steps, max(1, steps // 20), steps // 2)
    for chosen in indices:
        run.step(rows, chosen)
    curve = run.errors.cpu()
    seconds = time.perf_counter() - start
    every = max(1, steps // 60)
    return run.finish(), {
        "seconds": round(seconds, 2),
        "steps": steps,
        "curve": [round(float(part.mean()), 4) for part in curve.split(every)],
    }


def per_sequence(values: Float[Tensor, "sequences positions"]) -> list[float]:
    """The mean of each sequence, to five digits."""
    return [float(f"{v:.5g}") for v in values.double().mean(1).tolist()]


class Evaluation:
    """A held-out text, the unmodified model's predictions on it, and its activations at some blocks."""

    def __init__(
        self,
        lm: LanguageModel,
        tokens: Int[Tensor, "sequences positions"],
        blocks: Sequence[int],
        batch: int = 66,
    ) -> None:
        self.lm, self.tokens, self.batch = lm, tokens, batch
        self.pairs = {
            b: torch.cat([lm.activations(part, [b])[b] for part in tokens.split(batch)]) for b in blocks
        }
        with torch.no_grad():
            self.log_p = [F.log_softmax(lm.logits(part), dim=-1) for part in tokens.split(batch)]
        self.loss = self._losses(self.log_p)

    def _losses(self, log_p: Sequence[Tensor]) -> Float[Tensor, "sequences predictions"]:
        targets = self.tokens[:, 2:].to(self.lm.device).long()
        return -torch.cat(
            [
                p.gather(-1, t[..., None])[..., 0]
                for p, t in zip(log_p, targets.split(self.batch), strict=True)
            ]
        )

    @torch.no_grad()
    def predictions(self, replacements: Mapping[int, Replacement]) -> dict[str, Tensor]:
        """Cross-entropy, KL from the unmodified model and top-1 agreement, [sequences, predictions] each."""
        losses: list[Tensor] = []
        divergence, agreement = [], []
        with self.lm.replaced(replacements):
            for part, unmodified in zip(self.tokens.split(self.batch), self.log_p, strict=True):
                q = F.log_softmax(self.lm.logits(part), dim=-1)
                divergence.append((unmodified.exp() * (unmodified - q)).sum(-1))
                agreement.append((q.argmax(-1) == unmodified.argmax(-1)).float())
                targets = self.tokens[len(losses) * self.batch :][: len(part), 2:].to(q.device).long()
                losses.append(-q.gather(-1, targets[..., None])[..., 0])
        return {"ce": torch.cat(losses), "kl": torch.cat(divergence), "top1": torch.cat(agreement)}

    @torch.no_grad()
    def layer(self, sae: Any, block: int, with_model: bool = True) -> dict[str, Any]:
        """What is measured of one layer; errors and losses as means of each sequence."""
        pairs = self.pairs[block].float()
        x, y = pairs.split([sae.cfg.d_in, sae.cfg.d_out], dim=-1)
        norm = y.pow(2).sum(-1).clamp_min(1e-12)
        mixtures, fired = [], torch.zeros(sae.cfg.d_sae, device=x.device)
        active = 0
        for part in x.split(32):
            a = sae.coefficients(part)
            mixtures.append(sae.mixture(a))
            values, experts = a.active()
            fired.index_add_(0, experts[values > 0].flatten(), torch.ones_like(values[values > 0]))
            active += int((values > 0).sum())
        mean = torch.cat([m.flatten(0, 1) for m in mixtures]).mean(0)

        def error(exchange: Callable[[Tensor], Tensor]) -> Tensor:
            parts = zip(mixtures, x.split(32), strict=True)
            out = torch.cat([sae.output(exchange(m), part) for m, part in parts])
            return (out - y).pow(2).sum(-1) / norm

        replaced = error(lambda m: m)
        found = {
            "nmse": per_sequence(replaced),
            "nmse_median": float(replaced.median()),
            "mean_gate": per_sequence(error(lambda m: mean.expand_as(m))),
            "shuffled_gate": per_sequence(error(lambda m: m.roll(m.shape[1] // 2, 1))),
            "l0": active / x[..., 0].numel(),
            "silent": float((fired == 0).float().mean()),
            "always_on": int((fired > 0.5 * x[..., 0].numel()).sum()),
        }
        if with_model:
            predictions = self.predictions(
                {block: lambda x, _: sae.output(sae.mixture(sae.coefficients(x)), x)}
            )
            found |= {name: per_sequence(values) for name, values in predictions.items()}
        return found


@torch.no_grad()
def usage(
    sae: Any, x: Float[Tensor, "tokens d_in"], chunk: int = 4096
) -> tuple[Float[Tensor, "d_sae d_out"], Float[Tensor, " d_sae"], Float[Tensor, " d_sae"]]:
    """Each expert's mean direction, what it writes in all (sum of norms), and how often it fires.

    The mean direction is that of `mxd_lens.evals.stability`: sum_t a_n u_n / sum_t a_n, u_n what a
    coefficient of 1 writes.
    """
    written = torch.zeros(sae.cfg.d_sae, sae.cfg.d_out, device=x.device)
    mass, fired, total = (torch.zeros(sae.cfg.d_sae, device=x.device) for _ in range(3))
    for part in x.split(chunk):
        values, experts = sae.coefficients(part).active()
        at = sae.expert_input(part)
        for slot in range(values.shape[1]):
            a, n = values[:, slot], experts[:, slot]
            out = sae.written_by(n[:, None], at).squeeze(1) * a[:, None]
            written.index_add_(0, n, out)
            mass.index_add_(0, n, out.norm(dim=-1))
            total.index_add_(0, n, a)
            fired.index_add_(0, n, (a > 0).float())
    return F.normalize(written / total.clamp_min(1e-12)[:, None], dim=-1), mass, fired


def greedy_matching(similarity: Float[Tensor, "n m"]) -> tuple[Int[Tensor, " n"], Float[Tensor, " n"]]:
    """Pairs rows and columns, the most similar first; -1 and NaN for a row without a partner.

    Rows and columns that are each other's best are paired together: the same pairs as one at a time.
    """
    left = similarity.clone()
    partner = torch.full((len(left),), -1, device=left.device)
    found = torch.full((len(left),), torch.nan, device=left.device)
    for _ in range(min(left.shape)):
        best, column = left.max(1)
        row = left.max(0).indices
        mutual = ((row[column] == torch.arange(len(left), device=left.device)) & (best > -2)).nonzero()[:, 0]
        if not len(mutual):
            break
        partner[mutual], found[mutual] = column[mutual], best[mutual]
        left[mutual] = -3.0
        left[:, column[mutual]] = -3.0
    return partner, found


def found_again(
    one: tuple[Tensor, Tensor, Tensor], other: tuple[Tensor, Tensor, Tensor], alike: float = 0.7
) -> dict[str, float]:
    """How many of the experts that fire are found again, counted, and weighted by what they write."""
    alive = [(fired > 0).nonzero()[:, 0] for _, _, fired in (one, other)]
    directions = [u[0][a] for u, a in zip((one, other), alive, strict=True)]
    _, similarity = greedy_matching(directions[0] @ directions[1].T)
    again = similarity.nan_to_num(-1) >= alike
    mass = one[1][alive[0]]
    return {
        "alive": len(alive[0]),
        "matched": float(similarity.nan_to_num(0).mean()),
        "found_again": float(again.float().mean()),
        "found_again_by_use": float((again * mass).sum() / mass.sum()),
    }
