"""Models behind a server of OpenAI's completions, in lm-eval: `holdall serve`, vLLM.

Log-likelihoods come from `echo` with `logprobs`, by the ids of tokens. `/tokenize` and `/tokenizer_info` give
the ids: `holdall serve` has both, as vLLM has. A document begins as the server begins one, so that scores
are those of the same model in process, up to the digits of JSON and sums in another order.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator, Sequence
from typing import Any
from urllib.parse import urlsplit

import requests
from lm_eval.models import api_models
from lm_eval.models.openai_completions import LocalCompletionsAPI
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from holdall.files import RunError

SECONDS = 300
"""How long an answer may take."""
NO_LIMIT = 1 << 30
"""Tokens that a model reads that says nothing of a limit."""
KEPT = 1 << 12
"""Texts whose tokens are kept: a question's choices share its context."""
ENDPOINTS = ("/completions", "/chat", "/v1")


class Server:
    """What a server says of its model, and its tokenizer.

    Attributes:
        url: its address, without /v1 and without a slash at its end.
        model: the name of the model that is asked.
        facts: what `holdall serve` says of the model beside OpenAI's words; empty of another server.
        limit: the most tokens that the model reads.
    """

    def __init__(self, address: str) -> None:
        """`address`: of the server or of an endpoint of it; a model's name behind a hash.

        Raises RunError if no such server answers there.
        """
        address, _, wanted = address.partition("#")
        parts = urlsplit(address)
        path = parts.path.rstrip("/")
        for end in ENDPOINTS:
            path = path.removesuffix(end)
        self.url = f"{parts.scheme}://{parts.netloc}{path}"
        self.session = requests.Session()
        if key := self.key:
            self.session.headers["Authorization"] = f"Bearer {key}"
        listed = self._json("GET", "/v1/models").get("data")
        models = {one["id"]: one for one in listed or [] if isinstance(one, dict) and "id" in one}
        if not models:
            raise RunError(f"{self.url}/v1/models lists no model")
        if not wanted and len(models) > 1:
            names = ", ".join(sorted(models))
            raise RunError(f"{self.url} serves several models; name one of them: {self.url}#NAME, of {names}")
        if wanted and wanted not in models:
            raise RunError(f"{self.url} serves no {wanted!r}, only {', '.join(sorted(models))}")
        self.model = wanted or next(iter(models))
        about = models[self.model]
        self.facts: dict[str, Any] = about.get("holdall") or {}
        limits = [limit for limit in (about.get("max_model_len"), self.facts.get("context")) if limit]
        self.limit: int = min(limits, default=NO_LIMIT)
        self.encode = functools.lru_cache(maxsize=KEPT)(self._encode)

    @property
    def key(self) -> str:
        """What requests bear: the variable OPENAI_API_KEY, which lm-eval reads too, or HOLDALL_API_KEY."""
        return os.environ.get("OPENAI_API_KEY") or os.environ.get("HOLDALL_API_KEY") or ""

    def _json(self, method: str, path: str, body: Any = None) -> dict[str, Any]:
        try:
            answer = self.session.request(method, f"{self.url}{path}", json=body, timeout=SECONDS)
            answer.raise_for_status()
            value = answer.json()
        except (requests.RequestException, ValueError) as error:
            raise self.failed(path, error) from error
        if not isinstance(value, dict):
            raise RunError(f"{self.url}{path} answers something else than a JSON object")
        return value

    def failed(self, path: str, error: Exception) -> RunError:
        """What a request that failed means, and what to do about it."""
        where = f"{self.url}{path}"
        response = getattr(error, "response", None)
        if response is None and isinstance(error, ValueError):
            return RunError(
                f"{where} answers something else than JSON: is it a server of OpenAI's completions?"
            )
        if response is None:
            return RunError(f"{where} does not answer: is the server up? ({_cause(error)})")
        if response.status_code in (401, 403):
            return RunError(f"{where} wants a key: set OPENAI_API_KEY")
        if response.status_code == 404 and path.startswith("/token"):
            return RunError(
                f"{self.url} has no {path}, which tokenizes texts; `holdall serve` and vLLM have it"
                + (" (vLLM with --enable-tokenizer-info-endpoint)" if path == "/tokenizer_info" else "")
            )
        if response.status_code == 404 and path == "/v1/models":
            return RunError(f"{self.url} has no {path}: is it a server of OpenAI's completions?")
        return RunError(f"{where} answers {response.status_code}: {_said(response)}")

    @functools.cached_property
    def _tokenizer(self) -> dict[str, Any]:
        return self._json("GET", "/tokenizer_info")

    @property
    def tokenizer_name(self) -> str:
        """What the server calls its tokenizer."""
        return str(self._tokenizer.get("tokenizer_class") or "unknown")

    @property
    def end_word(self) -> str:
        """The name of the token that ends a document."""
        return str(self._tokenizer.get("eos_token") or "")

    @functools.cached_property
    def end(self) -> int:
        """The token that ends a document."""
        ids = self.encode(self.end_word, False)
        if not self.end_word or len(ids) != 1:
            raise RunError(f"{self.url}/tokenizer_info names no single token that ends a document")
        return ids[0]

    @functools.cached_property
    def begin(self) -> int:
        """The token that a document begins with; the one that ends it where texts get none."""
        plain, begun = self.encode("a", False), self.encode("a", True)
        return begun[0] if begun[1:] == plain else self.end

    def _encode(self, text: str, begins: bool) -> tuple[int, ...]:
        """The ids of a text; behind what a document begins with, if it begins one."""
        body = {"model": self.model, "prompt": text, "add_special_tokens": begins}
        return tuple(self._json("POST", "/tokenize", body)["tokens"])

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids."""
        body = {"model": self.model, "tokens": list(ids)}
        return str(self._json("POST", "/detokenize", body)["prompt"])


@contextlib.contextmanager
def _bars(shown: bool) -> Iterator[None]:
    """Progress bars of lm-eval's client, which it draws whether they are wanted or not."""
    bar = api_models.tqdm
    api_models.tqdm = functools.partial(bar, disable=not shown)
    try:
        yield
    finally:
        api_models.tqdm = bar


