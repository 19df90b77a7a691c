"""Activations on disk, so that the language model runs once and epochs run from there."""

import json
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor


class ActivationCache:
    """A file of activations, batch after batch, in the order the language model made them.

    The rows lie in `activations.bin`; `batches.jsonl` has a line for every batch that is wholly
    written, so that what an interrupted run left is either usable or not counted.
    """

    def __init__(self, folder: Path, width: int, dtype: torch.dtype, key: str) -> None:
        """Opens the cache in `folder`, or starts one there.

        Args:
            folder: where the files are.
            width: of a row.
            dtype: of the rows on disk.
            key: a hash of all that decides the activations.

        Raises:
            ValueError: the folder holds the activations of something else.
        """
        self.folder = folder
        self.width = width
        self.dtype = dtype
        self._rows = folder / "activations.bin"
        self._index = folder / "batches.jsonl"
        header = {"key": key, "width": width, "dtype": str(dtype)}
        self._starts = [0]
        self.is_complete = False
        text = self._index.read_text(encoding="utf-8") if self._index.exists() else ""
        # The line that a killed run was writing is no line.
        lines = [line for line in text.splitlines(keepends=True) if line.endswith("\n")]
        if lines:
            found, *batches = map(json.loads, lines)
            if found != header:
                raise self.of_something_else()
            self._starts += [batch["end"] for batch in batches if "end" in batch]
            self.is_complete = any(batch.get("complete", False) for batch in batches)
            if "".join(lines) != text:
                whole = self._index.with_suffix(".whole")
                whole.write_text("".join(lines), encoding="utf-8")
                whole.replace(self._index)
            self._truncate_to(self._starts[-1])
        else:
            folder.mkdir(parents=True, exist_ok=True)
            self._rows.write_bytes(b"")
            self._index.write_text(json.dumps(header) + "\n", encoding="utf-8")

    def __len__(self) -> int:
        """The number of batches."""
        return len(self._starts) - 1

    def __contains__(self, batch: int) -> bool:
        return 0 <= batch < len(self)

    def __getitem__(self, batch: int) -> Float[Tensor, "tokens width"]:
        start, end = self._starts[batch], self._starts[batch + 1]
        if start == end:
            return torch.empty(0, self.width, dtype=self.dtype)
        with self._rows.open("rb") as file:
            file.seek(start * self._row_bytes)
            buffer = bytearray(file.read((end - start) * self._row_bytes))
        return torch.frombuffer(buffer, dtype=self.dtype).view(-1, self.width)

    def of_something_else(self) -> ValueError:
        """The error for a cache that does not hold what is wanted."""
        return ValueError(
            f"{self.folder} holds the activations of another model, layer, text or tokenisation: "
            "name another cached_activations_path, or delete it."
        )

    def append(self, rows: Float[Tensor, "tokens width"]) -> Float[Tensor, "tokens width"]:
        """Writes a batch; returns it as it will be read, rounded to the cache's dtype."""
        if rows.shape[-1] != self.width:
            raise ValueError(f"the cache's rows have width {self.width}, got {tuple(rows.shape)}.")
        rows = rows.to("cpu", self.dtype).contiguous()
        with self._rows.open("ab") as file:
            file.write(rows.view(torch.uint8).numpy().data)
        self._starts.append(self._starts[-1] + len(rows))
        self._write_line({"end": self._starts[-1]})
        return rows

    def mark_complete(self) -> None:
        """Says that there is no more text: an epoch ends with the last batch."""
        if not self.is_complete:
            self.is_complete = True
            self._write_line({"complete": True})

    @property
    def _row_bytes(self) -> int:
        return self.width * self.dtype.itemsize

    def _truncate_to(self, rows: int) -> None:
        with self._rows.open("ab") as file:
            if file.tell() < rows * self._row_bytes:
                raise ValueError(
                    f"{self._rows} is shorter than {self._index.name} says: delete {self.folder}."
                )
            file.truncate(rows * self._row_bytes)

    def _write_line(self, line: dict[str, object]) -> None:
        with self._index.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
