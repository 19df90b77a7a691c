"""Texts and token ids as batches of sequences: what every measurement here takes."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Int
from sae_lens import SAE
from torch import Tensor
from tqdm.auto import tqdm

from mxd_lens.hooks.positions import trained_positions
from mxd_lens.models import check_tokens

Text = str | Sequence[str] | Int[Tensor, "sequences positions"] | Sequence[Int[Tensor, " positions"]]
"""A string, strings (each a sequence of its own), token ids with one sequence per row, or sequences of
token ids of different lengths."""


class Batch(NamedTuple):
    """Some sequences, run together."""

    tokens: Int[Tensor, "sequences positions"]
    """Token ids; a shorter sequence is filled up."""
    present: Bool[Tensor, "sequences positions"]
    """False where a sequence was filled up."""
    first: int
    """The number of its first sequence in the text."""

    def counted(self, model: Any, sae: SAE[Any]) -> Bool[Tensor, "sequences positions"]:
        """The tokens that a measurement counts: those that the layer's training did not exclude."""
        return self.present & trained_positions(model, sae, self.tokens)


def counted_tokens(
    model: Any, sae: SAE[Any], tokens: Int[Tensor, "*batch positions"]
) -> Bool[Tensor, "*batch positions"]:
    """The tokens that the layer was trained on: `trained_positions`."""
    return trained_positions(model, sae, tokens)


def token_sequences_of(
    model: Any, sae: SAE[Any], text: Text
) -> Int[Tensor, "sequences positions"] | list[Int[Tensor, " positions"]]:
    """The token sequences of a text.

    A string gets the BOS that the layer's training had. One that is longer than the training's sequences is
    cut into several, each with its BOS.

    Raises:
        TypeError: it is neither text nor token ids.
        ValueError: there is no text, a string has no token, or the ids are no integers.
    """
    if isinstance(text, Tensor):
        check_tokens(text)
        return text
    texts: list[Any] = [text] if isinstance(text, str) else list(text)
    if not texts:
        raise ValueError("There is no text: give a string, a list of strings, or token ids.")
    if all(isinstance(one, Tensor) for one in texts):
        for one in texts:
            check_tokens(one[None])
        return texts
    if not all(isinstance(one, str) for one in texts):
        kinds = ", ".join(sorted({type(one).__name__ for one in texts}))
        raise TypeError(
            "A text is a string, a list of strings, or token ids [sequences, positions]; got a list of "
            f"{kinds}."
        )
    metadata = sae.cfg.metadata
    bos = [model.tokenizer.bos_token_id] if metadata.prepend_bos is not False else []
    longest = min(n for n in (metadata.context_size, model.cfg.n_ctx) if n) - len(bos)
    sequences = []
    for one in texts:
        ids = model.tokenizer(one, add_special_tokens=False)["input_ids"]
        if not ids:
            raise ValueError(f"A text has no token: {one[:80]!r}.")
        sequences += [torch.tensor(bos + ids[i : i + longest]) for i in range(0, len(ids), longest)]
    return sequences


def token_batches(
    sequences: Int[Tensor, "sequences positions"] | Sequence[Int[Tensor, " positions"]],
    batch_size: int,
    description: str = "Reading",
    progress: bool = True,
) -> Iterator[Batch]:
    """The sequences, some at a time."""
    with tqdm(total=len(sequences), desc=description, disable=not progress, unit="seq") as bar:
        for first in range(0, len(sequences), batch_size):
            batch = batch_of(sequences[first : first + batch_size], first)
            yield batch
            bar.update(len(batch.tokens))


def batch_of(
    sequences: Int[Tensor, "sequences positions"] | Sequence[Int[Tensor, " positions"]], first: int = 0
) -> Batch:
    """These sequences as one batch. What stands behind a token does not change what is computed there."""
    if isinstance(sequences, Tensor):
        return Batch(sequences, torch.ones_like(sequences, dtype=torch.bool), first)
    tokens = torch.nn.utils.rnn.pad_sequence(
        list(sequences), batch_first=True, padding_value=int(sequences[0][0])
    )
    lengths = torch.tensor([len(sequence) for sequence in sequences], device=tokens.device)
    present = torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]
    return Batch(tokens, present, first)
