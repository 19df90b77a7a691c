"""Sparse probing: how well one expert, or a few, tell the classes of a text apart.

As in the paper: a text is described by each expert's mean coefficient over its tokens; for every class of a
task, the experts whose mean differs most between its texts and the others' are tried, one at a time, by
logistic regression. Beside them stand probes on the k first of these experts together, on the activations
that the layer reads (dense, of which every coordinate counts as an expert), and constant answers.

What is found with one expert is a statement about experts; what is found with all coordinates, about the
language model.
"""

import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from sae_lens import SAE
from torch import Tensor
from tqdm.auto import tqdm

from mxd_lens.analysis.firings import input_hook, read_batch
from mxd_lens.analysis.sequences import token_batches
from mxd_lens.artifacts.files import write_json
from mxd_lens.artifacts.identity import RunIdentity
from mxd_lens.artifacts.tables import Cell, Tabular
from mxd_lens.evals.probing.logistic import single_feature_probes
from mxd_lens.evals.probing.tasks import OFFLINE_TASKS, LabelledTexts, load_task
from mxd_lens.hooks.site import check_trained_on, hook_names
from mxd_lens.models import model_first, ordinary_tokens

if TYPE_CHECKING:
    import pandas
    from scipy.sparse import csr_matrix

KS = (1, 2, 5, 20, 100)
"""Experts in a k-sparse probe."""
N_CANDIDATES = 100
"""Experts tried one at a time, for each class."""
N_KEPT = 10
"""Of these, how many the results name."""
TEST_SHARE = 4
"""One text in so many is tested on."""

ONE, ONE_ON_TEST, ALL, CONSTANT = "one", "one, chosen on test", "all", "constant"
"""Which probe a score is of, beside "k = 5" and the like."""
MAJORITY, ALWAYS = "the larger class", "always the class"
"""Answers that look at nothing."""


class Scores(NamedTuple):
    """How good a probe is on the test split."""

    f1: float
    """2 true positives / (2 true positives + false positives + false negatives), of the class."""
    balanced_accuracy: float
    """The mean of the recalls of the class and of the rest; 0.5 is chance."""


class ExpertProbe(NamedTuple):
    """One expert as the probe of a class."""

    expert: int
    difference: float
    """Its mean coefficient over the class's texts less that over the others, on the training split."""
    train_f1: float
    f1: float
    """On the test split, as is the next."""
    balanced_accuracy: float


@dataclass(frozen=True)
class ClassProbes:
    """The probes of one class of a task, on one layer's experts, for one split."""

    task: str
    label: str
    """The class, against all others of the task."""
    features: str
    """What is probed: a layer's name, a hook point's for dense activations, or a constant answer."""
    seed: int
    """Of the split."""
    scores: dict[str, Scores]
    """By probe: "one" is the best single expert of the candidates, chosen on the training split; "one,
    chosen on test" is the best on the test split, which is what the paper shows, and optimistic; "k = 5"
    the first five candidates together; "all" every coordinate; "constant" an answer that looks at nothing."""
    experts: list[ExpertProbe]
    """The best single experts on the training split, best first."""


@dataclass(frozen=True)
class TaskFacts:
    """What a task was made of."""

    provider: str
    """Where its texts are from."""
    balance: dict[str, int]
    """Texts of each class."""
    n_tokens: int
    """Tokens averaged over, without special ones."""
    n_cut: int
    """Texts longer than the context, of which the beginning was read."""
    removed: dict[str, int]
    """Texts left out: empty, duplicate, of more than one class."""
    splits: dict[int, dict[str, dict[str, int]]]
    """By seed: "train" and "test", texts of each class."""


