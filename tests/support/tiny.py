"""What the tests know of the tiny language model, and how they reach the stand-in for the hub."""

import huggingface_hub
import pytest

SENTENCES = "the a cat dog sat ran on under mat hill and then it was big small red blue"
WORDS = SENTENCES.split(" ")
D_MODEL = 16
HOOK_IN, HOOK_OUT = "blocks.1.mlp.hook_in", "blocks.1.hook_mlp_out"


def use_hub(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    """Sends huggingface_hub, which reads its settings when it is imported, to `url`."""
    huggingface_hub.close_session()
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", url)
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", url)
    monkeypatch.setattr(
        huggingface_hub.constants,
        "HUGGINGFACE_CO_URL_TEMPLATE",
        url + "/{repo_id}/resolve/{revision}/{filename}",
    )
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)  # between its retries
