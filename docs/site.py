"""A hook of mkdocs: every page stands where it stands in the repository, so that its links are right."""

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

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


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Return the files of the repository that are shown, in place of those of docs/ alone."""
    shown = [file for file in files if file.src_dir != config.docs_dir]
    for pattern in SHOWN:
        for path in sorted(ROOT.glob(pattern)):
            name = path.relative_to(ROOT)
            if path.is_file() and not set(name.parts) & set(LEFT_OUT):
                shown.append(File.generated(config, name.as_posix(), abs_src_path=str(path)))
    return Files(shown)
