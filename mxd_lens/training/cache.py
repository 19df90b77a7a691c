"""Activations on disk, so that the language model runs once and epochs run from there."""

import json
import os
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import torch
import xxhash
from jaxtyping import Float
from torch import Tensor

from mxd_lens.artifacts.files import LOCK, WriteError, full_path, locked, remove_stale, write_text
from mxd_lens.artifacts.identity import RunIdentity


class ActivationCache:
    """A file of activations, batch after batch, in the order the language model made them.

    The rows lie in `activations.bin`; `batches.jsonl` has a line for every batch that was written to its end,
    with a checksum of its rows. Any number of processes may read a cache; one at a time may add to it, and
    holds the folder's lock from its first batch on until `close`.
    """

    def __init__(self, folder: str | Path, width: int, dtype: torch.dtype, identity: RunIdentity) -> None:
        """Opens the cache in `folder`, or starts one there.

        Args:
            folder: where the files are.
            width: of a row.
            dtype: of the rows on disk.
            identity: of all that decides the activations.

        Raises:
            ValueError: the folder holds other activations, or the cache is damaged.
        """
        self.folder = full_path(folder)
        self.width = width
        self.dtype = dtype
        self.identity = identity
        self.is_complete = False
        self._rows = self.folder / "activations.bin"
        self._index = self.folder / "batches.jsonl"
        self._batches: list[dict[str, Any]] = []
        self._lock: ExitStack | None = None
        remove_stale(self.folder)
        self._read_index()

    def __len__(self) -> int:
        """The number of batches."""
        return len(self._batches)

    def __contains__(self, batch: int) -> bool:
        return 0 <= batch < len(self)

    def __getitem__(self, batch: int) -> Float[Tensor, "tokens width"]:
        """A batch's rows. Raises ValueError where they are not the ones that were written."""
        start, end = self._start_of(batch), self._start_of(batch + 1)
        with self._rows.open("rb") as file:
            file.seek(start * self._row_bytes)
            buffer = bytearray(file.read((end - start) * self._row_bytes))
        if xxhash.xxh3_64_hexdigest(buffer) != self._batches[batch]["hash"]:
            raise self._damaged(f"batch {batch:,} of {self._rows.name} is not what was written")
        if start == end:
            return torch.empty(0, self.width, dtype=self.dtype)
        return torch.frombuffer(buffer, dtype=self.dtype).view(-1, self.width)

    def append(self, rows: Float[Tensor, "tokens width"]) -> Float[Tensor, "tokens width"]:
        """Writes a batch; returns it as it will be read, rounded to the cache's dtype.

        Raises:
            LockedError: another process is adding to the cache.
            WriteError: the disk is full, or the folder cannot be written to.
        """
        if rows.shape[-1] != self.width:
            raise ValueError(f"the cache's rows have width {self.width}, got {tuple(rows.shape)}.")
        rows = rows.to("cpu", self.dtype).contiguous()
        content = rows.view(torch.uint8).numpy().data
        self._own()
        try:
            with self._rows.open("ab") as file:
                file.write(content)
            batch = {"end": self._start_of(len(self)) + len(rows), "hash": xxhash.xxh3_64_hexdigest(content)}
            self._write_line(batch)
        except OSError as e:
            with suppress(OSError):
                os.truncate(self._rows, self._start_of(len(self)) * self._row_bytes)
            raise WriteError(self.folder, f"{e.strerror}. The activations so far are kept") from e
        self._batches.append(batch)
        return rows

    def mark_complete(self) -> None:
        """Says that there is no more text: an epoch ends with the last batch."""
        if not self.is_complete:
            self._own()
            self.is_complete = True
            self._write_line({"complete": True})
            self.close()

    def close(self) -> None:
        """Lets other processes add to the cache."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _own(self) -> None:
        """Take the lock, and cut off what a killed process left behind the last complete batch."""
        if self._lock is not None:
            return
        known = len(self)
        with ExitStack() as stack:
            stack.enter_context(locked(self.folder / LOCK, "training run that fills this activation cache"))
            self._read_index()
            if len(self) != known or self.is_complete:
                raise ValueError(
                    f"Another process has added to {self.folder} in the meantime: start the run again."
                )
            header = {"identity": self.identity.to_dict(), "width": self.width, "dtype": str(self.dtype)}
            lines = [header, *self._batches]
            write_text(self._index, "".join(json.dumps(line) + "\n" for line in lines))
            with self._rows.open("ab") as file:
                file.truncate(self._start_of(known) * self._row_bytes)
            self._lock = stack.pop_all()

    def _read_index(self) -> None:
        text = self._index.read_text(encoding="utf-8") if self._index.exists() else ""
        # The line that a killed run was writing is not counted.
        lines = [line for line in text.splitlines(keepends=True) if line.endswith("\n")]
        if not lines:
            return
        try:
            header, *batches = map(json.loads, lines)
            then = RunIdentity(
                {"width": header["width"], "dtype": header["dtype"], **header.get("identity", {"version": 0})}
            )
            self.is_complete = any(batch.get("complete", False) for batch in batches)
            batches = [batch for batch in batches if "end" in batch]
            ends = [0, *(int(batch["end"]) for batch in batches)]
        except (ValueError, TypeError, KeyError, AttributeError) as e:
            raise self._damaged(f"{self._index.name} cannot be read ({e})") from e
        now = RunIdentity({"width": self.width, "dtype": str(self.dtype), **self.identity.fields})
        then.require(now, self.folder)
        if ends != sorted(ends) or not all("hash" in batch for batch in batches):
            raise self._damaged(f"the batches in {self._index.name} are not in order")
        if (self._rows.stat().st_size if self._rows.exists() else 0) < ends[-1] * self._row_bytes:
            raise self._damaged(f"{self._rows.name} is shorter than {self._index.name} says")
        self._batches = batches

    def _damaged(self, what: str) -> ValueError:
        return ValueError(
            f"The activation cache {self.folder} is damaged: {what}. Delete the folder; the next run fills "
            "it again."
        )

    def _start_of(self, batch: int) -> int:
        return self._batches[batch - 1]["end"] if batch else 0

    @property
    def _row_bytes(self) -> int:
        return self.width * self.dtype.itemsize

    def _write_line(self, line: dict[str, Any]) -> None:
        with self._index.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
