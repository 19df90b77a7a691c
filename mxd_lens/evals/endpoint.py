"""A chat model behind an OpenAI-compatible endpoint, asked until it answers what can be read."""

import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from sae_lens import logger

T = TypeVar("T")


@dataclass(frozen=True)
class ChatEndpoint:
    """A model behind an OpenAI-compatible endpoint.

    Nothing is sent before the first question. A request that fails for a passing reason (no connection,
    too slow, 408, 429, 5xx) or an answer that cannot be read is asked for again, after 1, 2, 4, ... times
    `pause` seconds.
    """

    url: str
    """The endpoint's base, as https://host/v1; /chat/completions is asked."""
    model: str
    """Which of its models."""
    api_key: str | None = None
    """Sent as a bearer token; never written to the results."""
    timeout: float = 60.0
    """Seconds to wait for one answer."""
    attempts: int = 4
    pause: float = 1.0

    @property
    def name(self) -> str:
        return self.model

    def __repr__(self) -> str:
        return f"{type(self).__name__}(url={self.url!r}, model={self.model!r})"

    def ask(self, system: str, user: str, read: Callable[[str], T], what: str) -> T:
        """What `read` makes of the model's answer.

        Args:
            system: the instructions.
            user: the question.
            read: reads an answer; raises ValueError where it is not what was asked for.
            what: what is being done, for the log: "Judging expert 5".

        Raises:
            ValueError: every answer was malformed; the last one is quoted.
            ConnectionError: the endpoint refused (the status and its message are given), or could not be
                reached in all attempts.
        """
        problem: Exception | None = None
        for attempt in range(self.attempts):
            if attempt:
                time.sleep(self.pause * 2 ** (attempt - 1))
            try:
                return read(self._answer(system, user))
            except urllib.error.HTTPError as e:
                message = e.read(500).decode(errors="replace")
                problem = ConnectionError(f"{self.url} answered {e.code} {e.reason}: {message}")
                if e.code not in (408, 429) and e.code < 500:
                    raise problem from e
            except OSError as e:  # no connection, or a timeout
                problem = ConnectionError(
                    f"{self.url} gave no answer at attempt {attempt + 1} of {self.attempts}, waiting "
                    f"{self.timeout:g} s: {e}"
                )
            except ValueError as e:
                problem = e
            logger.warning("%s: %s", what, problem)
        if problem is None:
            raise ValueError(f"attempts must be at least 1, got {self.attempts}.")
        raise problem

    def _answer(self, system: str, user: str) -> str:
        body = {
            "model": self.model,
            "temperature": 0,
            "messages": [{"role": "system", "content": system}, {"role": "user", "content": user}],
        }
        request = urllib.request.Request(
            self.url.rstrip("/") + "/chat/completions",
            data=json.dumps(body).encode(),
            headers={"Content-Type": "application/json"}
            | ({"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}),
        )
        with urllib.request.urlopen(request, timeout=self.timeout) as response:
            answer = response.read()
        try:
            return json.loads(answer)["choices"][0]["message"]["content"]
        except (ValueError, LookupError, TypeError) as e:
            raise ValueError(f"{self.url} does not answer as a chat endpoint does: {answer[:300]!r}") from e
