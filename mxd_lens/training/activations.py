"""Activations in pairs: an MLP's input and its output on the same token, from one forward pass."""

import warnings
from collections.abc import Callable, Iterable, Iterator
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from sae_lens import ActivationsStore
from sae_lens.config import HfDataset
from sae_lens.constants import ACTIVATIONS_STORE_STATE_FILENAME
from sae_lens.util import str_to_dtype
from safetensors.torch import load_file, save_file
from torch import Tensor
from typing_extensions import Self, override

from mxd_lens.artifacts.identity import RunIdentity
from mxd_lens.hooks.site import check_free
from mxd_lens.models import check_fires, hook_point_name, special_token_ids
from mxd_lens.text import (
    check_vocabulary,
    load_text,
    one_column,
    packed_sequences,
    training_text,
)
from mxd_lens.training.cache import ActivationCache
from mxd_lens.training.config import TranscoderRunnerConfig

EMPTY_BATCHES = 1000
"""Batches of sequences without one token to train on, after which a run gives up."""
CACHE_TOLERANCE = 0.02
"""Relative error up to which a cache's rows, which may be bfloat16, are those of the model."""


class MixingBuffer:
    """Mixes activations of many sequences into batches, as SAELens' `mixing_buffer`, with a state.

    Rows are collected until there are `buffer_size`, shuffled, and served in batches until
    `mix_fraction` of the buffer is left, which mixes with the next rows. SAELens' generator yields
    the same batches but cannot be saved in the middle, and a run could not be resumed exactly.
    """

    def __init__(self, buffer_size: int, batch_size: int, mix_fraction: float, seed: int) -> None:
        if buffer_size < batch_size:
            raise ValueError(
                f"the buffer holds {buffer_size} tokens, fewer than a batch of {batch_size}: "
                "raise n_batches_in_buffer or lower train_batch_size_tokens."
            )
        if not 0 <= mix_fraction <= 1:
            raise ValueError(f"activations_mixing_fraction must be from 0 to 1, got {mix_fraction}.")
        self.buffer_size = buffer_size
        self.batch_size = batch_size
        self.mix_fraction = mix_fraction
        self.generator = torch.Generator().manual_seed(seed)
        self._rows: list[Tensor] = []
        self._batches_ready = 0

    @property
    def is_ready(self) -> bool:
        """Whether a batch can be taken."""
        return self._batches_ready > 0

    @property
    def n_rows(self) -> int:
        """Rows in the buffer."""
        return sum(map(len, self._rows))

    def add(self, rows: Float[Tensor, "tokens width"]) -> None:
        """Adds rows; once the buffer is full, shuffles it and makes batches ready."""
        if len(rows):
            self._rows.append(rows)
        if self.n_rows < self.buffer_size:
            return
        buffer = torch.cat(self._rows)
        if self.mix_fraction > 0:
            buffer = buffer[torch.randperm(len(buffer), generator=self.generator)]
        to_serve = len(buffer) - int(self.buffer_size * self.mix_fraction)
        self._rows = [buffer]
        self._batches_ready = max(1, to_serve // self.batch_size)

    def take(self) -> Float[Tensor, "batch width"]:
        """The next batch."""
        (buffer,) = self._rows
        self._batches_ready -= 1
        self._rows = [buffer[self.batch_size :]]
        return buffer[: self.batch_size]

    def state_dict(self) -> dict[str, Tensor]:
        return {
            "rows": torch.cat(self._rows) if self._rows else torch.empty(0),
            "batches_ready": torch.tensor(self._batches_ready),
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self._rows = [state["rows"]] if state["rows"].numel() else []
        self._batches_ready = int(state["batches_ready"])
        self.generator.set_state(state["generator"])


class PairedActivationsStore(ActivationsStore):
    """Batches [x | y]: the activations at two hooks on the same tokens, [batch, d_in + d_out].

    SAELens' `ActivationsStore` tokenises the text and captures both hooks in one forward pass that
    stops after the layer; the batches are mixed as SAELens mixes them. When the text ends it starts
    again. An iterator: `SAETrainer` takes it as its data provider.

    For layers that are trained beside each other the batches hold every hook point of theirs once, side
    by side in one row a token; `select` gives each its own.

    `state_dict` holds everything that decides the coming batches, so that a store loaded from it continues
    with exactly the batches this one would have given.
    """

    columns: dict[str, slice]
    """Where in a batch's rows the activations of a hook point are, by the name in the config."""
    identity: RunIdentity
    """What decides the batches: the model's weights, its hook points, the text, how it is tokenised."""
    training_text: dict[str, Any]
    """The record of the text that a layer keeps, see `text.training_text`."""
    on_buffering: Callable[[int, int], None] | None = None
    """Called while the buffer fills, with the rows that it holds and those that it takes."""

    _buffer: MixingBuffer
    _cache: ActivationCache | None
    _epoch: int
    _llm_batch: int
    _sequences_read: int
    _rows_in_epoch: int

    @classmethod
    @override
    def from_config(
        cls,
        model: Any,
        cfg: TranscoderRunnerConfig,
        override_dataset: HfDataset | None = None,
        beside: Iterable[TranscoderRunnerConfig] = (),
        seed: int | None = None,
    ) -> Self:
        """The store of a run.

        Args:
            model: any hooked model.
            cfg: says which text, how it is tokenised and mixed, and which hooks.
            override_dataset: used instead of cfg.dataset_path.
            beside: runs whose hooks are captured in the same forward pass.
            seed: of the order of tokens. Default: cfg.seed.

        Raises:
            ValueError: the model has no such hook point, does not run it, or has a layer attached there; or
                there is no text; or the cache holds the activations of something else.
        """
        dataset: Any = override_dataset
        if dataset is None:
            dataset = load_text(cfg.dataset_path, cfg.streaming)
        if not cfg.use_chat_formatting:
            dataset = one_column(dataset)
        if cfg.context_size > model.cfg.n_ctx:
            raise ValueError(
                f"context_size is {cfg.context_size}; {model.cfg.model_name} reads {model.cfg.n_ctx} tokens."
            )
        runs = (cfg, *beside)
        # In an order of its own: what is trained first, or an SAE on a hook that is captured anyway,
        # does not change what a cache holds.
        ordered = sorted(runs, key=lambda run: (-len(run.hook_widths), run.hook_name, run.hook_name_out))
        widths = {name: width for run in ordered for name, width in run.hook_widths.items()}
        for name in widths:
            check_free(model, name)
        check_fires(model, *widths)
        hooks = {name: hook_point_name(model, name) for name in widths}
        excluded = special_token_ids(model, cfg.exclude_special_tokens)
        with warnings.catch_warnings():
            # Too few samples, not tokenised: both are what most users here want.
            warnings.simplefilter("ignore", UserWarning)
            store = cls.from_config_multi_hook(
                model,
                dataset=dataset,
                hook_names=list(hooks.values()),
                hook_d_ins={hook: widths[name] for name, hook in hooks.items()},
                context_size=cfg.context_size,
                n_batches_in_buffer=cfg.n_batches_in_buffer,
                total_training_tokens=cfg.training_tokens,
                store_batch_size_prompts=cfg.store_batch_size_prompts,
                train_batch_size_tokens=cfg.train_batch_size_tokens,
                prepend_bos=cfg.prepend_bos,
                device=cfg.act_store_device,
                dtype=cfg.dtype,
                model_kwargs=cfg.model_kwargs,
                autocast_lm=cfg.autocast_lm,
                seqpos_slice=cfg.seqpos_slice,
                exclude_special_tokens=torch.tensor(excluded, device=cfg.act_store_device)
                if excluded
                else None,
                disable_concat_sequences=cfg.disable_concat_sequences,
                sequence_separator_token=cfg.sequence_separator_token,
                activations_mixing_fraction=cfg.activations_mixing_fraction,
                use_chat_formatting=cfg.use_chat_formatting,
            )
        store._buffer = MixingBuffer(
            store.n_batches_in_buffer * store.training_context_size,
            store.train_batch_size_tokens,
            store.activations_mixing_fraction,
            cfg.seed if seed is None else seed,
        )
        store._epoch = store._llm_batch = store._sequences_read = store._rows_in_epoch = 0
        store.check_widths(runs)
        ends = list(accumulate(widths.values(), initial=0))
        store.columns = {
            name: slice(start, end) for name, start, end in zip(widths, ends[:-1], ends[1:], strict=True)
        }
        store.training_text = training_text(cfg.dataset_path, dataset)
        store.identity = store._identity()
        store._cache = None
        if cfg.use_cached_activations:
            assert cfg.cached_activations_path is not None  # set by the config
            store._cache = ActivationCache(
                cfg.cached_activations_path,
                width=ends[-1],
                dtype=str_to_dtype(cfg.cached_activations_dtype),
                identity=store.identity,
            )
            store.check_cache(store._cache)
        return store

    @property
    def hook_names(self) -> list[str]:
        """The hook points captured, as this model calls them."""
        assert self._hook_names is not None  # set by from_config_multi_hook
        return self._hook_names

    def check_widths(self, runs: Iterable[TranscoderRunnerConfig]) -> None:
        """Runs one token to see whether d_in and d_out are what the hooks give."""
        activations = self.get_multi_hook_activations(
            torch.zeros(1, 1, dtype=torch.long, device=self.model.cfg.device)
        )
        for cfg in runs:
            for hook, field in ((cfg.hook_name, "d_in"), (cfg.hook_name_out, "d_out")):
                name = hook_point_name(self.model, hook)
                width, expected = activations[name].shape[-1], cfg.hook_widths[hook]
                if width != expected:
                    raise ValueError(f"{field} is {expected}, but {name} of this model has width {width}.")

    def select(
        self, rows: Float[Tensor, "batch width"], cfg: TranscoderRunnerConfig
    ) -> Float[Tensor, "batch d_in_plus_d_out"]:
        """What the layer of `cfg` is trained on, out of a batch for several layers."""
        return torch.cat([rows[:, self.columns[name]] for name in cfg.hook_widths], dim=1)

    def _identity(self) -> RunIdentity:
        text = {name: value for name, value in self.training_text.items() if name not in ("source", "split")}
        excluded = self.exclude_special_tokens
        return RunIdentity.of(
            model=self.model,
            hooks=self.hook_names,
            text=text,
            prepend_bos=self.prepend_bos,
            sequence_separator_token=self.sequence_separator_token,
            disable_concat_sequences=self.disable_concat_sequences,
            use_chat_formatting=self.use_chat_formatting,
            context_size=self.context_size,
            store_batch_size_prompts=self.store_batch_size_prompts,
            seqpos_slice=self.seqpos_slice,
            excluded_tokens=None if excluded is None else excluded.tolist(),
            autocast_lm=self.autocast_lm,
            model_kwargs=self.model_kwargs,
            dtype=str(self.dtype),
        )

    def check_cache(self, cache: ActivationCache) -> None:
        """Raises ValueError where the model does not give what the cache holds.

        The first batch and one of the next thirty are compared, to a few per cent: a forward pass is not the
        same to the last bit on every machine.
        """
        if not len(cache):
            return
        later = int(torch.randint(min(len(cache), 32), ()))
        for batch in range(later + 1):
            tokens = self._read(self.store_batch_size_prompts)
            if tokens is not None and batch in (0, later):
                pairs = self._capture(tokens).float()
                known = cache[batch].to(pairs)
                error = (known - pairs).norm(dim=-1) if len(known) == len(pairs) else torch.tensor(torch.inf)
                if (error > CACHE_TOLERANCE * pairs.norm(dim=-1)).any():
                    raise ValueError(
                        f"{cache.folder} holds other activations than this model gives on this text (batch "
                        f"{batch}). Choose another cached_activations_path, or delete the folder."
                    )
        self._restart_text()

    def close(self) -> None:
        """Lets other runs add to the cache of activations."""
        if self._cache is not None:
            self._cache.close()

    @override
    def __next__(self) -> Float[Tensor, "batch d_in_plus_d_out"]:
        empty = 0
        while not self._buffer.is_ready:
            pairs = self._next_pairs()
            empty = 0 if len(pairs) else empty + 1
            if empty == EMPTY_BATCHES:
                raise ValueError(
                    f"{EMPTY_BATCHES * self.store_batch_size_prompts:,} sequences in a row hold no token to "
                    "train on: exclude_special_tokens leaves all of them out."
                )
            self._buffer.add(pairs)
            if self.on_buffering is not None:
                size = self._buffer.buffer_size
                self.on_buffering(min(self._buffer.n_rows, size), size)
        return self._buffer.take()

    @override
    def _iterate_tokenized_sequences(self) -> Iterator[Int[Tensor, " context"]]:
        """The sequences of the text, packed as `token_sequences` packs them."""
        if self.use_chat_formatting:
            return super()._iterate_tokenized_sequences()
        return packed_sequences(
            self.model,
            self.dataset,
            self.context_size,
            self.prepend_bos,
            self.sequence_separator_token,
            self.disable_concat_sequences,
        )

    def _next_pairs(self) -> Float[Tensor, "tokens d_in_plus_d_out"]:
        """The pairs of the next batch of sequences, special tokens left out."""
        cache = self._cache
        if cache is not None and self._llm_batch in cache:
            pairs = cache[self._llm_batch].to(self.device, self.dtype)
        elif (tokens := self._next_sequences()) is None:
            if self._llm_batch == 0:
                raise ValueError(
                    f"The text is too short: it does not fill one sequence of {self.context_size} tokens."
                )
            if self._rows_in_epoch == 0:
                raise ValueError("Every token of the text is excluded by exclude_special_tokens.")
            if cache is not None and len(cache) == self._llm_batch:
                cache.mark_complete()
            self._start_epoch()
            return self._next_pairs()
        else:
            pairs = self._capture(tokens)
            if cache is not None:
                # A run resumed with an emptier cache than it had continues without filling it.
                rounded = cache.append(pairs) if len(cache) == self._llm_batch else pairs.to(cache.dtype)
                pairs = rounded.to(self.device, self.dtype)
        self._llm_batch += 1
        self._rows_in_epoch += len(pairs)
        if cache is not None and cache.is_complete and self._llm_batch == len(cache):
            self._start_epoch()
        return pairs

    def _start_epoch(self) -> None:
        self._epoch += 1
        self._llm_batch = self._sequences_read = self._rows_in_epoch = 0
        self._restart_text()

    def _restart_text(self) -> None:
        self.n_dataset_processed = 0
        self.iterable_sequences = self._iterate_tokenized_sequences()

    def _next_sequences(self) -> Int[Tensor, "sequences context"] | None:
        """The sequences of batch `_llm_batch`; None at the end of the text."""
        behind = self._llm_batch * self.store_batch_size_prompts - self._sequences_read
        self._read(behind)  # a resumed run, or batches that were cached
        sequences = self._read(self.store_batch_size_prompts)
        self._sequences_read += behind + (0 if sequences is None else len(sequences))
        return sequences

    def _read(self, n: int) -> Int[Tensor, "sequences context"] | None:
        """The next n sequences of the text, fewer where it ends; None where there is none."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "To copy construct from a tensor", UserWarning)
            sequences = list(islice(self.iterable_sequences, n))
        if not sequences:
            return None
        tokens = torch.stack(sequences)
        check_vocabulary(self.model, tokens)
        return tokens

    @torch.no_grad()
    def _capture(self, tokens: Int[Tensor, "sequences context"]) -> Float[Tensor, "tokens d_in_plus_d_out"]:
        activations = self.get_multi_hook_activations(tokens.to(self.model.cfg.device))
        pairs = torch.cat([activations[hook] for hook in self.hook_names], dim=-1)
        pairs = pairs.flatten(0, 1).to(self.device, self.dtype)
        if self.exclude_special_tokens is None:
            return pairs
        token_ids = tokens[:, slice(*self.seqpos_slice)].flatten().to(self.device)
        return pairs[~torch.isin(token_ids, self.exclude_special_tokens)]

    @override
    def get_data_loader(self) -> Iterator[Tensor]:
        return self

    @override
    def state_dict(self) -> dict[str, Tensor]:
        return {
            "epoch": torch.tensor(self._epoch),
            "llm_batch": torch.tensor(self._llm_batch),
            "rows_in_epoch": torch.tensor(self._rows_in_epoch),
            **{f"buffer.{name}": value for name, value in self._buffer.state_dict().items()},
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continues where the store that gave `state` was."""
        self._start_epoch()
        self._epoch, self._llm_batch = int(state["epoch"]), int(state["llm_batch"])
        self._rows_in_epoch = int(state["rows_in_epoch"])
        self._buffer.load_state_dict(
            {name.removeprefix("buffer."): value for name, value in state.items() if "buffer." in name}
        )

    @override
    def save(self, file_path: str) -> None:
        save_file(self.state_dict(), file_path)

    @override
    def load(self, file_path: str) -> None:
        state = load_file(file_path)
        rows = state["buffer.rows"].to(self.device)
        self.load_state_dict(state | {"buffer.rows": rows})

    @override
    def load_from_checkpoint(self, checkpoint_path: str | Path) -> None:
        self.load(str(Path(checkpoint_path) / ACTIVATIONS_STORE_STATE_FILENAME))
