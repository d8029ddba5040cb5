"""schemathesis makes requests from the OpenAPI document, good and bad, and checks the answers against it."""

from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, assume, given, settings
from schemathesis import Case, GenerationMode

from api_fixtures import ALICE, Api
from helpers import Connection

pytest_plugins = ["api_fixtures"]

EXAMPLES = 30
OPERATIONS = [
    ("POST", "/api/keys/rotate"),
    ("GET", "/api/keys"),
    ("GET", "/api/rotations"),
    ("GET", "/api/rotations/{id}"),
    ("GET", "/api/audit"),
    ("GET", "/metrics"),
    ("GET", "/healthz"),
]


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
    assert len(schema) == len(OPERATIONS)

    @given(case=schema[path][method].as_strategy(generation_mode=mode))
    @settings(
        derandomize=True,
        max_examples=EXAMPLES,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    def check(case: Case[Any]) -> None:
        # In a query everything is text, and most texts name a keyring: [1] and "1" are the same there.
        assume(isinstance(case.query.get("keyring", ""), str))
        case.call_and_validate(headers={"Authorization": f"Bearer {ALICE}"})

    check()
