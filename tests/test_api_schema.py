"""schemathesis makes requests from the OpenAPI document, good and bad, and checks the answers against it."""

import re
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, assume, given, settings
from schemathesis import Case, GenerationMode
from schemathesis.specs.openapi.checks import positive_data_acceptance

from api_fixtures import ALICE, Api
from helpers import Connection
from test_api import CONTROL, ROUTES

pytest_plugins = ["api_fixtures"]

EXAMPLES = 30
# What goes on for seconds is tried less often; test_api_events.py tries the streams.
OPERATIONS = [
    *((method, re.sub(r"\d", "{id}", path)) for method, path, _ in ROUTES),
    *((method, re.sub(r"\d", "{id}", path)) for method, path in CONTROL if "events" not in path),
    ("GET", "/healthz"),
]
SLOW = {"/api/work": 2, "/api/doctor": 2, "/api/columns/find": 2}
# What is an interval, and not too long a one, is for the database to say.
INTERVALS = {"/api/keyrings/create", "/api/schedule/set", "/api/keys/schedule-destruction"}
STREAMS = 2


@pytest.mark.parametrize(("method", "path"), OPERATIONS)
@pytest.mark.parametrize("mode", GenerationMode)
def test_answers_are_as_documented(
    mode: GenerationMode, method: str, path: str, api: Api, ready: Connection
) -> None:
    if (mode, path) == (GenerationMode.NEGATIVE, "/healthz"):
        pytest.skip("there is nothing about it that could be wrong")
    ready.execute("select rekey.set_secret('a', 'value')")
    ready.execute("select rekey.rotate_keys()")
    schema = schemathesis.openapi.from_asgi("/openapi.json", api.app)
    assert len(schema) == len(OPERATIONS) + STREAMS

    @given(case=schema[path][method].as_strategy(generation_mode=mode))
    @settings(
        derandomize=True,
        max_examples=SLOW.get(path, EXAMPLES),
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    def check(case: Case[Any]) -> None:
        # In a query everything is text, and most texts name a keyring: [1] and "1" are the same there.
        assume(all(isinstance(case.query.get(name, ""), str) for name in ("keyring", "endpoint")))
        # These leave no trace in a query.
        assume(not any(value is None or value == [] or value == {} for value in case.query.values()))
        excluded: list[Any] = [positive_data_acceptance] if path in INTERVALS else []
        case.call_and_validate(excluded_checks=excluded, headers={"Authorization": f"Bearer {ALICE}"})

    check()
