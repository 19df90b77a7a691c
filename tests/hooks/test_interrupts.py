"""Whatever happens while a layer is in its place, the model afterwards is the model before."""

import random
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest
import torch
from attached import MODELS, PROMPT, random_mxd
from tiny import D_MODEL

from mxd_lens import ablate, evaluate, steer
from mxd_lens.dashboards.collect.collection import collect_dashboard
from mxd_lens.hooks.replace import Replaced
from mxd_lens.hooks.site import hook_names

N_POINTS = 21
"""For each of ten ways, 210 in all."""


class Interrupt:
    """Raises KeyboardInterrupt at the nth call of a Python function, wherever that is."""

    def __init__(self, n: int) -> None:
        self.n = n
        self.calls = 0

    def __call__(self, frame: FrameType, event: str, _arg: Any) -> None:
        # The functions by which a with block is left are what undoes it: an interrupt may come before and
        # after them, and inside what they call. Python drops what is raised while it frees an object.
        if event == "call" and frame.f_code.co_name not in ("__exit__", "__del__", "<genexpr>"):
            self.calls += 1
            if self.calls == self.n:
                sys.setprofile(None)
                raise KeyboardInterrupt

    def run(self, function: Callable[[], Any]) -> bool:
        """Whether it was interrupted."""
        sys.setprofile(self)
        try:
            function()
        except KeyboardInterrupt:
            return True
        finally:
            sys.setprofile(None)
        return False


def generate(model, tokens):
    return model.generate(tokens, max_new_tokens=2, do_sample=False, stop_at_eos=False, verbose=False)


def steered(model, mxd, tokens):
    with steer(model, mxd, {5: 40.0}), ablate(model, mxd, 3):
        generate(model, tokens)


def evaluated(model, mxd, tokens):
    evaluate(model, mxd, tokens, progress=False)


def replaced(model, mxd, tokens):
    with Replaced(model, *hook_names(mxd), lambda x, _y: mxd(x)):
        model(tokens)


def attached(model, mxd, tokens):
    interrupt = sys.getprofile()
    sys.setprofile(None)  # an interrupt inside SAELens' own attaching and detaching is not undone
    with model.saes(saes=[mxd]):
        sys.setprofile(interrupt)
        try:
            model(tokens)
        finally:
            sys.setprofile(None)


def shown(model, mxd, tokens):
    collect_dashboard(model, mxd, tokens, progress=False)


@pytest.mark.slow
@pytest.mark.parametrize("do", [steered, evaluated, replaced, attached, shown])
@pytest.mark.parametrize("name", ["HookedSAETransformer", "SAETransformerBridge"])
def test_an_interrupt_at_random_points(name: str, do, tiny_folder) -> None:
    model, mxd = MODELS[name](tiny_folder), random_mxd(D_MODEL)
    tokens = model.to_tokens([PROMPT, "a dog ran under the small hill then"])
    do(model, mxd, tokens)
    before, written = model(tokens), generate(model, tokens)
    counter = Interrupt(sys.maxsize)
    assert not counter.run(lambda: do(model, mxd, tokens))
    points = random.Random(0).sample(range(1, counter.calls), min(N_POINTS, counter.calls - 1))
    for n in points:
        assert Interrupt(n).run(lambda: do(model, mxd, tokens)), n
        assert torch.equal(model(tokens), before), n
    assert torch.equal(generate(model, tokens), written)
    assert torch.equal(model.run_with_cache(tokens)[0], before)
    with steer(model, mxd, {5: 0.0}):
        plain = model(tokens)
    with Replaced(model, *hook_names(mxd), lambda x, _y: mxd(x)):
        assert torch.equal(model(tokens), plain)


def test_an_interrupt_caught_inside_the_with_block(tiny_model) -> None:
    mxd = random_mxd(D_MODEL)
    tokens = tiny_model.to_tokens(PROMPT)
    before = tiny_model(tokens)

    def interrupt(_x, hook):
        raise KeyboardInterrupt

    with steer(tiny_model, mxd, {5: 4.0}):
        expected = tiny_model(tokens)
        with pytest.raises(KeyboardInterrupt):
            tiny_model.run_with_hooks(tokens, fwd_hooks=[("blocks.1.mlp.hook_in", interrupt)])
        assert torch.equal(tiny_model(tokens), expected)
    assert torch.equal(tiny_model(tokens), before)


# Threads


def in_a_thread(function: Callable[[], Any]) -> BaseException | None:
    """What the function raises in a thread of its own."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            function()
        except BaseException as e:
            raised.append(e)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return raised[0] if raised else None


@pytest.mark.parametrize("same_layer", [True, False])
def test_a_second_thread_is_refused(tiny_model, same_layer) -> None:
    mxd = random_mxd(D_MODEL)
    other = mxd if same_layer else random_mxd(D_MODEL, "blocks.2.mlp.hook_in", "blocks.2.hook_mlp_out")
    tokens = tiny_model.to_tokens(PROMPT)

    def enter() -> None:
        with steer(tiny_model, other, {3: 1.0}):
            tiny_model(tokens)

    with steer(tiny_model, mxd, {5: 4.0}):
        expected = tiny_model(tokens)
        for raised in (in_a_thread(enter), in_a_thread(lambda: tiny_model(tokens))):
            assert isinstance(raised, ValueError)
            assert "is being intervened on in another thread" in str(raised)
        assert torch.equal(tiny_model(tokens), expected)
    assert in_a_thread(enter) is None


def test_two_threads_that_steer_one_model_are_never_silently_wrong(tiny_model) -> None:
    mxd = random_mxd(D_MODEL)
    tokens = tiny_model.to_tokens(PROMPT)
    expected = {}
    for n in (3, 5):
        with steer(tiny_model, mxd, {n: 4.0}):
            expected[n] = tiny_model(tokens)
    wrong, refused, right = [], [], []
    start = threading.Barrier(2)

    def work(n: int) -> None:
        for _ in range(20):
            start.wait()
            try:
                with steer(tiny_model, mxd, {n: 4.0}):
                    (right if torch.equal(tiny_model(tokens), expected[n]) else wrong).append(n)
            except ValueError:
                refused.append(n)

    threads = [threading.Thread(target=work, args=(n,)) for n in (3, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(right) + len(refused) == 40
    assert right