@dataclass(frozen=True, repr=False)
class SparseProbing(Tabular):
    """What `sparse_probing` found."""

    settings: dict[str, Any]
    """The model, the layers, seeds, candidates, context."""
    tasks: dict[str, TaskFacts]
    """By name."""
    probes: list[ClassProbes]
    """One for every class of a task, layer or baseline, and seed."""

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON has it: scores as lists in the order of their fields."""
        return asdict(self)

    def save(self, path: str | Path) -> None:
        """Write everything as JSON, atomically."""
        write_json(path, self.to_dict(), indent=None)

    @classmethod
    def load(cls, path: str | Path) -> "SparseProbing":
        """Reads what `save` wrote."""
        known = json.loads(Path(path).read_text(encoding="utf-8"))
        tasks = {}
        for name, facts in known["tasks"].items():
            splits = {int(seed): split for seed, split in facts["splits"].items()}
            tasks[name] = TaskFacts(**facts | {"splits": splits})
        probes = [
            ClassProbes(
                **probe
                | {
                    "scores": {kind: Scores(*scores) for kind, scores in probe["scores"].items()},
                    "experts": [ExpertProbe(*expert) for expert in probe["experts"]],
                }
            )
            for probe in known["probes"]
        ]
        return cls(known["settings"], tasks, probes)

    def select(self, task: str, features: str, label: str | None = None) -> list[ClassProbes]:
        """The probes of a task on some features; of one class, or of all."""
        return [
            probe
            for probe in self.probes
            if (probe.task, probe.features) == (task, features) and label in (None, probe.label)
        ]

    @property
    def features(self) -> list[str]:
        """What was probed, layers first."""
        return list(dict.fromkeys(probe.features for probe in self.probes))

    def by_seed(self, task: str, features: str, kind: str) -> list[Scores]:
        """The means over the classes, one for every seed; none where there is no such probe."""
        found: dict[int, list[Scores]] = {}
        for probe in self.select(task, features):
            if kind in probe.scores:
                found.setdefault(probe.seed, []).append(probe.scores[kind])
        return [Scores(*map(mean, zip(*scores, strict=True))) for scores in found.values()]

    def expert_frame(self) -> "pandas.DataFrame":
        """A row for each class, layer, split and expert among the best: what it scored as the only probe."""
        import pandas

        return pandas.DataFrame(
            [
                {"task": p.task, "label": p.label, "layer": p.features, "seed": p.seed, **probe._asdict()}
                for p in self.probes
                for probe in p.experts
            ]
        )

    @property
    def title(self) -> str:
        return (
            f"Probing {self.settings['model_name']}: means over a task's classes, ± the standard deviation "
            f"over {len(self.settings['seeds'])} splits"
        )

    @property
    def columns(self) -> list[str]:
        kinds = [f"k = {k}, F1" for k in self.settings["ks"]]
        return ["task", "probed", "one, F1", "±", "one, bal. acc.", "± ", *kinds, "all, F1"]

    @property
    def rows(self) -> Iterator[list[Cell]]:
        for task in self.tasks:
            for features in self.features:
                kind = ONE if self.by_seed(task, features, ONE) else CONSTANT
                one = self.by_seed(task, features, kind)
                f1, accuracy = ([getattr(s, name) for s in one] for name in Scores._fields)
                others = [
                    mean_or_nan(s.f1 for s in self.by_seed(task, features, other))
                    for other in (*(of_k(k) for k in self.settings["ks"]), ALL)
                ]
                yield [
                    task,
                    features,
                    mean_or_nan(f1),
                    spread(f1),
                    mean_or_nan(accuracy),
                    spread(accuracy),
                    *others,
                ]


def of_k(k: int) -> str:
    """The name of a k-sparse probe's score."""
    return f"k = {k}"


def mean_or_nan(values: Iterable[float]) -> float:
    values = list(values)
    return mean(values) if values else math.nan


def spread(values: Sequence[float]) -> float:
    """The standard deviation of a sample, NaN where there is one value only."""
    return stdev(values) if len(values) > 1 else math.nan


