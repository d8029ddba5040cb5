"""Which server the tests run on; that they do run in a container is seen by running them there."""

from contextlib import nullcontext
from types import SimpleNamespace

import click
import pytest
from docker.errors import BuildError

import container
from pg_rekey import local


@pytest.mark.parametrize(
    ("target", "installed", "docker", "expected"),
    [
        ("", True, True, None),
        ("", False, True, ""),
        ("", False, False, None),
        ("local", False, True, None),
        ("docker", True, True, ""),
        ("docker:18", True, True, "18"),
    ],
)
def test_target(
    target: str, installed: bool, docker: bool, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(container.TARGET, target)
    monkeypatch.setattr(local, "find", lambda: "one" if installed else None)
    monkeypatch.setattr(container, "answers", lambda: docker)
    assert container.wanted() == expected
    monkeypatch.setenv(container.DSN, "given")
    assert container.is_shared()
    monkeypatch.delenv(container.DSN)
    assert container.is_shared() is (expected is not None)
    monkeypatch.setattr(container, "build", lambda major: f"image {major}")
    monkeypatch.setattr(container, "started", nullcontext)
    monkeypatch.setattr(local, "Server", lambda: nullcontext(SimpleNamespace(dsn=lambda: "local")))
    monkeypatch.setattr(local, "ensure_test_tools", lambda: None)
    with container.server() as dsn:
        assert dsn == ("local" if expected is None else f"image {expected}")


@pytest.mark.parametrize("target", ["podman", "docker:", "docker:x", "18"])
def test_unknown_target(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(container.TARGET, target)
    with pytest.raises(click.UsageError, match="docker:15"):
        container.wanted()


def test_docker_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOCKER_HOST", "unix:///nowhere")
    assert not container.answers()


def test_an_image_that_cannot_be_built(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**_: object) -> None:
        raise BuildError("no such image", iter([{"stream": "Step 1"}, {"aux": {}}, {"stream": "/9"}]))

    monkeypatch.setattr("container.DockerImage", fail)
    with pytest.raises(click.ClickException, match="db-test:18 cannot be built: no such image\nStep 1/9"):
        container.build("18")
