"""Text to run a language model on, by name, and the token sequences made of it.

Training and evaluation read rows in the same way: `one_column` finds the column, `token_sequences` and the
activation store pack it.
"""

import ast
import codecs
import json
import os
import re
import sysconfig
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import datasets
import torch
import xxhash
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict, load_dataset
from jaxtyping import Int
from sae_lens import logger
from sae_lens.pretokenize_runner import get_special_token_from_cfg
from sae_lens.tokenization_and_batching import concat_and_batch_sequences
from torch import Tensor

EMBEDDED = "embedded"
"""The text every machine has: the Python manual's topics and the standard library's docstrings."""

DATA_FILES = {
    ".parquet": "parquet",
    ".jsonl": "json",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".arrow": "arrow",
}
"""What `datasets` calls the data files it reads, by suffix."""
TEXT_FILES = (".txt", ".md")
TOKEN_COLUMNS = ("tokens", "input_ids")
TEXT_COLUMNS = ("text", "content", "code", "document", "problem")
LARGEST_HASHED = 2**28
"""Bytes of a text up to which all of it is hashed."""


def load_text(source: str | Path, streaming: bool = True) -> Dataset | IterableDataset:
    """Return the text called `source`, one row for each document or paragraph.

    Args:
        source: "embedded", the text every Python installation holds (about 0.4 M tokens);
            "nltk:NAME", an nltk corpus that has been downloaded, as "nltk:brown";
            a .parquet, .jsonl, .json, .csv, .tsv or .arrow file, or a folder of them, or one that
            `Dataset.save_to_disk` wrote;
            any other file, which is read as UTF-8 text, or a folder whose .txt and .md files are; paragraphs
            are separated by blank lines;
            else a data set on the Hugging Face hub, its "train" split.
        streaming: whether a data set from the hub is streamed rather than downloaded.

    Raises:
        FileNotFoundError: `source` looks like a path and does not exist, or a folder without text.
        LookupError: an nltk corpus that is not on this machine.
        ValueError: there is no text in it, it is not UTF-8, or the data file cannot be read.
    """
    source = os.path.expanduser(str(source))
    if not source:
        raise ValueError("The text has no name: give a source, or a data set.")
    path = Path(source)
    if source == EMBEDDED:
        rows: Iterable[str] = python_documentation()
    elif source.startswith("nltk:"):
        rows = nltk_corpus(source.removeprefix("nltk:"))
    elif path.exists():
        if is_data(path):
            return one_column(data_files(path))
        rows = text_files(path)
    elif re.match(r"[./~\\]", source) or path.suffix in (*TEXT_FILES, *DATA_FILES):
        raise FileNotFoundError(f"There is no text at {source}.")
    else:
        return load_dataset(source, split="train", streaming=streaming)
    texts = [row for row in rows if row.strip()]
    if not texts:
        raise ValueError(f"There is no text in {source}.")
    return Dataset.from_dict({"text": texts})


def split_text(text: Dataset, held_out: float = 0.1, seed: int = 0) -> tuple[Dataset, Dataset]:
    """Return the rows to train on and those to evaluate on, shuffled; the same ones at every call."""
    rows = text.shuffle(seed=seed).train_test_split(held_out, seed=seed)
    for part in ("train", "test"):
        split = {"part": part, "held_out": held_out, "seed": seed}
        rows[part].info.description = json.dumps({"split": split})
    return rows["train"], rows["test"]


