"""Text by name, wherever it lies."""

import os
import sysconfig
from collections.abc import Callable, Iterable
from pathlib import Path

import nltk
import pytest
from conftest import WORDS
from datasets import Dataset
from sae_lens import HookedSAETransformer

from mxd_lens.text import load_text, token_sequences

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


def test_bytes_that_are_no_utf8_do_not_stop_it(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"caf\xe9 au lait")
    assert load_text(tmp_path / "a.txt")["text"][0] == "caf\ufffd au lait"


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