@model_first
def sparse_probing(
    model: Any,
    saes: SAE[Any] | Mapping[str, SAE[Any]],
    tasks: str | LabelledTexts | Sequence[str | LabelledTexts] = OFFLINE_TASKS,
    seeds: Sequence[int] = (0,),
    ks: Sequence[int] = KS,
    n_candidates: int = N_CANDIDATES,
    n_texts: int = 1000,
    context_size: int | None = None,
    batch_size: int = 16,
    progress: bool = True,
) -> SparseProbing:
    """How well single experts, and k together, tell the classes of some tasks apart.

        result = sparse_probing(model, {"MxD": mxd, "transcoder": transcoder}, seeds=range(5))

    For each class and split, with f_n(text) the mean of a_n over the text's tokens without special ones:

    1. the experts are ranked by |mean of f_n over the class - mean of f_n over the others|, on the
       training split;
    2. for each of the first `n_candidates`, logistic regression on f_n alone; the best by its F1 on the
       training split is "one";
    3. for each k, logistic regression on the first k together: "k = 5".

    Features are scaled to unit variance on the training split, and classes weighted equally, so that no
    score depends on the units of a layer's coefficients. A quarter of the texts is tested on; all passages
    of a document lie on one side.

    The language model runs once over each text, for all layers and all seeds.

    Args:
        model: any hooked model.
        saes: a layer, or several by name. Where their hook points differ, each reads at its own.
        tasks: names in `probing_tasks.TASKS`, or texts of your own (`LabelledTexts.of`).
        seeds: of the splits; the scores' spread is over them.
        ks: experts in the k-sparse probes.
        n_candidates: experts tried one at a time.
        n_texts: texts of a named task, at most.
        context_size: tokens of a text that are read, BOS included. None: those of a sequence in the layers'
            training.
        batch_size: texts in a forward pass. It does not change the numbers, beyond rounding.
        progress: whether to show progress bars.

    Raises:
        ModuleNotFoundError: scikit-learn is not installed.
        ValueError: more experts are asked for than a layer has, a class has too few texts to be split, a
            text has no token, or a layer does not belong to the model.
        LookupError, ConnectionError: as `load_task`.
    """
    check_scikit_learn()
    layers = dict(saes) if isinstance(saes, Mapping) else {saes.cfg.architecture(): saes}
    check_counts(layers, seeds, ks, n_candidates)
    given = [tasks] if isinstance(tasks, (str, LabelledTexts)) else list(tasks)
    named = [load_task(task, n_texts) if isinstance(task, str) else task for task in given]
    if len({task.name for task in named}) < len(named):
        raise ValueError(f"Two tasks have one name: {', '.join(task.name for task in named)}.")
    splits = {task.name: {seed: split(task, seed) for seed in seeds} for task in named}

    facts, probes = {}, []
    for task in named:
        pooled = pool(model, layers, task.texts, context_size, batch_size, progress)
        labels = np.array(task.labels)
        facts[task.name] = TaskFacts(
            provider=task.provider,
            balance=task.balance,
            n_tokens=int(pooled.n_tokens.sum()),
            n_cut=pooled.n_cut,
            removed=task.removed,
            splits={
                seed: {
                    side: dict(sorted(Counter(labels[rows].tolist()).items()))
                    for side, rows in (("train", ~test), ("test", test))
                }
                for seed, test in splits[task.name].items()
            },
        )
        probes += list(probe_task(task, splits[task.name], pooled, ks, n_candidates, progress))
    return SparseProbing(
        settings={
            "model_name": model.cfg.model_name,
            "layers": {
                name: {
                    "architecture": sae.cfg.architecture(),
                    "hook_name": hook_names(sae)[0],
                    "d_sae": sae.cfg.d_sae,
                    "k": getattr(sae.cfg, "k", None),
                }
                for name, sae in layers.items()
            },
            "seeds": list(seeds),
            "ks": list(ks),
            "n_candidates": n_candidates,
            "context_size": context_of(layers, model, context_size),
            "identity": RunIdentity.of(model=model, layers=layers).to_dict(),
        },
        tasks=facts,
        probes=probes,
    )


def check_scikit_learn() -> None:
    try:
        import sklearn  # noqa: F401
    except ImportError as e:
        raise ModuleNotFoundError(
            "Probing needs scikit-learn: pip install 'mxd-lens[probing]', or pip install scikit-learn."
        ) from e


def check_counts(
    layers: Mapping[str, SAE[Any]], seeds: Sequence[int], ks: Sequence[int], n_candidates: int
) -> None:
    if not layers or not len(seeds):
        raise ValueError(f"Probing needs a layer and a seed, got {len(layers)} layers, {len(seeds)} seeds.")
    for asked, what in ((n_candidates, "n_candidates"), *((k, "ks") for k in ks)):
        if asked < 1:
            raise ValueError(f"{what} must be positive, got {asked}.")
        for name, sae in layers.items():
            if asked > sae.cfg.d_sae:
                raise ValueError(
                    f"{what} asks for {asked} experts, and {name} has {sae.cfg.d_sae}: give fewer."
                )


# Texts as mean coefficients


@dataclass(frozen=True)
class PooledTexts:
    """Texts as means over their tokens."""

    features: dict[str, "csr_matrix"]
    """By layer: mean coefficients, [texts, d_sae], in float64."""
    activations: dict[str, Float[np.ndarray, "texts d_in"]]
    """By hook point: the mean of what the layers read there."""
    n_tokens: Int[np.ndarray, " texts"]
    """Tokens averaged over."""
    n_cut: int
    """Texts that were longer than the context."""


