"""Text to run a language model on, by name, as a datasets.Dataset with a "text" column."""

import ast
import os
import re
import sysconfig
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
from datasets import Dataset, IterableDataset, load_dataset
from jaxtyping import Int
from sae_lens.pretokenize_runner import get_special_token_from_cfg
from sae_lens.tokenization_and_batching import concat_and_batch_sequences
from torch import Tensor

EMBEDDED = "embedded"
"""The text every machine has: the Python manual's topics and the standard library's docstrings."""


def load_text(source: str | Path, streaming: bool = True) -> Dataset | IterableDataset:
    """The text called `source`; one row a document or paragraph.

    Args:
        source: "embedded", the text every Python installation holds (about 0.4 M tokens);
            "nltk:NAME", an nltk corpus that has been downloaded, as "nltk:brown";
            a text file, or a folder whose .txt and .md files are read; paragraphs are separated by
            blank lines;
            else a data set on the Hugging Face hub, its "train" split.
        streaming: whether a data set from the hub is streamed rather than downloaded.

    Raises:
        FileNotFoundError: `source` looks like a path and does not exist, or a folder without text.
        LookupError: an nltk corpus that is not there.
        ValueError: there is no text in it.
    """
    source = os.path.expanduser(str(source))
    if not source:
        raise ValueError("The text has no name: give a source, or a data set.")
    if source == EMBEDDED:
        rows: Iterable[str] = python_documentation()
    elif source.startswith("nltk:"):
        rows = nltk_corpus(source.removeprefix("nltk:"))
    elif Path(source).exists():
        rows = text_files(Path(source))
    elif re.match(r"[./~\\]", source) or source.endswith((".txt", ".md")):
        raise FileNotFoundError(f"There is no text at {source}.")
    else:
        return load_dataset(source, split="train", streaming=streaming)
    texts = [row for row in rows if row.strip()]
    if not texts:
        raise ValueError(f"There is no text in {source}.")
    return Dataset.from_dict({"text": texts})


def split_text(text: Dataset, held_out: float = 0.1) -> tuple[Dataset, Dataset]:
    """The rows to train on and those to judge on, shuffled; the same ones at every call."""
    rows = text.shuffle(seed=0).train_test_split(held_out, seed=0)
    return rows["train"], rows["test"]


def token_sequences(
    model: Any,
    text: Dataset | IterableDataset,
    n_sequences: int,
    context_size: int = 128,
    prepend_bos: bool = True,
    separator: Literal["bos", "eos", "sep"] | None = "bos",
) -> Int[Tensor, "n_sequences context_size"]:
    """The first sequences of a text, tokenised and packed as a training run packs them.

    Args:
        model: whose tokenizer.
        text: with a "text" column, as `load_text` gives it.
        n_sequences: how many at most.
        context_size: tokens in each.
        prepend_bos: whether each begins with BOS.
        separator: the token between two rows of the text.

    Raises:
        ValueError: the text does not fill one sequence.
    """
    tokenizer = model.tokenizer
    packed = concat_and_batch_sequences(
        (
            torch.tensor(tokenizer(row["text"], add_special_tokens=False)["input_ids"], dtype=torch.long)
            for row in text
            if row["text"]
        ),
        context_size=context_size,
        begin_batch_token_id=tokenizer.bos_token_id if prepend_bos else None,
        sequence_separator_token_id=get_special_token_from_cfg(separator, tokenizer),
    )
    sequences = list(islice(packed, n_sequences))
    if not sequences:
        raise ValueError(f"The text is too short: it does not fill one sequence of {context_size} tokens.")
    return torch.stack(sequences)


def paragraphs(text: str) -> list[str]:
    """The parts of `text` between blank lines."""
    return re.split(r"\n\s*\n", text)


def text_files(path: Path) -> Iterator[str]:
    """The paragraphs of a text file, or of a folder's text files in the order of their names."""
    files = [path] if path.is_file() else sorted(p for s in ("txt", "md") for p in path.rglob(f"*.{s}"))
    if not files:
        raise FileNotFoundError(f"{path} holds no .txt or .md file.")
    for file in files:
        yield from paragraphs(file.read_text(encoding="utf-8", errors="replace"))


def python_documentation() -> Iterator[str]:
    """The Python manual's topics, and the docstrings of the standard library that say something."""
    from pydoc_data.topics import topics

    yield from topics.values()
    library = Path(sysconfig.get_paths()["stdlib"])
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for file in sorted(library.rglob("*.py")):
        if {"site-packages", "dist-packages", "test", "tests", "idlelib"} & set(file.parts):
            continue
        try:
            tree = ast.parse(file.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError, ValueError):
            continue  # lib2to3 keeps files that are wrong on purpose
        for node in ast.walk(tree):
            if isinstance(node, documented):
                docstring = ast.get_docstring(node) or ""
                if len(docstring) > 200:
                    yield docstring


def nltk_corpus(name: str) -> Iterator[str]:
    """The paragraphs of an nltk corpus, its tokens joined to running text where it is tokenised."""
    from nltk.corpus.reader import PlaintextCorpusReader, XMLCorpusReader

    reader = nltk_reader(name)
    for file_id in reader.fileids():
        if isinstance(reader, PlaintextCorpusReader):
            yield from paragraphs(reader.raw(file_id))
        elif isinstance(reader, XMLCorpusReader):
            yield "\n".join(line.strip() for line in reader.xml(file_id).itertext() if line.strip())
        else:
            yield "\n".join(detokenized(sentence) for sentence in reader.sents(file_id))


def nltk_reader(name: str) -> Any:
    """The reader of an nltk corpus.

    Raises:
        LookupError: there is no such corpus, or it is not on this machine.
    """
    import nltk.corpus
    from nltk.corpus.reader import CorpusReader
    from nltk.corpus.util import LazyCorpusLoader

    reader = getattr(nltk.corpus, name, None)
    if not isinstance(reader, (LazyCorpusLoader, CorpusReader)):
        raise LookupError(f"nltk has no corpus {name!r}.")
    try:
        reader.ensure_loaded()
    except LookupError as e:
        raise LookupError(
            f"The nltk corpus {name!r} is not on this machine. Download it with "
            f"python -m nltk.downloader {name}, or set NLTK_DATA to where it is."
        ) from e
    return reader


def detokenized(sentence: Iterable[str]) -> str:
    """A sentence of words and punctuation marks, joined to running text."""
    from nltk.tokenize.treebank import TreebankWordDetokenizer

    return TreebankWordDetokenizer().detokenize(list(sentence))
