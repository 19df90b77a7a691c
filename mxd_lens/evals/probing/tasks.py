"""Labelled texts to probe on, by name: from nltk, from files that every installation holds, from the hub."""

import html
import random
import re
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from sae_lens import logger

from mxd_lens.text import detokenized, nltk_reader

PASSAGE = 400
"""Characters of a passage, at most."""
PASSAGES_OF_A_SOURCE = 8
"""Passages taken from one document, at most, evenly spaced."""
HUB_ROWS = 20_000
"""Rows of a data set on the hub that are looked at."""
FEWEST_FILES = 8
"""Files of a programming language without which it is no class."""


class Passage(NamedTuple):
    """One labelled text."""

    label: str
    """Its class."""
    text: str
    source: str
    """The document it is from: no document lies on both sides of a split."""


@dataclass(frozen=True)
class ProbingTask:
    """Labelled texts that can be loaded by name."""

    name: str
    about: str
    """What the classes are, and of what."""
    provider: str
    """Where the texts are from: "nltk", "installed files" or "Hugging Face hub"."""
    passages: Callable[[], Iterable[Passage]]
    """Loads them, when called."""


@dataclass(frozen=True)
class LabelledTexts:
    """The texts of a task, in an order of their own: that in which they were given does not matter."""

    name: str
    texts: list[str]
    labels: list[str]
    """The class of each."""
    sources: list[str]
    """The document each is from."""
    provider: str = "given"
    """Where they are from."""
    removed: dict[str, int] = field(default_factory=dict)
    """How many were left out: "empty"; "duplicate", the same text again but for white space and case; and
    "ambiguous", texts that occur in more than one class."""

    @property
    def balance(self) -> dict[str, int]:
        """Texts of each class."""
        return dict(sorted(Counter(self.labels).items()))

    @classmethod
    def of(
        cls,
        name: str,
        passages: Iterable[Passage | tuple[str, str]],
        n_texts: int | None = None,
        seed: int = 0,
        provider: str = "given",
    ) -> "LabelledTexts":
        """Texts to probe on, without the empty ones and those that occur twice.

            LabelledTexts.of("mood", [("glad", "What a day!"), ("sad", "Rain again."), ...])

        Args:
            name: of the task.
            passages: class and text of each, and the document it is from; without one, each is its own.
            n_texts: how many to draw at most, as many of each class as of the others where there are enough.
            seed: of that draw.
            provider: where they are from.

        Raises:
            ValueError: fewer than two classes have a text.
        """
        unique, removed = without_duplicates(
            Passage(p[0], p[1], p[2] if len(p) > 2 else p[1]) for p in passages
        )
        by_label: dict[str, list[Passage]] = {}
        for passage in unique:
            by_label.setdefault(passage.label, []).append(passage)
        if len(by_label) < 2:
            raise ValueError(
                f"The task {name!r} has texts of {', '.join(by_label) or 'no class'} only: probing tells "
                "classes apart, two at least."
            )
        if n_texts is not None:
            each, draw = n_texts // len(by_label), random.Random(seed)
            by_label = {k: draw.sample(v, min(each, len(v))) for k, v in by_label.items()}
        kept = sorted(passage for passages in by_label.values() for passage in passages)
        return cls(
            name, [p.text for p in kept], [p.label for p in kept], [p.source for p in kept], provider, removed
        )


def without_duplicates(passages: Iterable[Passage]) -> tuple[list[Passage], dict[str, int]]:
    """The passages in sorted order, each text once, and how many were left out for what reason."""
    labels_of: dict[str, set[str]] = {}
    first: dict[str, Passage] = {}
    removed = Counter(empty=0, duplicate=0, ambiguous=0)
    for passage in sorted(passages):
        key = " ".join(passage.text.split()).casefold()
        if not key:
            removed["empty"] += 1
            continue
        removed["duplicate"] += key in first
        first.setdefault(key, passage)
        labels_of.setdefault(key, set()).add(passage.label)
    ambiguous = {key for key, labels in labels_of.items() if len(labels) > 1}
    removed["ambiguous"] = len(ambiguous)
    return [passage for key, passage in first.items() if key not in ambiguous], dict(removed)


