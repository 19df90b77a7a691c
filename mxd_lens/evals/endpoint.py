"""A chat model behind an OpenAI-compatible endpoint, asked until it answers what can be read."""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import httpx
from sae_lens import logger

T = TypeVar("T")
QUOTED = 300
"""Characters of an answer that an error message quotes."""


@dataclass(frozen=True)
class ChatEndpoint:
    """A model behind an OpenAI-compatible endpoint.

    Nothing is sent before the first question. A request that fails for a passing reason (no connection,
    too slow, truncated, 408, 429, 5xx) or an answer that cannot be read is asked for again, after 1, 2, 4,
    ... times `pause` seconds. Redirects are not followed: the key is for this host alone.
    """

    url: str
    """The endpoint's base, as https://host/v1; /chat/completions is asked."""
    model: str
    """Which of its models."""
    api_key: str | None = None
    """Sent as a bearer token; never written to the results."""
    timeout: float = 60.0
    """Seconds that one answer may take as a whole."""
    attempts: int = 4
    pause: float = 1.0
    largest_answer: int = 1_000_000
    """Bytes that one answer may have."""

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
            ValueError: every answer was malformed or too long; the last one is quoted.
            ConnectionError: the endpoint refused (the status and its message are given), redirects, or could
                not be reached in all attempts.
        """
        problem: Exception | None = None
        for attempt in range(self.attempts):
            if attempt:
                time.sleep(self.pause * 2 ** (attempt - 1))
            try:
                return read(self._answer(system, user))
            except Refused:
                raise
            except (httpx.HTTPError, ConnectionError) as e:
                problem = ConnectionError(
                    f"{self.url} gave no answer at attempt {attempt + 1} of {self.attempts} within "
                    f"{self.timeout:g} s: {type(e).__name__}: {e}"
                )
            except (ValueError, RecursionError) as e:
                problem = ValueError(str(e))
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
        headers = {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}
        url = self.url.rstrip("/") + "/chat/completions"
        deadline = time.monotonic() + self.timeout
        content = b""
        with httpx.stream(
            "POST", url, json=body, headers=headers, timeout=self.timeout, follow_redirects=False
        ) as response:
            for chunk in response.iter_bytes():
                content += chunk
                if len(content) > self.largest_answer:
                    raise ValueError(f"{self.url} answered with more than {self.largest_answer:,} bytes.")
                if time.monotonic() > deadline:
                    raise httpx.ReadTimeout(f"the answer took more than {self.timeout:g} s")
        if response.is_redirect:
            to = response.headers.get("location", "another place")
            raise Refused(f"{self.url} redirects to {to!r}: give that address if you trust it.")
        if response.is_error:
            said = content[:QUOTED].decode(errors="replace")
            answered = f"{self.url} answered {response.status_code} {response.reason_phrase}: {said}"
            is_passing = response.status_code in (408, 429) or response.is_server_error
            raise ConnectionError(answered) if is_passing else Refused(answered)
        return _message(content, self.url)


class Refused(ConnectionError):
    """The endpoint will not answer this question however often it is asked."""


def _message(content: bytes, url: str) -> str:
    try:
        answer: Any = json.loads(content)["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError, RecursionError):
        answer = None
    if not isinstance(answer, str):
        raise ValueError(f"{url} does not answer as a chat endpoint does: {content[:QUOTED]!r}")
    return answer
