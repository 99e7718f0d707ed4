"""Random requests made from the server's own description of itself: none is answered by anything else."""

import contextlib
import json
import urllib.request
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable

from holdall.engine.fast import Engine, EngineConfig
from holdall.language_model import LanguageModel
from holdall.mixers.base_conv import BaseConvConfig
from holdall.mixers.taylor import TaylorConfig
from holdall.model import ModelConfig, seeded
from holdall.text.tokenizers import Bytes

pytest.importorskip("fastapi", reason="needs the extra serve")
schemathesis = pytest.importorskip("schemathesis", reason="needs schemathesis")
pytest.importorskip("uvicorn", reason="needs the extra serve")

from running_server import Running, running  # noqa: E402
from schemathesis import GenerationMode  # noqa: E402


def tiny() -> LanguageModel:
    """A model that answers at once."""
    layers = (BaseConvConfig(width=8), TaylorConfig(width=8, feature_dim=2))
    with seeded(0):
        return LanguageModel(ModelConfig(vocab=264, width=8, layers=layers).build(), Bytes())


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    model = tiny()
    engine = Engine(model.model, model.tokenizer, EngineConfig(rows=8))
    with running(engine, model, name="tiny", max_tokens=4, prompt_tokens=200, texts=8) as it:
        yield it


CHECKED = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
    "negative_data_rejection",
)


# the server's threads draw random numbers too, which Hypothesis takes for its strategies' own
@pytest.mark.filterwarnings("ignore:Do not use the `random` module inside strategies")
@pytest.mark.parametrize("examples", [10, pytest.param(1000, marks=pytest.mark.full)])
@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
def test_requests_are_answered_as_described(server: Running, mode: GenerationMode, examples: int) -> None:
    """`positive` requests fit the description, `negative` ones do not."""
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    checks = [check for check in schemathesis.checks.CHECKS.get_all() if check.__name__ in CHECKED]
    assert len(checks) == len(CHECKED)
    called = Counter[str]()
    for operation in schema.get_all_operations():

        @settings(max_examples=examples, suppress_health_check=list(HealthCheck))
        @given(case=operation.ok().as_strategy(generation_mode=mode))
        def answered(case: Any) -> None:
            called[case.operation.label] += 1
            case.validate_response(case.call(), checks=checks)
            assert server.server.loop.alive, server.server.loop.failure

        with contextlib.suppress(Unsatisfiable):  # where nothing is asked, nothing can be wrong
            answered()
    assert called["POST /v1/completions"] >= examples
    assert mode is GenerationMode.NEGATIVE or called["PUT /v1/sessions/{name}"] >= examples


def test_the_description_names_every_error(server: Running) -> None:
    with urllib.request.urlopen(f"{server.url}/openapi.json") as answer:
        paths = json.load(answer)["paths"]
    assert set(paths) == {
        "/v1/completions", "/v1/chat/completions", "/v1/models", "/v1/models/{name}", "/v1/sessions",
        "/v1/sessions/{name}", "/tokenize", "/detokenize", "/tokenizer_info", "/health", "/version",
        "/metrics",
    }  # fmt: skip
    assert {"400", "401", "404", "409", "413", "415", "500", "503"} < set(
        paths["/v1/completions"]["post"]["responses"]
    )
    assert "422" not in json.dumps(list(paths.values()))