def one_column(text: Any) -> Dataset | IterableDataset:
    """Return a data set with one column, "text" (strings) or "tokens" (token ids), and no empty rows.

    The column is the first of tokens, input_ids, text, content, code, document and problem, or the only
    column of strings.

    Raises:
        ValueError: there are several splits, no such column, no rows, or the column holds something else.
        TypeError: `text` is not a data set.
    """
    if isinstance(text, DatasetDict | IterableDatasetDict):
        if len(text) > 1:
            names = ", ".join(f'text["{name}"]' for name in text)
            raise ValueError(f"The data set has {len(text)} splits. Choose one of them: {names}.")
        (text,) = text.values()
    if not isinstance(text, Dataset | IterableDataset):
        raise TypeError(f"The text must be a datasets.Dataset or IterableDataset, got {type(text).__name__}.")
    text = text.with_format(None)
    first = next(iter(text), None)
    if first is None:
        raise ValueError("The data set is empty.")
    named = [name for name in (*TOKEN_COLUMNS, *TEXT_COLUMNS) if name in first]
    strings = [name for name, value in first.items() if isinstance(value, str)]
    if not named and len(strings) != 1:
        raise ValueError(
            f"The data set has no column of text: its columns are {', '.join(first)}. Expected one of "
            f"{', '.join((*TEXT_COLUMNS, *TOKEN_COLUMNS))}: rename it with rename_column."
        )
    column = (named or strings)[0]
    kind = "tokens" if column in TOKEN_COLUMNS else "text"
    text = text.select_columns([column])
    if column != kind:
        text = text.rename_column(column, kind)
    if isinstance(text, IterableDataset) or text.data.column(kind).null_count:
        text = text.filter(_is_something, input_columns=[kind])
    value = next(iter(text), {kind: None})[kind]
    if value is None:
        raise ValueError(f"Every row of the data set's column {column!r} is empty.")
    if not isinstance(value, str if kind == "text" else list):
        raise ValueError(
            f"The data set's column {column!r} must hold {'strings' if kind == 'text' else 'token ids'}, got "
            f"{type(value).__name__}."
        )
    return text


def _is_something(value: Any) -> bool:
    return value is not None


def text_identity(text: Dataset | IterableDataset) -> dict[str, Any]:
    """Return what tells one text from another: the number of rows and a hash of their content.

    Up to 256 MiB all rows are hashed. Of a longer data set the hash is that of `datasets`, which knows the
    file and every change made to it; of a streamed one, that of its first hundred rows.
    """
    text = one_column(text)
    if isinstance(text, IterableDataset):
        return {"rows": "streamed", "first_rows": _row_hash(text.take(100))}
    if text.data.nbytes > LARGEST_HASHED:
        return {"rows": len(text), "fingerprint": text._fingerprint}
    return {"rows": len(text), "hash": _row_hash(text)}


def training_text(source: str, text: Dataset | IterableDataset) -> dict[str, Any]:
    """Return the record of a training text that a layer keeps: source, rows, hash and split."""
    try:
        split = json.loads(text.info.description)["split"]
    except (ValueError, TypeError, KeyError):
        split = None
    return {"source": source, **text_identity(text), "split": split}


def seen_in_training(
    record: dict[str, Any] | None, text: Dataset
) -> Literal["held-out", "seen in training", "unknown"]:
    """Return whether a layer was trained on any row of a text.

    Args:
        record: the layer's `cfg.metadata.training_text`, made by `training_text`.
        text: the rows that it is to be evaluated on.

    Returns:
        "held-out" where no row is one of the training text, character by character; "seen in training" where
        one is; "unknown" where the training text is not on this machine any more, has changed, or was
        streamed.
    """
    if not record or "source" not in record:
        return "unknown"
    text = one_column(text)
    rows: Iterable[Any] | None = text
    if text_identity(text).items() <= record.items():
        return "seen in training"
    rows = _training_rows(record)
    if rows is None:
        return "unknown"
    (kind,) = text.column_names
    seen = {_row_hash([row]) for row in rows}
    return "seen in training" if any(_row_hash([{kind: r}]) in seen for r in text[kind]) else "held-out"


def _training_rows(record: dict[str, Any]) -> Dataset | None:
    """The rows that a layer was trained on, where they can be had again; None where they cannot."""
    source = record["source"]
    if source != EMBEDDED and not source.startswith("nltk:") and not Path(source).expanduser().exists():
        return None
    try:
        rows = load_text(source, streaming=False)
    except (OSError, LookupError, ValueError):
        return None
    if split := record.get("split"):
        parts = split_text(rows, split["held_out"], split["seed"])
        rows = parts[("train", "test").index(split["part"])]
    return rows if text_identity(rows).items() <= record.items() else None