@torch.no_grad()
def pool(
    model: Any,
    saes: Mapping[str, SAE[Any]],
    texts: Sequence[str],
    context_size: int | None = None,
    batch_size: int = 16,
    progress: bool = True,
) -> PooledTexts:
    """The mean coefficient of every expert over each text's tokens, special ones left out.

    One pass of the language model for all layers, up to the last that is read. Coefficients are kept as
    values and ids throughout.

    Args:
        model: any hooked model.
        saes: the layers by name.
        texts: at least one; a longer one than the context is cut.
        context_size, batch_size, progress: as for `sparse_probing`.

    Raises:
        ValueError: a text has no token that is not special, there is no text, or a layer does not belong to
            the model.
    """
    from scipy.sparse import csr_matrix, vstack

    for sae in saes.values():
        check_trained_on(model, sae)
    hook_of = {name: input_hook(model, sae) for name, sae in saes.items()}
    sequences, n_cut = tokenized(model, texts, saes, context_of(saes, model, context_size))
    # Texts of one length together: little padding, and the same batches in whatever order they come.
    order = sorted(range(len(texts)), key=lambda i: (len(sequences[i]), texts[i]))
    features: dict[str, list[Any]] = {name: [] for name in saes}
    activations: dict[str, list[np.ndarray]] = {hook: [] for hook in hook_of.values()}
    n_tokens: list[np.ndarray] = []
    for batch in token_batches([sequences[i] for i in order], batch_size, "Reading texts", progress):
        counted = batch.present & ordinary_tokens(model, batch.tokens, True)
        counts = counted.sum(1)
        if not counts.all():
            empty = texts[order[batch.first + int(counts.argmin())]]
            raise ValueError(f"A text has no token but special ones: {empty[:80]!r}.")
        readings = read_batch(model, saes, batch, hook_of, counted)
        text_of = counted.nonzero()[:, 0].numpy()
        weights = (1 / counts.double())[text_of]
        means = csr_matrix((weights.numpy(), (text_of, np.arange(len(text_of)))))
        for hook in activations:
            name = next(name for name in saes if hook_of[name] == hook)
            activations[hook].append(means @ readings[name].inputs.double().cpu().numpy())
        for name, reading in readings.items():
            features[name].append(means @ reading.firings.matrix)
        n_tokens.append(counts.numpy())
    back = np.argsort(order)
    return PooledTexts(
        {name: vstack(blocks, format="csr")[back] for name, blocks in features.items()},
        {hook: np.concatenate(blocks)[back] for hook, blocks in activations.items()},
        np.concatenate(n_tokens)[back],
        n_cut,
    )


def context_of(saes: Mapping[str, SAE[Any]], model: Any, context_size: int | None) -> int:
    """Tokens of a text that are read."""
    limits = [sae.cfg.metadata.context_size for sae in saes.values()] if context_size is None else []
    return min([model.cfg.n_ctx, *(limit for limit in (context_size, *limits) if limit)])


