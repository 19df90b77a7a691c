"""A faithfulness report in SAELens' names, beside which `sae_lens.evals.run_evals` puts ordinary SAEs.

`run_evals` compares a layer's output with its input, and puts it in the input's place: its numbers for
transcoders and MxDs mean nothing. `evaluate` compares with the MLP's output, and the mapping here gives its
numbers the names that SAELens' tools read. For an ordinary SAE they are the numbers of `run_evals`.
"""

from mxd_lens.evals.faithfulness import FaithfulnessReport, share


def saelens_metrics(report: FaithfulnessReport) -> dict[str, dict[str, float]]:
    """Return a report's numbers by SAELens' groups and names.

        saelens_metrics(evaluate(model, mxd, tokens))["model_performance_preservation"]["ce_loss_score"]

    Two things differ from `run_evals` where tokens are excluded: here zero ablation leaves them to the MLP,
    and a divergence is counted where a loss is, not at the last token of a sequence.

    Args:
        report: what `evaluate` measured.

    Raises:
        TypeError: it is no report.
    """
    if not isinstance(report, FaithfulnessReport):
        raise TypeError(
            "saelens_metrics takes a FaithfulnessReport: saelens_metrics(evaluate(model, sae, tokens)). "
            f"Got {type(report).__name__}."
        )
    kl, kl_ablated = report.kl_divergence, report.kl_divergence_zero_ablated
    return {
        "model_behavior_preservation": {
            "kl_div_score": share(kl_ablated - kl, kl_ablated),
            "kl_div_with_ablation": kl_ablated,
            "kl_div_with_sae": kl,
        },
        "model_performance_preservation": {
            "ce_loss_score": report.ce_loss_recovered,
            "ce_loss_with_ablation": report.ce_loss_zero_ablated,
            "ce_loss_with_sae": report.ce_loss_replaced,
            "ce_loss_without_sae": report.ce_loss,
        },
        "reconstruction_quality": {"explained_variance": 1 - report.fraction_of_variance_unexplained},
        "sparsity": {"l0": report.l0},
        "token_stats": {
            "total_tokens_eval_reconstruction": report.n_tokens,
            "total_tokens_eval_sparsity_variance": report.n_tokens,
        },
    }