def _row_hash(rows: Iterable[dict[str, Any]]) -> str:
    hasher = xxhash.xxh3_128()
    for row in rows:
        for value in row.values():
            content = str(value).encode("utf-8", "surrogatepass")
            hasher.update(f"{len(content)} ".encode() + content)
    return hasher.hexdigest()


def special_token(tokenizer: Any, name: int | Literal["bos", "eos", "sep"] | None) -> int | None:
    """Return the id of a special token; None, with a warning, where the tokenizer has none."""
    if name is None or isinstance(name, int):
        return name
    token_id = get_special_token_from_cfg(name, tokenizer)
    if token_id is None:
        logger.warning("The tokenizer has no %s token: the sequences are made without one.", name.upper())
    return token_id


def token_sequences(
    model: Any,
    text: Dataset | IterableDataset,
    n_sequences: int,
    context_size: int = 128,
    prepend_bos: bool = True,
    separator: int | Literal["bos", "eos", "sep"] | None = "bos",
) -> Int[Tensor, "n_sequences context_size"]:
    """Return the first sequences of a text, tokenised and packed as a training run packs them.

    Args:
        model: whose tokenizer.
        text: as `one_column` takes it; rows of token ids are cut to context_size.
        n_sequences: how many at most.
        context_size: tokens in each.
        prepend_bos: whether each begins with BOS.
        separator: the token between two rows of the text.

    Raises:
        ValueError: the text does not fill one sequence, or a token id is not one of the model's.
    """
    rows = one_column(text)
    sequences = list(islice(packed_sequences(model, rows, context_size, prepend_bos, separator), n_sequences))
    if not sequences:
        raise ValueError(f"The text is too short: it does not fill one sequence of {context_size} tokens.")
    tokens = torch.stack(sequences)
    check_vocabulary(model, tokens)
    return tokens


def packed_sequences(
    model: Any,
    rows: Dataset | IterableDataset,
    context_size: int,
    prepend_bos: bool = True,
    separator: int | Literal["bos", "eos", "sep"] | None = "bos",
    disable_concat_sequences: bool = False,
) -> Iterator[Int[Tensor, " context_size"]]:
    """Yield the sequences of a text: rows joined by the separator and cut, BOS in front of each piece."""
    tokenizer = model.tokenizer
    if "tokens" in (rows.column_names or next(iter(rows))):
        return _cut_sequences(rows, context_size)
    if tokenizer is None:
        raise ValueError("The model has no tokenizer: give token ids, a data set with a column tokens.")
    return concat_and_batch_sequences(
        (
            torch.tensor(tokenizer(row["text"], add_special_tokens=False)["input_ids"], dtype=torch.long)
            for row in rows
            if row["text"]
        ),
        context_size=context_size,
        begin_batch_token_id=special_token(tokenizer, "bos") if prepend_bos else None,
        sequence_separator_token_id=special_token(tokenizer, separator),
        disable_concat_sequences=disable_concat_sequences,
    )


def _cut_sequences(rows: Dataset | IterableDataset, context_size: int) -> Iterator[Tensor]:
    for n, row in enumerate(rows):
        if len(row["tokens"]) < context_size:
            raise ValueError(
                f"Row {n} of the text has {len(row['tokens'])} tokens, and context_size is {context_size}. "
                "Rows of token ids are not joined."
            )
        yield torch.as_tensor(row["tokens"][:context_size], dtype=torch.long)


def check_vocabulary(model: Any, tokens: Int[Tensor, "*batch"]) -> None:
    """Raise ValueError where a token id is not one of the model's vocabulary."""
    size = getattr(model.cfg, "d_vocab", None)
    if size and size > 0 and tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < size:
        bad = int(tokens.min()) if tokens.min() < 0 else int(tokens.max())
        raise ValueError(
            f"The text holds the token id {bad}, and {model.cfg.model_name} has {size:,} tokens: was it "
            "tokenised for another model?"
        )


