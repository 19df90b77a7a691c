"""Every function on every family of models, both classes and every state: exact, or refused with a sentence.

"Exact" is what PyTorch's forward hooks on transformers' own modules give. docs/conformance.md is what these
tests find.
"""

import page
import pytest
import torch
from families import FAMILIES, Reference
from page import CLASSES, EXACT, LOAD, Cell, Outcomes
from sae_lens import HookedSAETransformer
from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge
from states import STATES
from verbs import RUN, TOKENS, Case, layer

from mxd_lens import load_model

MODEL_CLASSES = dict(zip(CLASSES, (HookedSAETransformer, SAETransformerBridge), strict=True))
REFUSALS = (ValueError, NotImplementedError)


@pytest.mark.parametrize("class_name", CLASSES)
@pytest.mark.parametrize("name", FAMILIES)
def test_family(name: str, class_name: str, made, families: Outcomes) -> None:
    """Each function, one after the other on one model, so that the next one sees what one leaves behind."""
    folder, reference = made(name)
    try:
        model = load_model(folder, model_class=MODEL_CLASSES[class_name])
    except REFUSALS as e:
        families.add(Cell(name, class_name, LOAD), str(e))
        return
    case = Case(model, layer(), reference)
    case.close(model(TOKENS), reference.logits(TOKENS))
    for verb, run in RUN.items():
        try:
            run(Case(model, layer(), reference))
            outcome = EXACT
        except REFUSALS as e:
            outcome = str(e)
        families.add(Cell(name, class_name, verb), outcome)
        case.close(model(TOKENS), reference.logits(TOKENS))


@pytest.mark.parametrize("class_name", CLASSES)
@pytest.mark.parametrize("name", STATES)
def test_state(name: str, class_name: str, made, states: Outcomes) -> None:
    state = STATES[name]
    if state.only not in ("", class_name):
        return
    folder, reference = made("Llama")
    if state.dtype != torch.float32:
        reference = Reference(FAMILIES["Llama"], folder, state.dtype)
    model = load_model(folder, dtype=state.dtype, model_class=MODEL_CLASSES[class_name])
    for verb, run in RUN.items():
        if verb in state.leaves_out:
            continue
        mxd = layer()
        with state.enter(model, mxd):
            try:
                run(state.case(model, mxd, reference))
                outcome = EXACT
            except REFUSALS as e:
                outcome = str(e)
        states.add(Cell(name, class_name, verb), outcome)


def test_the_page_says_what_was_found(families: Outcomes, states: Outcomes) -> None:
    page.check(families, states)
