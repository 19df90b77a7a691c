"""Dashboard data that no model was asked for: for pages of any size, and of any text."""

import random

from mxd_lens.dashboards.collect.data import Band, DashboardData, Excerpt, ExpertData, Neighbour, TokenEffect

TEXT = (
    "the of and to in a is that for it as was with on by this which river government music science from at "
    "language winter old small station number people against several theory light water morning between"
)
WORDS = TEXT.split()

HOSTILE = [
    "<script>document.title='owned'</script>",
    "</script><script>document.title='owned'</script>",
    "<img src=x onerror=\"document.title='owned'\">",
    "\"' onmouseover=\"document.title='owned'\" x='",
    "<!--<script>",
    "{{ 7 * 7 }}{% raw %}",
    "</textarea></style></title>",
    "javascript:document.title='owned'",
    "]]>&lt;&amp;&#60;",
    "\u202eevil\u202c",
    "\x00\x07\x1b[31m\x7f",
    "line\u2028separator\r\n",
    "${document.title='owned'}`",
]


def made_up(
    n: int = 12, d_sae: int = 60, texts: list[list[str]] | None = None, seed: int = 0
) -> DashboardData:
    """Data of n of d_sae experts; texts: the tokens of excerpts, dealt out in turn."""
    draw = random.Random(seed)
    ids = sorted(draw.sample(range(d_sae), n))
    taken = iter(texts * n * 20) if texts else None

    def excerpt() -> Excerpt:
        tokens = next(taken) if taken else [" " + draw.choice(WORDS) for _ in range(40)]
        peak = draw.randrange(len(tokens))
        fires = [i == peak or draw.random() < 0.08 for i in range(len(tokens))]
        values = [round(draw.lognormvariate(1, 0.5), 3) if f else 0.0 for f in fires]
        values[peak] = max(values) + 0.5
        effects = [draw.gauss(0.02 * (v > 0), 0.05) for v in values[:-1]] + [float("nan")]
        return Excerpt(
            tokens=tokens,
            token_ids=list(range(len(tokens))),
            values=values,
            norms=[1.7 * v for v in values],
            loss_effects=effects,
            peak=peak,
            sequence=draw.randrange(500),
            start=draw.randrange(64),
        )

    def band(name: str, low: float, high: float, n_excerpts: int) -> Band:
        return Band(name, low, high, [excerpt() for _ in range(n_excerpts)])

    def neighbours() -> list[Neighbour]:
        return [Neighbour(m, draw.uniform(-0.2, 0.9)) for m in draw.sample(range(d_sae), 5)]

    def token() -> str:
        return draw.choice(HOSTILE) if texts else " " + draw.choice(WORDS)

    def expert(n: int) -> ExpertData:
        maximum = draw.uniform(6, 20)
        counts = [int(3000 * 0.8**i * draw.uniform(0.7, 1.3)) for i in range(40)]
        return ExpertData(
            expert=n,
            density=sum(counts) / 2e6,
            n_firings=sum(counts),
            mean=maximum / 4,
            maximum=maximum,
            edges=[maximum * i / 40 for i in range(41)],
            counts=counts,
            bands=[
                band("top", maximum / 2, maximum, 10),
                *(band(f"{p}-{p + 20} %", maximum * p / 150, maximum * p / 100, 3) for p in (80, 60, 40)),
            ],
            promoted=[TokenEffect(token(), 2 - 0.15 * i, draw.uniform(0, 0.5)) for i in range(10)],
            suppressed=[TokenEffect(token(), 0.1 * i - 1.5, draw.uniform(0, 0.5)) for i in range(10)],
            singular_values=[3 / (1 + 0.02 * i) for i in range(576)],
            stable_rank=draw.uniform(20, 200),
            coactive=neighbours(),
            similar=neighbours(),
            share_of_output=draw.uniform(0, 0.01),
            loss_effect=draw.gauss(0.02, 0.02),
            coherence=draw.uniform(0, 1),
            mean_gate_share=draw.uniform(0, 0.2),
            consistency=draw.uniform(0, 0.6),
            contribution_rms=draw.uniform(0, 6),
            mean_direction=[draw.gauss(0, 1) for _ in range(8)],
        )

    experts = [expert(n) for n in ids]
    overview = {
        "density": [10 ** draw.uniform(-5, -0.5) for _ in range(d_sae)],
        "mean": [draw.lognormvariate(0.5, 0.5) for _ in range(d_sae)],
        "share_of_output": [10 ** draw.uniform(-6, -1) for _ in range(d_sae)],
        "consistency": [draw.uniform(0, 1) if draw.random() > 0.01 else float("nan") for _ in range(d_sae)],
    }
    for e in experts:
        overview["density"][e.expert], overview["mean"][e.expert] = e.density, e.mean
        overview["share_of_output"][e.expert] = e.share_of_output
    settings = {
        "model_name": "smollm2-135m-instruct",
        "hook_name": "blocks.11.mlp.hook_in",
        "hook_name_out": "blocks.11.hook_mlp_out",
        "architecture": "mxd",
        "layer": ["smollm2-135m-mxd", "blocks.11.mlp"],
        "d_sae": d_sae,
        "k": 32,
        "n_tokens": 200_000,
        "text_name": "wikitext",
        "collection": {"n_top": 10, "bands": 4},
    }
    return DashboardData(settings, overview, experts)


def dead(expert: int) -> ExpertData:
    """An expert that never fired."""
    nan = float("nan")
    return ExpertData(
        expert=expert,
        density=0.0,
        n_firings=0,
        mean=nan,
        maximum=0.0,
        edges=[0.0, 1.0],
        counts=[0],
        bands=[],
        promoted=[],
        suppressed=[],
        singular_values=[2.5],
        stable_rank=1.0,
        coactive=[],
        similar=[],
        share_of_output=0.0,
        loss_effect=nan,
        coherence=nan,
        mean_gate_share=0.1,
        consistency=nan,
        contribution_rms=nan,
        mean_direction=[],
    )
