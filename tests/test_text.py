"""Text by name, wherever it lies."""

import json
import logging
import os
import sysconfig
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import datasets
import nltk
import pytest
import torch
from datasets import Dataset, DatasetDict
from runs import run_config
from sae_lens import HookedSAETransformer
from tiny import WORDS

from mxd_lens import PairedActivationsStore
from mxd_lens.text import (
    load_text,
    one_column,
    seen_in_training,
    split_text,
    text_identity,
    token_sequences,
    training_text,
)

DOWNLOADED = Path(__file__).parents[2] / "shared" / "data" / "nltk_data"


@pytest.fixture
def nltk_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """nltk looks where NLTK_DATA says, or beside the repository."""
    if "NLTK_DATA" not in os.environ and DOWNLOADED.is_dir():
        monkeypatch.setattr(nltk.data, "path", [str(DOWNLOADED), *nltk.data.path])


@pytest.fixture
def no_nltk_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nltk.data, "path", [])


def test_the_embedded_text_is_large() -> None:
    texts = load_text("embedded")["text"]
    assert sum(map(len, texts)) > 1e6
    assert all(text.strip() for text in texts)


@pytest.mark.parametrize("order", [list, reversed])
def test_the_embedded_text_is_in_the_order_of_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, order: Callable[[list[Path]], Iterable[Path]]
) -> None:
    """Whatever the order of the file system, which is not the same on two machines."""
    for name in ("b.py", "a.py", "c/d.py", "c/test/e.py", "site-packages/f.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f'"""{f"This is {name}. " * 20}"""')
    (tmp_path / "broken.py").write_text("print 'Python 2'")
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    rglob = Path.rglob
    monkeypatch.setattr(Path, "rglob", lambda self, pattern: order(sorted(rglob(self, pattern))))
    docstrings = [text[:13] for text in load_text("embedded")["text"] if text.startswith("This is ")]
    assert [text.rstrip(".") for text in docstrings] == ["This is a.py", "This is b.py", "This is c/d.p"]


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_a_file_is_read_by_paragraph(tmp_path: Path, newline: str) -> None:
    file = tmp_path / "text"
    file.write_bytes("one\ntwo\n \nthree é\n\n\n\n".replace("\n", newline).encode())
    assert load_text(file)["text"][:] == load_text(str(file))["text"][:] == ["one\ntwo", "three é"]


@pytest.mark.parametrize(
    ("content", "byte", "position", "line"),
    [
        (b"one\ntwo\ncaf\xe9 au lait", "e9", "11", 3),
        ("utf-16".encode("utf-16"), "ff", "0", 1),
        (b"PK\x03\x04\0\0", "00", "4", 1),
        (b"a" * 2**20 + b"\xc3\xa9" + b"\n\xff", "ff", "1,048,579", 2),
    ],
)
@pytest.mark.parametrize("suffix", [".txt", "", ".jsonl", ".csv"])
def test_what_is_not_utf8_is_refused_with_the_byte(
    tmp_path: Path, content: bytes, byte: str, position: str, line: int, suffix: str
) -> None:
    (tmp_path / f"a{suffix}").write_bytes(content)
    message = rf"a{suffix} is not UTF-8 text: byte 0x{byte} at position {position} \(line {line}\)"
    with pytest.raises(ValueError, match=message):
        load_text(tmp_path / f"a{suffix}")


@pytest.mark.parametrize("cut", [1, 2])
def test_a_character_cut_in_two_is_refused(tmp_path: Path, cut: int) -> None:
    (tmp_path / "a.txt").write_bytes("text €".encode()[:-cut])
    with pytest.raises(ValueError, match="ends in the middle of a character: byte 0xe2"):
        load_text(tmp_path / "a.txt")


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("\ufeffone".encode())
    assert load_text(tmp_path / "a.txt")["text"][:] == ["one"]


# Data files

ROWS = ["the cat sat", "on a mat", 'a "quoted", red hill\nand a second line']
WRITERS: dict[str, Callable[[Dataset, Path], Any]] = {
    "a.parquet": lambda data, path: data.to_parquet(path),
    "a.jsonl": lambda data, path: data.to_json(path),
    "a.json": lambda data, path: path.write_text(json.dumps(data.to_list())),
    "a.csv": lambda data, path: data.to_csv(path, index=False),
    "a.tsv": lambda data, path: data.to_csv(path, index=False, sep="\t"),
    "saved": lambda data, path: data.save_to_disk(path),
    "split": lambda data, path: DatasetDict({"train": data}).save_to_disk(path),
    "folder/a.parquet": lambda data, path: data.to_parquet(path),
}


@pytest.mark.parametrize("column", ["text", "content", "body"])
@pytest.mark.parametrize("name", WRITERS)
def test_a_data_file_is_read_by_its_type(
    tmp_path: Path, name: str, column: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    WRITERS[name](Dataset.from_dict({column: ROWS, "stars": [1, 2, 3]}), path)
    source = path.parent if name.startswith("folder") else path
    assert load_text(source)["text"][:] == ROWS


def test_an_arrow_file(tmp_path: Path) -> None:
    Dataset.from_dict({"text": ROWS}).save_to_disk(tmp_path / "saved")
    (file,) = (tmp_path / "saved").glob("*.arrow")
    assert load_text(file)["text"][:] == ROWS


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl", "a.arrow"])
def test_a_data_file_that_is_none(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("no data at all {")
    with pytest.raises(ValueError, match=f"{name} cannot be read as a .{name[2:]} file") as e:
        load_text(tmp_path / name)
    assert "\n" not in str(e.value)


def test_a_folder_of_two_kinds(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("What this is.")
    Dataset.from_dict({"text": ROWS}).to_parquet(tmp_path / "a.parquet")
    assert load_text(tmp_path)["text"][:] == ROWS
    (tmp_path / "b.txt").write_text("prose")
    with pytest.raises(ValueError, match=r"holds \.parquet, \.txt files: name one file"):
        load_text(tmp_path)


# Rows


def test_rows_without_a_value_are_left_out_and_the_column_is_found() -> None:
    rows = Dataset.from_dict({"code": ["a", None, "b"], "stars": [1, 2, 3]})
    assert one_column(rows).to_list() == [{"text": "a"}, {"text": "b"}]
    assert list(one_column(rows.to_iterable_dataset())) == [{"text": "a"}, {"text": "b"}]
    ids = Dataset.from_dict({"input_ids": [[3, 4], None]})
    assert one_column(ids).to_list() == [{"tokens": [3, 4]}]
    assert one_column(DatasetDict({"validation": rows})).to_list() == [{"text": "a"}, {"text": "b"}]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (Dataset.from_dict({"a": ["x"], "b": ["y"]}), r"no column of text: its columns are a, b"),
        (Dataset.from_dict({"text": [None, None]}), "Every row .* is empty"),
        (Dataset.from_dict({"text": [1, 2]}), "must hold strings, got int"),
        (Dataset.from_dict({"tokens": ["x"]}), "must hold token ids, got str"),
        (Dataset.from_dict({"text": []}), "is empty"),
        (
            DatasetDict(
                {"train": Dataset.from_dict({"text": ["x"]}), "test": Dataset.from_dict({"text": ["y"]})}
            ),
            r'has 2 splits. Choose one of them: text\["train"\], text\["test"\]',
        ),
    ],
)
def test_rows_that_are_no_text(tiny_model: HookedSAETransformer, rows: Any, message: str) -> None:
    """The same sentence for evaluation and for training."""
    with pytest.raises(ValueError, match=message):
        token_sequences(tiny_model, rows, 3, context_size=8)
    with pytest.raises(ValueError, match=message):
        PairedActivationsStore.from_config(tiny_model, run_config(), rows)


@pytest.mark.parametrize("bad", [21, 10**6, -1])
def test_ids_beyond_the_vocabulary(tiny_model: HookedSAETransformer, bad: int) -> None:
    rows = Dataset.from_dict({"input_ids": [[1, 3, 4, 5, 6, 7, 8, 9], [1, 3, 4, 5, 6, 7, 8, bad]]})
    message = rf"holds the token id {bad}, and .* has 21 tokens"
    with pytest.raises(ValueError, match=message):
        token_sequences(tiny_model, rows, 3, context_size=8)
    with pytest.raises(ValueError, match=message):
        next(PairedActivationsStore.from_config(tiny_model, run_config(), rows))


def test_rows_of_ids_shorter_than_a_sequence(tiny_model: HookedSAETransformer) -> None:
    rows = Dataset.from_dict({"tokens": [[1, 3, 4, 5, 6, 7, 8, 9], [1, 3]]})
    with pytest.raises(ValueError, match="Row 1 of the text has 2 tokens, and context_size is 8"):
        token_sequences(tiny_model, rows, 3, context_size=8)
    with pytest.raises(ValueError, match="Row 1 of the text has 2 tokens, and context_size is 8"):
        next(PairedActivationsStore.from_config(tiny_model, run_config(), rows))


def test_training_reads_the_sequences_that_evaluation_reads(
    tiny_model: HookedSAETransformer, words: list[str]
) -> None:
    rows = Dataset.from_dict({"content": [words[0], None, *words[1:20], ""]})
    store = PairedActivationsStore.from_config(tiny_model, run_config(), rows)
    expected = token_sequences(tiny_model, rows, 1000, context_size=8)
    assert torch.equal(torch.stack(list(store.iterable_sequences)), expected)


def test_a_tokenizer_without_special_tokens(
    tiny_model: HookedSAETransformer,
    words: list[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(logging.getLogger("sae_lens"), "propagate", True)
    tokenizer = tiny_model.tokenizer
    tokenizer.bos_token = tokenizer.eos_token = tokenizer.pad_token = tokenizer.unk_token = None
    rows = Dataset.from_dict({"text": words[:20]})
    sequences = token_sequences(tiny_model, rows, 1000, context_size=8)
    assert 1 not in sequences
    assert "The tokenizer has no BOS token" in caplog.text
    store = PairedActivationsStore.from_config(tiny_model, run_config(), rows)
    assert torch.equal(torch.stack(list(store.iterable_sequences)), sequences)


# Held-out


def test_what_a_layer_was_trained_on_is_told_from_what_it_was_not(tmp_path: Path, words: list[str]) -> None:
    (tmp_path / "words.txt").write_text("\n\n".join(words))
    source = str(tmp_path / "words.txt")
    whole = load_text(source)
    train, test = split_text(whole)
    record = json.loads(json.dumps(training_text(source, train)))
    assert record["split"] == {"part": "train", "held_out": 0.1, "seed": 0}
    unique = sorted(set(test["text"]) - set(train["text"]))
    assert unique
    assert seen_in_training(record, Dataset.from_dict({"text": unique})) == "held-out"
    assert seen_in_training(record, Dataset.from_dict({"content": [*unique, train[5]["text"]]})) == (
        "seen in training"
    )
    assert seen_in_training(record, train) == "seen in training"
    assert seen_in_training(record, Dataset.from_dict({"text": ["no such sentence"]})) == "held-out"
    assert seen_in_training(training_text(source, whole), test) == "seen in training"
    assert seen_in_training(training_text("someone/data", train), test) == "unknown"
    assert seen_in_training(None, test) == "unknown"
    (tmp_path / "words.txt").write_text("\n\n".join([*words, "one more row"]))
    assert seen_in_training(record, Dataset.from_dict({"text": unique})) == "unknown"
    assert seen_in_training(training_text(source, train.to_iterable_dataset()), test) == "unknown"


def test_the_identity_of_a_text_is_its_rows() -> None:
    rows = Dataset.from_dict({"text": ["ab", "c"]})
    assert text_identity(rows) == text_identity(Dataset.from_dict({"content": ["ab", None, "c"]}))
    others = (["a", "bc"], ["ab", "c", "c"], ["c", "ab"])
    assert len({text_identity(Dataset.from_dict({"text": other}))["hash"] for other in others}) == 3
    assert text_identity(rows)["hash"] not in {
        text_identity(Dataset.from_dict({"text": other}))["hash"] for other in others
    }


def test_a_folder_is_read_in_the_order_of_names(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("b.txt", "a.md", "sub/c.txt", "ignored.py"):
        (tmp_path / name).write_text(f"text of {name}")
    assert load_text(tmp_path)["text"][:] == ["text of a.md", "text of b.txt", "text of sub/c.txt"]


@pytest.mark.parametrize("content", ["", "\n\n \n"])
def test_an_empty_file(tmp_path: Path, content: str) -> None:
    (tmp_path / "empty.txt").write_text(content)
    with pytest.raises(ValueError, match=r"no text in .*empty\.txt"):
        load_text(tmp_path / "empty.txt")


def test_a_folder_without_text(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no \.txt or \.md file"):
        load_text(tmp_path)


@pytest.mark.parametrize("path", ["./nothing", "/nothing/here", "nothing.txt", "nothing/here.md"])
def test_a_path_that_is_not_there(path: str) -> None:
    with pytest.raises(FileNotFoundError, match="no text at"):
        load_text(path)


def test_no_name_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "notes.txt").write_text("not meant as a data set")
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError)):
        load_text("")


@pytest.mark.parametrize(
    ("corpus", "file", "words"),
    [
        ("inaugural", "1789-Washington.txt", "no event could have filled me with greater anxieties"),  # plain
        ("shakespeare", "dream.xml", "Now, fair Hippolyta, our nuptial hour"),
        ("sentence_polarity", "rt-polarity.pos", "the rock is destined to be the 21st"),  # tokens
        ("brown", "ca01", '"no evidence" that any irregularities took place.'),  # tagged tokens
    ],
)
@pytest.mark.usefixtures("nltk_data")
def test_an_nltk_corpus_is_running_text(
    corpus: str, file: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = getattr(nltk.corpus, corpus)
    try:
        assert file in reader.fileids()
    except LookupError:
        pytest.skip(f"the nltk corpus is not here: python -m nltk.downloader {corpus}")
    monkeypatch.setattr(reader, "fileids", lambda: [file])
    texts = load_text(f"nltk:{corpus}")["text"]
    assert words in " ".join(" ".join(texts).split())


@pytest.mark.usefixtures("no_nltk_data")
def test_a_corpus_that_was_not_downloaded() -> None:
    with pytest.raises(LookupError, match=r"python -m nltk\.downloader webtext"):
        load_text("nltk:webtext")


@pytest.mark.parametrize(
    "name",
    [
        "no_such_corpus",
        *(name for name in ("reader", "CorpusReader", "demo")),
    ],
)
def test_a_corpus_nltk_does_not_know(name: str) -> None:
    with pytest.raises(LookupError, match=f"nltk has no corpus '{name}'"):
        load_text(f"nltk:{name}")


def test_a_data_set_on_the_hub_without_a_network() -> None:
    with pytest.raises(ConnectionError, match="no-one/no-such-data"):
        load_text("no-one/no-such-data")


# Packing


@pytest.mark.parametrize("prepend_bos", [True, False])
@pytest.mark.parametrize("separator", ["bos", "eos", None])
def test_sequences_are_packed_end_to_end(
    tiny_model: HookedSAETransformer, prepend_bos: bool, separator: str | None
) -> None:
    """Against the packing written out: rows joined by the separator, cut, BOS in front of each piece."""
    rows = ["the cat sat", "on", "a big red hill and then it ran", "under the small blue mat"]
    sequences = token_sequences(tiny_model, Dataset.from_dict({"text": rows}), 100, 5, prepend_bos, separator)
    bos, eos = 1, 2
    stream = [[3 + WORDS.index(word) for word in row.split()] for row in rows]
    expected: list[list[int]] = []
    piece: list[int] = []
    for row in stream:
        if piece and separator is not None:
            piece.append(bos if separator == "bos" else eos)
        for token in row:
            if len(piece) == 5:
                expected.append(piece)
                piece = []
            if not piece and prepend_bos:
                piece.append(bos)
            piece.append(token)
        if len(piece) == 5:
            expected.append(piece)
            piece = []
    assert sequences.tolist() == expected


def test_no_more_sequences_than_asked_for(tiny_model: HookedSAETransformer, words: list[str]) -> None:
    text = Dataset.from_dict({"text": words})
    assert token_sequences(tiny_model, text, 3, context_size=8).shape == (3, 8)


def test_a_text_too_short_for_one_sequence(tiny_model: HookedSAETransformer) -> None:
    with pytest.raises(ValueError, match="does not fill one sequence of 128 tokens"):
        token_sequences(tiny_model, Dataset.from_dict({"text": ["the cat"]}), 3)
