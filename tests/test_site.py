"""The documentation as a site: `make site` builds it, and it needs no network."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from mkdocs.config import load_config

from pg_rekey import release


class Loaded(HTMLParser):
    """What a page has the browser load."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag in ("script", "img", "iframe") and given.get("src"):
            self.found.append(str(given["src"]))
        if tag == "link" and given.get("rel") in ("stylesheet", "icon", "preload"):
            self.found.append(str(given["href"]))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    build = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(folder)]
    quiet = {"NO_MKDOCS_2_WARNING": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        build, cwd=release.ROOT, env=os.environ | quiet, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_every_page_is_there(site: Path) -> None:
    for page in (*release.ROOT.glob("*.md"), *(release.ROOT / "docs").glob("*.md")):
        name = "index.html" if page.name == "README.md" else f"{page.stem}.html"
        assert (site / page.parent.relative_to(release.ROOT) / name).is_file(), page


def test_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    for page in (*site.glob("*.html"), *site.glob("docs/*.html")):
        loaded = Loaded()
        loaded.feed(page.read_text())
        assert loaded.found
        assert not [name for name in loaded.found if re.match(r"(https?:)?//", name)], page


@pytest.mark.npm
def test_diagrams_are_drawn_by_what_the_site_has(site: Path) -> None:
    if shutil.which("npm") is None:
        pytest.skip("npm is not installed")
    assert (site / "assets" / "mermaid.min.js").stat().st_size > 1_000_000
    for name, count, script in (
        ("index.html", 1, "assets/mermaid.min.js"),
        ("docs/design.html", 2, "../assets/mermaid.min.js"),
        ("docs/api.html", 0, None),
    ):
        page = (site / name).read_text()
        assert page.count('<pre class="mermaid">') == count
        loaded = Loaded()
        loaded.feed(page)
        found = [one for one in loaded.found if "mermaid" in one]
        assert found == ([script] if script else [])
        assert "```mermaid" not in page


def test_without_npm_diagrams_stay_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The theme would else load what draws them from a CDN."""
    spec = importlib.util.spec_from_file_location("hook", release.ROOT / "docs" / "site.py")
    assert spec is not None
    assert spec.loader is not None
    hook = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hook)
    monkeypatch.setattr(hook, "KEPT", tmp_path / "none.js")
    monkeypatch.setattr(shutil, "which", lambda _: None)
    config = load_config(str(release.ROOT / "mkdocs.yml"))
    assert "custom_fences" not in hook.on_config(config).mdx_configs.get("pymdownx.superfences", {})


def test_what_is_searched_for_is_in_the_index(site: Path) -> None:
    index = json.loads((site / "search" / "search_index.json").read_text())
    found = {entry["title"]: entry["location"] for entry in index["docs"]}
    assert found["A DEK leaked"] == "docs/operations.html#a-dek-leaked"
    assert found["What is not encrypted"] == "docs/limits.html#what-is-not-encrypted"
    assert found["Django"] == "docs/python.html#django"
    assert found["rekey.rotate_keys"].startswith("docs/reference.html#")