def paragraphs(text: str) -> list[str]:
    """Return the parts of `text` between blank lines."""
    return re.split(r"\n\s*\n", text)


def is_data(path: Path) -> bool:
    """Whether a file, or what a folder holds, is data for `datasets` rather than text."""
    if path.is_file():
        return _data_kind(path) is not None
    if (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
        return True
    files = [file for file in path.rglob("*") if file.is_file() and file.name != "README.md"]
    text = {file.suffix for file in files if file.suffix in TEXT_FILES}
    # Beside text, a .json file is more often settings than rows.
    data = {file.suffix for file in files if _data_kind(file) and not (text and file.suffix == ".json")}
    if text and data:
        raise ValueError(
            f"{path} holds {', '.join(sorted(text | data))} files: name one file, or a folder of one kind."
        )
    return bool(data)


def _data_kind(file: Path) -> str | None:
    suffixes = [suffix for suffix in file.suffixes if suffix not in (".gz", ".bz2", ".xz", ".zst")]
    return DATA_FILES.get(suffixes[-1]) if suffixes else None


def data_files(path: Path) -> Any:
    """Return a data file, or a folder of them (its "train" split), as `datasets` reads it.

    Raises:
        ValueError: it cannot be read.
    """
    if path.suffix in (".jsonl", ".json", ".csv", ".tsv"):
        check_utf8(path)
    try:
        if path.is_dir() and not (path / "dataset_info.json").is_file():
            if (path / "dataset_dict.json").is_file():
                return datasets.load_from_disk(str(path))
            return load_dataset(str(path), split="train")
        if path.is_dir():
            return datasets.load_from_disk(str(path))
        kind = _data_kind(path)
        options: dict[str, Any] = {"sep": "\t"} if ".tsv" in path.suffixes else {}
        return load_dataset(str(kind), data_files=str(path), split="train", **options)
    except Exception as e:  # pyarrow's, pandas' and its own
        cause = e.__cause__ or e
        reason = str(cause).partition("\n")[0] or type(cause).__name__
        raise ValueError(f"{path} cannot be read as a {path.suffix or 'data'} file: {reason}") from e


def check_utf8(file: Path) -> None:
    """Raise ValueError where a file is not UTF-8 text; the message names the first offending byte."""
    decoder, position, line = codecs.getincrementaldecoder("utf-8")(), 0, 1
    with file.open("rb") as stream:
        for block in iter(partial(stream.read, 2**20), b""):
            pending = len(decoder.getstate()[0])
            try:
                text = decoder.decode(block)
            except UnicodeDecodeError as e:
                at, byte = position - pending + e.start, e.object[e.start]
                line += e.object[: e.start].count(b"\n")
            else:
                if "\0" not in text:
                    position += len(block)
                    line += block.count(b"\n")
                    continue
                at, byte = position + block.index(b"\0"), 0
                line += block[: block.index(b"\0")].count(b"\n")
            raise UnicodeError(
                f"{file} is not UTF-8 text: byte 0x{byte:02x} at position {at:,} (line {line:,}). Convert "
                f"it with iconv, say; data files are read by their suffix: {', '.join(DATA_FILES)}."
            )
        if rest := decoder.getstate()[0]:
            raise UnicodeError(f"{file} ends in the middle of a character: byte 0x{rest[0]:02x}.")


def text_files(path: Path) -> Iterator[str]:
    """Yield the paragraphs of a text file, or of a folder's text files in the order of their names."""
    files = [path] if path.is_file() else sorted(p for s in TEXT_FILES for p in path.rglob(f"*{s}"))
    if not files:
        raise FileNotFoundError(f"{path} holds no .txt or .md file, and no data file.")
    for file in files:
        check_utf8(file)
        yield from paragraphs(file.read_text(encoding="utf-8-sig"))


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