def load_task(name: str, n_texts: int | None = 1000, seed: int = 0) -> LabelledTexts:
    """The texts of one of `TASKS`.

    Args:
        name: which task.
        n_texts: how many at most; None for all there are.
        seed: of the draw.

    Raises:
        ValueError: there is no such task, or its texts are all of one class.
        LookupError: an nltk corpus that it needs is not on this machine.
        ConnectionError: it is on the hub, which cannot be reached.
    """
    if name not in TASKS:
        raise ValueError(f"There is no probing task {name!r}: choose from {', '.join(TASKS)}.")
    task = TASKS[name]
    texts = LabelledTexts.of(name, task.passages(), n_texts, seed, task.provider)
    balance = ", ".join(f"{label} {n}" for label, n in texts.balance.items())
    logger.info("Probing task %s: %d texts (%s).", name, len(texts.texts), balance)
    return texts


def pieces(text: str, at_most: int = PASSAGES_OF_A_SOURCE) -> list[str]:
    """Passages of a text, cut at white space and evenly spaced; of several the first is left out.

    A text begins with its title, or a file with its licence, which say more about the document than about
    its class.
    """
    # A piece begins and ends where a word does; what has no white space for so long is skipped.
    found = re.findall(rf"(?<!\S)\S.{{0,{PASSAGE - 1}}}(?!\S)", text, flags=re.DOTALL)
    found = [piece.strip() for piece in found]
    if len(found) > 1:
        found = [piece for piece in found[1:] if len(piece) >= PASSAGE // 4] or found[:1]
    return found[:: -(-len(found) // at_most) or 1]


# Without a network

GENESIS = {
    "English": ("english-web.txt", "English-Latin1"),
    "Finnish": ("finnish.txt", "Finnish_Suomi-Latin1"),
    "French": ("french.txt", "French_Francais-Latin1"),
    "German": ("german.txt", "German_Deutsch-Latin1"),
    "Portuguese": ("portuguese.txt", "Portuguese_Portugues-Latin1"),
    "Swedish": ("swedish.txt", "Swedish_Svenska-Latin1"),
}
"""The languages in which nltk has both the book of Genesis and the Declaration of Human Rights."""


def languages() -> Iterator[Passage]:
    """The same two texts in six languages: their subject tells nothing."""
    genesis, udhr = nltk_reader("genesis"), nltk_reader("udhr")
    for label, (book, declaration) in GENESIS.items():
        # Entities and a wrongly decoded quotation mark would give a language away.
        text = html.unescape(genesis.raw(book)).replace("╜", '"')
        for corpus, raw in (("genesis", text), ("udhr", udhr.raw(declaration))):
            for i, piece in enumerate(pieces(raw, at_most=len(raw))):
                yield Passage(label, piece, f"{corpus} {label} {i}")


def sentiments() -> Iterator[Passage]:
    """Sentences out of film reviews, and of whole reviews the end, where the verdict stands."""
    polarity, reviews = nltk_reader("sentence_polarity"), nltk_reader("movie_reviews")
    for category, label in (("neg", "negative"), ("pos", "positive")):
        for i, sentence in enumerate(polarity.sents(categories=category)):
            yield Passage(label, detokenized(sentence), f"sentence {category} {i}")
        for review in reviews.fileids(category):
            yield Passage(label, reviews.raw(review).strip()[-PASSAGE:].partition(" ")[2], review)


BROWN_TOPICS = ("government", "hobbies", "learned", "news", "religion", "romance")


def topics() -> Iterator[Passage]:
    """Six categories of the Brown corpus and the two of the Australian Broadcasting Commission's news.

    The latter's classes differ from Brown's in time and place too.
    """
    brown, abc = nltk_reader("brown"), nltk_reader("abc")
    for label in BROWN_TOPICS:
        for document in brown.fileids(categories=label):
            text = "\n".join(detokenized(sentence) for sentence in brown.sents(document))
            yield from (Passage(label, piece, document) for piece in pieces(text))
    for label in ("rural", "science"):
        text = abc.raw(f"{label}.txt").replace("\r\n", "\n")
        for i, piece in enumerate(pieces(text, at_most=len(text))):
            yield Passage(label, piece, f"abc {label} {i // PASSAGES_OF_A_SOURCE}")


def code() -> Iterator[Passage]:
    """Source files of Python and its packages; a language of which too few are installed is left out."""
    paths = sysconfig.get_paths()
    standard_library, packages = Path(paths["stdlib"]), Path(paths["purelib"])
    torch = find_spec("torch")
    headers = Path(torch.submodule_search_locations[0]) / "include" if torch else packages / "torch"  # type: ignore[index]
    for label, folder, endings in (
        ("C", Path(paths["include"]), (".h",)),
        ("C++", headers, (".h", ".hpp")),
        ("CSS", packages, (".css",)),
        ("HTML", packages, (".html", ".htm")),
        ("JavaScript", packages, (".js", ".mjs")),
        ("Python", standard_library, (".py",)),
    ):
        files = sorted(
            file
            for ending in endings
            for file in folder.rglob(f"*{ending}")
            if folder == packages or not NO_STANDARD_LIBRARY & set(file.relative_to(folder).parts)
        )
        found = [passages for file in files if (passages := list(source_file(label, file, folder)))]
        if len(found) < FEWEST_FILES:
            logger.warning("The task 'code' goes without %s: %d files are installed.", label, len(found))
            continue
        for passages in found:
            yield from passages


NO_STANDARD_LIBRARY = {"site-packages", "dist-packages", "test", "tests"}
"""Folders under the standard library's that are not of it, or do not lie in every installation."""


def source_file(label: str, file: Path, folder: Path) -> Iterator[Passage]:
    try:
        text = file.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError):
        return
    for piece in pieces(text):
        yield Passage(label, piece, f"{label} {file.relative_to(folder).as_posix()}")


# From the Hugging Face hub, as in the paper


def hub_rows(
    path: str, *, config: str | None = None, streaming: bool = True, **options: Any
) -> Iterator[Any]:
    """Rows of a data set's "train" split; of one that is downloaded whole, in random order."""
    from datasets import load_dataset

    try:
        rows = load_dataset(path, config, split="train", streaming=streaming, **options)
        yield from islice(rows if streaming else rows.shuffle(seed=0), HUB_ROWS)
    except (OSError, ValueError) as e:
        # Which error says that the hub is out of reach depends on datasets' version and on what is cached.
        raise ConnectionError(
            f"{path} cannot be had from the Hugging Face hub ({type(e).__name__}: {few_words(e)}). Without "
            f"a network there are the tasks {', '.join(OFFLINE_TASKS)}."
        ) from e


def few_words(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def ag_news() -> Iterator[Passage]:
    """News items in four sections."""
    sections = ("World", "Sports", "Business", "Sci/Tech")
    for row in hub_rows("fancyzhx/ag_news", streaming=False):
        yield Passage(sections[row["label"]], row["text"], row["text"])


def amazon_reviews() -> Iterator[Passage]:
    """Product reviews with one star and with five."""
    for row in hub_rows("canrager/amazon_reviews_mcauley_1and5", streaming=False):
        label = "positive" if float(row["rating"]) > 3 else "negative"
        yield Passage(label, row["text"][: 4 * PASSAGE], row["text"])


def europarl() -> Iterator[Passage]:
    """Speeches in the European Parliament in five languages."""
    pairs = {"English": "en-fr", "French": "fr-it", "German": "de-en", "Spanish": "es-fr", "Dutch": "nl-pt"}
    for label, pair in pairs.items():
        for row in islice(hub_rows("Helsinki-NLP/europarl", config=pair), HUB_ROWS // len(pairs)):
            text = row["translation"][pair[:2]]
            yield Passage(label, text, f"{label} {text}")


GITHUB_LANGUAGES = {".c": "C", ".py": "Python", ".html": "HTML", ".java": "Java", ".php": "PHP"}


def github_code() -> Iterator[Passage]:
    """Files on GitHub in five programming languages."""
    # The data set's own script is no longer run by datasets: its files are read as they are, and the
    # language told by the ending of the path, as the script does.
    first = "hf://datasets/codeparrot/github-code/data/train-00000-of-01126.parquet"
    for row in hub_rows("parquet", data_files=first):
        if label := GITHUB_LANGUAGES.get(Path(row["path"]).suffix):
            for piece in pieces(row["content"], at_most=1):
                yield Passage(label, piece, f"{row['repo_name']} {row['path']}")


TASKS: Mapping[str, ProbingTask] = {
    task.name: task
    for task in (
        ProbingTask("language", "the language of a text, one of six", "nltk", languages),
        ProbingTask("sentiment", "what a film review says", "nltk", sentiments),
        ProbingTask("topic", "what a text is about, one of eight categories", "nltk", topics),
        ProbingTask("code", "the programming language of a file", "installed files", code),
        ProbingTask("ag_news", "the section of a news item", "Hugging Face hub", ag_news),
        ProbingTask("amazon_reviews", "what a product review says", "Hugging Face hub", amazon_reviews),
        ProbingTask("europarl", "the language of a speech, one of five", "Hugging Face hub", europarl),
        ProbingTask("github_code", "the programming language of a file", "Hugging Face hub", github_code),
    )
}
"""The tasks by name."""

OFFLINE_TASKS = tuple(name for name, task in TASKS.items() if task.provider != "Hugging Face hub")
"""Those that need no network."""
