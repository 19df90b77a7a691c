"""Every MLP of a model replaced: do errors compound, and does any architecture keep its lead?

All layers of all architectures are trained together on one stream of activations. Then MLPs are replaced one
after another from either end; cross-entropy and KL are measured beside mean ablation of the same MLPs. Last,
all layers together are fine-tuned on KL to the unmodified model.

A job of `experiments.at_scale`:

    {"job": "whole", "members": {"mxd": {"architecture": "mxd", "settings": {"d_hidden": 1152}}, ...},
     "width": 9216, "k": 32, "tokens": 4194304, "batch": 4096, "counts": [0, 1, 2, ...], "sequences": 132}
    {"job": "finetune", "member": "mxd", "tokens": 100000}
"""

import time
from typing import Any

import torch
from torch.nn import functional as F

from experiments.lean import Evaluation, TrainingRun, new_layer

CHUNK = 512
"""Sequences whose activations are in memory at once, and mixed with each other."""


def run(bench: Any, job: dict[str, Any]) -> dict[str, Any]:
    """Trains all layers, and replaces MLPs from either end; the layers stay for `finetune`."""
    from experiments.at_scale import learning_rate

    lm, device, n_blocks = bench.lm, bench.device, bench.lm.n_blocks
    members, batch = job["members"], job["batch"]
    steps = job["tokens"] // batch
    lr = job.get("lr_factor", 1.0) * learning_rate(job["width"])
    found: dict[str, Any] = {"steps": steps, "lr": lr}
    pool = torch.cuda.graph_pool_handle() if device != "cpu" else None
    runs: dict[tuple[str, int], TrainingRun] = {}
    sums = torch.zeros(n_blocks, lm.d_model, device=device)
    start, lm_seconds, done, position = time.perf_counter(), 0.0, 0, 0
    generator = torch.Generator().manual_seed(0)
    seen = 0
    while done < steps:
        tokens = bench.train_tokens[position : position + job.get("chunk", CHUNK)]
        position = (position + len(tokens)) % (len(bench.train_tokens) - 1)
        before = time.perf_counter()
        parts = [lm.activations(part, range(n_blocks)) for part in tokens.split(128)]
        rows = [torch.cat([p[b].flatten(0, 1).bfloat16() for p in parts]) for b in range(n_blocks)]
        del parts
        if device != "cpu":
            torch.cuda.synchronize()
        lm_seconds += time.perf_counter() - before
        seen += len(rows[0])
        for block, of_block in enumerate(rows):
            sums[block] += of_block[:, lm.d_model :].float().sum(0)
        shuffled = torch.randperm(len(rows[0]), generator=generator).to(device)
        for chosen in shuffled[: len(shuffled) // batch * batch].split(batch):
            for block in range(n_blocks):
                for name, member in members.items():
                    key = name, block
                    if key not in runs:
                        layer = new_layer(
                            member["architecture"],
                            lm.d_model,
                            job["width"],
                            job["k"],
                            job.get("seed", 0),
                            device,
                            member.get("settings"),
                        )
                        first = rows[block][chosen]
                        runs[key] = TrainingRun(
                            layer, first, lr, steps, max(1, steps // 20), steps // 2, pool
                        )
                    runs[key].step(rows[block], chosen)
            done += 1
            if done == steps:
                break
    if device != "cpu":
        torch.cuda.synchronize()
    found["seconds_training"] = round(time.perf_counter() - start, 1)
    found["seconds_language_model"] = round(lm_seconds, 1)
    found["tokens_seen"] = seen
    print("whole: trained", found, flush=True)
    layers: dict[str, dict[int, Any]] = {name: {} for name in members}
    found["final_error"] = {name: [None] * n_blocks for name in members}
    found["failures"] = {}
    for (name, block), training in runs.items():
        try:
            layers[name][block] = training.finish()
        except FloatingPointError as e:
            found["failures"][f"{name}, block {block}"] = str(e)
        last = training.errors[-max(1, steps // 20) :].mean()
        found["final_error"][name][block] = round(float(last), 4)
    runs.clear()
    found["n_parameters"] = {
        name: sum(p.numel() for p in next(iter(of.values())).parameters()) for name, of in layers.items()
    }
    means = {block: sums[block] / seen for block in range(n_blocks)}

    texts = {name: Evaluation(lm, tokens[: job["sequences"]], []) for name, tokens in bench.held_out.items()}
    found["curves"] = curves(texts, layers, means, job["counts"], n_blocks)
    found["seconds_until_curves"] = round(time.perf_counter() - start, 1)
    print("whole: curves", found["seconds_until_curves"], flush=True)
    bench.whole_model = layers, texts
    return found


def written(layer: Any) -> Any:
    """The replacement that a layer makes."""
    return lambda x, _: layer.output(layer.mixture(layer.coefficients(x)), x)


def constant(value: torch.Tensor) -> Any:
    """The replacement that writes the same at every position."""
    return lambda _, y: value.expand_as(y)


def means_of(values: dict[str, torch.Tensor]) -> dict[str, list[float]]:
    """Of each sequence, to five digits."""
    return {
        name: [float(f"{v:.5g}") for v in value.double().mean(1).tolist()] for name, value in values.items()
    }


def curves(
    texts: dict[str, Evaluation],
    layers: dict[str, dict[int, Any]],
    means: dict[int, torch.Tensor],
    counts: list[int],
    n_blocks: int,
) -> list[dict[str, Any]]:
    """The metrics with the first or the last n blocks replaced, by each architecture and by mean ablation."""
    found: list[dict[str, Any]] = []
    replacements: dict[str, dict[int, Any]] = {
        name: {block: written(layer) for block, layer in of.items()} for name, of in layers.items()
    }
    replacements["mean ablation"] = {block: constant(mean) for block, mean in means.items()}
    for text_name, text in texts.items():
        base = {"ce": text.loss}
        found.append({"text": text_name, "member": "unmodified", "count": 0, **means_of(base)})
        for count in counts:
            for side in ("first", "last") if 0 < count < n_blocks else ("first",):
                blocks = range(count) if side == "first" else range(n_blocks - count, n_blocks)
                for member, of in replacements.items():
                    if count == 0 or not set(blocks) <= of.keys():
                        continue
                    values = text.predictions({block: of[block] for block in blocks})
                    at = {"text": text_name, "member": member, "side": side, "count": count}
                    found.append({**at, **means_of(values)})
    return found


def finetune(bench: Any, job: dict[str, Any]) -> dict[str, Any]:
    """All layers of a member together on KL to the unmodified model, through the replaced model."""
    layers, texts = bench.whole_model[0][job["member"]], bench.whole_model[1]
    lm, sequences = bench.lm, job.get("sequences", 16)
    per_step = sequences * (bench.train_tokens.shape[1] - 1)
    steps = max(1, job["tokens"] // per_step)
    parameters = [p.requires_grad_(True) for layer in layers.values() for p in layer.parameters()]
    lr = job.get("lr", 1e-4)
    optimizer = torch.optim.Adam(parameters, lr=lr, fused=bench.device != "cpu")
    replacements = {block: written(layer) for block, layer in layers.items()}
    losses = []
    for step in range(steps):
        # From the end of the text, which the layers saw last if at all.
        tokens = bench.train_tokens[-(step + 1) * sequences :][:sequences]
        optimizer.param_groups[0]["lr"] = lr * min(1.0, 2 * (steps - step) / steps)
        with torch.no_grad():
            unmodified = F.log_softmax(lm.logits(tokens), dim=-1)
        with lm.replaced(replacements):
            q = F.log_softmax(lm.logits(tokens), dim=-1)
        loss = (unmodified.exp() * (unmodified - q)).sum(-1).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        losses.append(round(loss.item(), 4))
    for parameter in parameters:
        parameter.requires_grad_(False)
        parameter.grad = None
    after = {name: means_of(text.predictions(replacements)) for name, text in texts.items()}
    summary = {
        name: {key: round(sum(v) / len(v), 4) for key, v in values.items()} for name, values in after.items()
    }
    return {
        "steps": steps,
        "tokens": steps * per_step,
        "loss": losses,
        "per_sequence": after,
        "after": summary,
    }
