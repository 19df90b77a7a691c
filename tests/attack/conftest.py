"""The jobs that are attacked."""

from datetime import datetime
from typing import Any

import pytest
from resumable_jobs import Job, measuring_jobs, training_jobs


@pytest.fixture
def jobs(tiny_model: Any, words: list[str]) -> dict[str, Job]:
    return training_jobs(tiny_model, words)


@pytest.fixture
def others(tiny_model: Any, words: list[str], monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[Job, ...]]:
    """The jobs that measure, at one date and with one number for a writing's name."""

    class Then(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> "Then":
            return cls(2025, 1, 1, tzinfo=tz)

    monkeypatch.setattr("mxd_lens.dashboards.collect.collection.datetime", Then)
    monkeypatch.setattr("secrets.token_hex", lambda n: "0" * 2 * n)
    return measuring_jobs(tiny_model, words)
