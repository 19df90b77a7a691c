"""A model and its layers, in one object for a session."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

from jaxtyping import Int
from sae_lens import SAE
from torch import Tensor

from mxd_lens.analysis.card import ExpertCard, expert_card
from mxd_lens.analysis.concepts import find_experts
from mxd_lens.analysis.prompt import TopExperts, top_experts
from mxd_lens.analysis.sequences import Text
from mxd_lens.analysis.statistics import ExpertStatistics, expert_statistics
from mxd_lens.dashboards.render import build_dashboard
from mxd_lens.evals.faithfulness import FaithfulnessReport, evaluate_all
from mxd_lens.hooks.site import check_fits, hook_names
from mxd_lens.hooks.steer import ablate, steer
from mxd_lens.models import load_model
from mxd_lens.pretrained.load import load_layer
from mxd_lens.pretrained.registry import list_pretrained

Of = str | None
"""The name of a layer; None: the only one."""


class Lens:
    """A hooked model and one or more layers of it, with what is asked of them most.

        lens = Lens.from_pretrained("smollm2-135m-mxd")
        print(lens.read("The capital of France is"))
        print(lens.card(763))
        with lens.steer({763: 40.0}):
            print(lens.model.generate("He was born in June"))

    Every method calls the function of the same name, which has more options, with the model and the layers.
    A text is a string, a list of strings, or token ids with one sequence per row. Where there are several
    layers, results come by the layers' names, and what concerns one layer needs its name, `of`.

    Args:
        model: any hooked model.
        layers: a layer; several, named by their output hook points; or a dictionary of layers by name.

    Raises:
        TypeError: model and layers are swapped.
        ValueError: there is no layer, two have one name, or a layer does not fit the model.
    """

    def __init__(self, model: Any, layers: SAE[Any] | Iterable[SAE[Any]] | Mapping[str, SAE[Any]]) -> None:
        if isinstance(model, SAE) or not hasattr(model, "hook_dict"):
            raise TypeError(
                f"Lens takes a hooked model first and then its layers, Lens(model, layers), got a "
                f"{type(model).__name__} first."
            )
        named: list[tuple[str, SAE[Any]]]
        if isinstance(layers, Mapping):
            named = list(layers.items())
        else:
            several = [layers] if isinstance(layers, SAE) else list(layers)
            named = [(hook_names(sae)[1], sae) for sae in several]
        if not named:
            raise ValueError("A lens needs at least one layer.")
        self.model = model
        self.layers: dict[str, SAE[Any]] = {}
        for name, sae in named:
            check_fits(model, sae)
            if name in self.layers:
                raise ValueError(f"Two layers are named {name!r}: give a dictionary with a name for each.")
            self.layers[name] = sae

    @classmethod
    def from_pretrained(
        cls,
        release: str | Path,
        sae_ids: str | Sequence[str] | None = None,
        model: Any | None = None,
        device: str = "cpu",
    ) -> "Lens":
        """The layers of a release, or saved in a folder, with their model.

        Args:
            release: a release's name, a folder, or `user/repo` on the hub.
            sae_ids: which layers of it. None: all that a release of this package has, or the folder itself.
            model: their model, if it is loaded already. Default: the one that the first layer's metadata
                names.
            device: where to put the layers, and the model if it is loaded here.

        Raises:
            FileNotFoundError, ValueError: as `load_layer` and `load_model`.
        """
        known = [layer.sae_id for layer in list_pretrained() if layer.release == str(release)]
        ids: list[str | None] = [sae_ids] if isinstance(sae_ids, str) else [*(sae_ids or known)] or [None]
        layers = [load_layer(release, sae_id, device=device) for sae_id in ids]
        if model is None:
            model = load_model(layers[0].cfg.metadata.model_name, device=device)
        return cls(model, layers)

    def layer(self, of: Of = None) -> SAE[Any]:
        """The layer of a name, or the only one.

        Raises:
            ValueError: there are several, and none is named.
            KeyError: there is no such layer.
        """
        names = ", ".join(self.layers)
        if of is None:
            if len(self.layers) > 1:
                raise ValueError(f"This lens has several layers; say which, of=...: {names}.")
            (only,) = self.layers.values()
            return only
        if of not in self.layers:
            raise KeyError(f"This lens has no layer named {of!r}; it has {names}.")
        return self.layers[of]

    def read(self, text: str, k: int = 5, of: Of = None) -> TopExperts:
        """The experts that contribute most at every token of a prompt: `top_experts`."""
        return top_experts(self.model, self.layer(of), text, k)

    def find(
        self, positive: str | Sequence[str], negative: str | Sequence[str], n: int = 10, of: Of = None
    ) -> Any:
        """The experts that tell two sets of texts apart: `find_experts`."""
        return find_experts(self.model, self.layer(of), positive, negative, n)

    def card(self, expert: int, of: Of = None, statistics: ExpertStatistics | None = None) -> ExpertCard:
        """A short account of one expert: `expert_card`."""
        return expert_card(self.layer(of), expert, statistics)

    def steer(
        self, experts: Mapping[Any, Any], of: Of = None, **settings: Any
    ) -> AbstractContextManager[Any]:
        """Changes experts' coefficients in a with block: `steer`.

        Args:
            experts: the change by expert id; of several layers, such a dictionary by the layer's name.
            of: which layer the ids are of.
            settings: `mode` and `positions`, as for `steer`.
        """
        if experts and all(isinstance(value, Mapping) for value in experts.values()):
            return self._all(
                [steer(self.model, self.layer(name), ids, **settings) for name, ids in experts.items()]
            )
        return steer(self.model, self.layer(of), experts, **settings)

    def ablate(
        self, experts: int | Sequence[int], of: Of = None, **settings: Any
    ) -> AbstractContextManager[Any]:
        """Sets experts' coefficients to zero or their mean in a with block: `ablate`."""
        return ablate(self.model, self.layer(of), experts, **settings)

    def evaluate(self, text: Text, **settings: Any) -> dict[str, FaithfulnessReport]:
        """How faithful each layer is, by its name: `evaluate`."""
        return evaluate_all(self.model, self.layers, text, **settings)

    def statistics(self, text: Text, of: Of = None, **settings: Any) -> ExpertStatistics:
        """How the experts are used on a text: `expert_statistics`."""
        return expert_statistics(self.model, self.layer(of), text, **settings)

    def dashboard(
        self,
        tokens: Int[Tensor, "sequences positions"],
        output: str | Path,
        of: Of = None,
        **settings: Any,
    ) -> Path:
        """A page for every expert, of token ids with one sequence per row: `build_dashboard`."""
        return build_dashboard(self.model, self.layer(of), tokens, output=output, **settings)

    @contextmanager
    def _all(self, contexts: Sequence[AbstractContextManager[Any]]) -> Any:
        with ExitStack() as stack:
            for context in contexts:
                stack.enter_context(context)
            yield self.model

    def __repr__(self) -> str:
        return f"Lens({self.model.cfg.model_name}, {list(self.layers)})"
