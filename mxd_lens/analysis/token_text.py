"""The texts of tokens as a page shows them, one after the other."""

from collections.abc import Sequence
from typing import Any

INCOMPLETE = "\ufffd"
"""What a tokenizer decodes bytes to that are no whole character."""


def token_texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """The text of each token of a sequence; joined, they are the sequence's text.

    A token is decoded behind the one before it, so that a space stands with the token it precedes in every
    family of tokenizers. A character that several tokens make up together, as byte-pair tokenizers do
    with emoji and rare scripts, stands at the first of them, with whatever else they spell; the others are
    "". A character cut off at the end of the sequence, or at its beginning, is U+FFFD.

    Args:
        tokenizer: a tokenizer of transformers.
        ids: the tokens.
    """

    def decode(some: Sequence[int]) -> str:
        return tokenizer.decode(list(some), clean_up_tokenization_spaces=False)

    texts = [""] * len(ids)
    before = first = 0  # where the group of tokens before this one, and this one, begin
    for i in range(len(ids)):
        if i and not (texts[first].endswith(INCOMPLETE) and decode(ids[i : i + 1]).startswith(INCOMPLETE)):
            before, first = first, i
        context, whole = decode(ids[before:first]), decode(ids[before : i + 1])
        texts[first] = whole[len(context) :] if whole.startswith(context) else decode(ids[first : i + 1])
    return texts


def vocabulary_text(tokenizer: Any, token: int) -> str:
    """The text of a token by itself; where it is only a part of a character, the tokenizer's name for it."""
    text = tokenizer.decode([token], clean_up_tokenization_spaces=False)
    return str(tokenizer.convert_ids_to_tokens(token)) if INCOMPLETE in text else text
