"""A hook of mkdocs: pages stand where they stand in the repository, and diagrams are drawn without a CDN.

What draws them comes from npm. Where that is missing, they stay the text that they are in the repository.
"""

import hashlib
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from mkdocs.utils import get_relative_url
from pymdownx.superfences import fence_code_format

ROOT = Path(__file__).parents[1]
# Pages, and what they link to.
SHOWN = (
    "*.md",
    "LICENSE",
    "docker-compose*.yml",
    "docs/*.md",
    "docs/monitoring/*",
    "examples/**/*",
    "supabase/pg_rekey.ts",
    "tests/privileges.toml",
)
LEFT_OUT = ("node_modules", "__pycache__")
MERMAID = "11.16.0"
MERMAID_SHA256 = "74d7c46dabca328c2294733910a8aa1ed0c37451776e8d5295da38a2b758fb9b"
KEPT = Path(sys.prefix) / "share" / f"mermaid-{MERMAID}.min.js"
SCRIPT = "assets/mermaid.min.js"


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Have diagrams drawn, where there is what draws them: else the theme would ask a CDN for it."""
    if not KEPT.exists() and (npm := shutil.which("npm")):
        KEPT.parent.mkdir(exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=KEPT.parent, delete=False) as file:
            file.write(_mermaid(npm))
        Path(file.name).replace(KEPT)
    if KEPT.exists():
        drawn = {"name": "mermaid", "class": "mermaid", "format": fence_code_format}
        config.mdx_configs["pymdownx.superfences"] = {"custom_fences": [drawn]}
    return config


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> str:
    """Have a page with a diagram load what draws it, before the theme looks for it."""
    if 'class="mermaid"' not in output:
        return output
    script = f'<script src="{get_relative_url(SCRIPT, page.url)}"></script>'
    return output.replace("</head>", f"{script}</head>", 1)


def _mermaid(npm: str) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            [npm, "pack", "--silent", f"mermaid@{MERMAID}"], cwd=folder, check=True, capture_output=True
        )
        [path] = Path(folder).glob("*.tgz")
        with tarfile.open(path) as package:
            file = package.extractfile("package/dist/mermaid.min.js")
            assert file is not None
            script = file.read()
    if hashlib.sha256(script).hexdigest() != MERMAID_SHA256:
        raise PluginError(f"what npm gives as mermaid {MERMAID} is not what it was")
    return script


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Return the files of the repository that are shown, in place of those of docs/ alone."""
    shown = [file for file in files if file.src_dir != config.docs_dir]
    for pattern in SHOWN:
        for path in sorted(ROOT.glob(pattern)):
            name = path.relative_to(ROOT)
            if path.is_file() and not set(name.parts) & set(LEFT_OUT):
                shown.append(File.generated(config, name.as_posix(), abs_src_path=str(path)))
    if KEPT.exists():
        shown.append(File.generated(config, SCRIPT, abs_src_path=str(KEPT)))
    return Files(shown)