class ServedLM(LocalCompletionsAPI):
    """A model of a server for lm-eval.

    Args:
        server: the server.
        batch_size: prompts of a request.
    """

    def __init__(self, server: Server, *, batch_size: int = 1) -> None:
        super().__init__(
            base_url=f"{server.url}/v1/completions",
            model=server.model,
            tokenizer_backend="none",
            batch_size=batch_size,
            max_length=server.limit,
            add_bos_token=True,
            timeout=SECONDS,
        )
        # ids are asked of the server; "remote" is what lm-eval calls that
        self.tokenizer, self.tokenizer_backend, self.tokenized_requests = server, "remote", True
        self.server, self._scores = server, False

    @property
    def api_key(self) -> str:
        return self.server.key

    @property
    def eot_token_id(self) -> int:
        return self.server.end

    @property
    def prefix_token_id(self) -> int:
        return self.server.begin

    @property
    def eos_string(self) -> str:
        return self.server.end_word

    def tok_encode(
        self,
        string: Any,
        left_truncate_len: int | None = None,
        add_special_tokens: bool | None = None,
        **_: Any,
    ) -> Any:
        """The ids of a text, or of each of several, behind what a document begins with unless that is not
        wanted."""
        if not isinstance(string, str):
            return [self.tok_encode(one, left_truncate_len, add_special_tokens) for one in string]
        ids = list(self.server.encode(string, add_special_tokens is not False))
        return ids[-left_truncate_len:] if left_truncate_len else ids

    def tok_decode(self, tokens: Sequence[int]) -> str:
        return self.server.decode(tokens)

    def model_call(self, messages: Any, **options: Any) -> Any:
        """The server's answer to a request; what failed is said by a RunError."""
        try:
            return super().model_call(messages, **options)
        except requests.RequestException as error:
            raise self.server.failed("/v1/completions", error) from error

    def _loglikelihood_tokens(
        self, requests: Any, disable_tqdm: bool = False, **options: Any
    ) -> list[tuple[float, bool]]:
        if requests and not self._scores:
            self._check_scores()
        with _bars(not disable_tqdm):
            return super()._loglikelihood_tokens(requests, **options)

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        if not requests:
            return []
        with _bars(not disable_tqdm):
            return super().generate_until(requests)

    def _check_scores(self) -> None:
        """Raise RunError where the server does not say how probable a prompt's tokens are."""
        ids = [self.server.begin, self.server.end]
        answer = self.model_call([ids], generate=False)
        try:
            scores = answer["choices"][0]["logprobs"]["token_logprobs"]
        except (KeyError, TypeError, IndexError):
            scores = None
        if not isinstance(scores, list) or len(scores) <= len(ids):
            raise RunError(
                f"{self.server.url} gives no log-probabilities of a prompt (echo with logprobs), which tasks "
                "with choices need; tasks that generate do not"
            )
        self._scores = True

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """The log-probability of whole texts, in nats: in windows as long as the model reads, of which none
        sees the one before."""
        totals = []
        for request in requests:
            (text,) = request.args
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(text, add_special_tokens=False),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length - 1,
                context_len=1,
            )
            asked = [(None, *make_disjoint_window(window)) for window in windows]
            total = sum(score for score, _ in self._loglikelihood_tokens(asked, disable_tqdm=True))
            totals.append(total)
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals


def _said(response: requests.Response) -> str:
    """The message of an answer that is an error, as OpenAI's form has it, or the beginning of what came."""
    with contextlib.suppress(ValueError, KeyError, TypeError):
        return str(response.json()["error"]["message"])
    return response.reason if "html" in response.headers.get("Content-Type", "") else response.text[:300]


def _cause(error: BaseException) -> str:
    """Why a request got no answer: what the system said of the connection, if it did."""
    causes = [error]
    while (before := causes[-1].__cause__ or causes[-1].__context__) is not None:
        causes.append(before)
    said = [cause.strerror for cause in causes if isinstance(cause, OSError) and cause.strerror]
    return said[-1] if said else str(error).partition("\n")[0]