def tokenized(
    model: Any, texts: Sequence[str], saes: Mapping[str, SAE[Any]], context: int
) -> tuple[list[Int[Tensor, " positions"]], int]:
    """The token ids of each text, with BOS where the layers' training had it, and how many were cut."""
    prepend_bos = {sae.cfg.metadata.prepend_bos is not False for sae in saes.values()}
    if len(prepend_bos) > 1:
        raise ValueError("Some of these layers were trained with BOS, others without: probe them apart.")
    if not texts:
        raise ValueError("There is no text to probe on.")
    first = [model.tokenizer.bos_token_id] if prepend_bos.pop() else []
    ids = [first + model.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    for text, sequence in zip(texts, ids, strict=True):
        if len(sequence) == len(first):
            raise ValueError(f"A text has no token but special ones: {text[:80]!r}.")
    return [torch.tensor(sequence[:context]) for sequence in ids], sum(len(s) > context for s in ids)


# Probes


def split(task: LabelledTexts, seed: int) -> Bool[np.ndarray, " texts"]:
    """Which texts are tested on: a quarter of each class, as far as documents stay whole.

    Raises:
        ValueError: a class has no text on one of the sides.
    """
    import warnings

    from sklearn.model_selection import StratifiedGroupKFold

    labels, test = np.array(task.labels), np.zeros(len(task.labels), dtype=bool)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a class in few documents: looked at below
        folds = StratifiedGroupKFold(TEST_SHARE, shuffle=True, random_state=seed)
        if min(len(set(task.sources)), max(Counter(task.labels).values())) >= TEST_SHARE:
            test[next(folds.split(labels, labels, task.sources))[1]] = True
    for label in task.balance:
        n, n_test = int((labels == label).sum()), int((test & (labels == label)).sum())
        if n_test in (0, n):
            sources = len({s for s, other in zip(task.sources, task.labels, strict=True) if other == label})
            raise ValueError(
                f"The class {label!r} of {task.name!r} cannot be split: {n} texts of {sources} documents. It "
                f"takes {TEST_SHARE} documents at least."
            )
    return test


def probe_task(
    task: LabelledTexts,
    tests: Mapping[int, Bool[np.ndarray, " texts"]],
    pooled: PooledTexts,
    ks: Sequence[int],
    n_candidates: int,
    progress: bool,
) -> Iterator[ClassProbes]:
    """The probes of a task: every class, layer and baseline, and split."""
    import sklearn

    labels = np.array(task.labels)
    whole = len(task.balance) * len(tests) * (len(pooled.features) + len(pooled.activations))
    with (
        tqdm(total=whole, desc=f"Probing {task.name}", disable=not progress) as bar,
        sklearn.config_context(assume_finite=True, skip_parameter_validation=True),
    ):
        for features in (*pooled.features, *pooled.activations):
            is_dense = features in pooled.activations
            X = (pooled.activations if is_dense else pooled.features)[features]
            fitting = [k for k in ks if k <= X.shape[1]]
            for seed, test in tests.items():
                for label in task.balance:
                    scores, experts = probe_class(X, labels == label, test, fitting, n_candidates, is_dense)
                    yield ClassProbes(task.name, label, features, seed, scores, experts)
                    bar.update()
        for seed, test in tests.items():
            for label in task.balance:
                truth = labels[test] == label
                larger = (labels[~test] == label).mean() > 0.5
                for name, answer in ((MAJORITY, larger), (ALWAYS, True)):
                    f1, accuracy = scored(truth, np.full(len(truth), answer))
                    constant = {CONSTANT: Scores(float(f1), float(accuracy))}
                    yield ClassProbes(task.name, label, name, seed, constant, [])


def probe_class(
    X: "csr_matrix | Float[np.ndarray, 'texts features']",
    is_class: Bool[np.ndarray, " texts"],
    test: Bool[np.ndarray, " texts"],
    ks: Sequence[int],
    n_candidates: int,
    use_all: bool,
) -> tuple[dict[str, Scores], list[ExpertProbe]]:
    """The scores of one class by probe, and its best single experts; see `sparse_probing`.

    Args:
        X: the features of the texts.
        is_class: which texts are of the class.
        test: which are tested on.
        ks, n_candidates: as for `sparse_probing`.
        use_all: whether to probe all features together as well.
    """
    y, truth = is_class[~test], is_class[test]
    train = X[~test]
    difference = np.asarray(train[y].mean(0) - train[~y].mean(0)).reshape(-1)
    ranked = np.argsort(-np.abs(difference), kind="stable")
    # No more columns are made dense than are probed.
    used = ranked if use_all else ranked[: max(n_candidates, *ks, 1)]
    columns = X[:, used]
    Z = columns if isinstance(columns, np.ndarray) else columns.toarray()
    scale = Z[~test].std(0)
    Z = (Z - Z[~test].mean(0)) / np.where(scale > 0, scale, 1)

    singles = slice(min(n_candidates, len(used)))
    weight, intercept = single_feature_probes(Z[~test, singles], y)
    answers = weight * Z[:, singles] + intercept > 0
    on_train, on_test = scored(y, answers[~test]), scored(truth, answers[test])
    tried = [
        ExpertProbe(int(n), float(difference[n]), *map(float, numbers))
        for n, *numbers in zip(used[singles], on_train[0], *on_test, strict=True)
    ]
    tried.sort(key=lambda probe: -probe.train_f1)
    scores = {
        ONE: Scores(tried[0].f1, tried[0].balanced_accuracy),
        ONE_ON_TEST: Scores(*(float(best.max()) for best in on_test)),
    }
    together = {of_k(k): slice(k) for k in ks} | ({ALL: slice(None)} if use_all else {})
    for kind, which in together.items():
        answer = fitted(Z[~test, which], y).predict(Z[test, which])
        scores[kind] = Scores(*(float(score) for score in scored(truth, answer)))
    return scores, tried[:N_KEPT]


def fitted(Z: Float[np.ndarray, "texts features"], y: Bool[np.ndarray, " texts"]) -> Any:
    """Logistic regression with scikit-learn's own penalty, both classes weighing the same."""
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(class_weight="balanced", max_iter=1000).fit(Z, y)


def scored(
    truth: Bool[np.ndarray, " texts"], answers: Bool[np.ndarray, "texts *probes"]
) -> tuple[Float[np.ndarray, " *probes"], Float[np.ndarray, " *probes"]]:
    """F1 and balanced accuracy of each probe's answers; an F1 of 0 where none is right."""
    hits, alarms = answers[truth].sum(0), answers[~truth].sum(0)
    n, n_rest = truth.sum(), (~truth).sum()
    # 2 true positives / (2 true positives + false positives + false negatives)
    return 2 * hits / (hits + alarms + n), (hits / n + 1 - alarms / n_rest) / 2
