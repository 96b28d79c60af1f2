"""MkDocs hook: the site has the layout of the repository, so that relative links work there as they do on GitHub.

MkDocs takes its pages from one folder, `docs`. The documents link to pages and files outside of it (`../FORMAT.md`).
This hook therefore gives MkDocs the files that `PAGES` and `ATTACHED` name, each at its path in the repository:
`docs/guide.md` becomes `docs/guide/`, and README.md becomes the first page.
"""

from __future__ import annotations

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

PAGES = ("*.md", "docs/**/*.md", "results/*.md", "research/*.md", "examples/*.md", "tests/data/*.md")
ATTACHED = ("LICENSE", "docs/images/*", "docs/*.css", "results/*", "examples/*.py", "research/*.py")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Return the files of the theme and those of the repository, instead of those that MkDocs has found in `docs`."""
    root = Path(config.config_file_path).parent
    theme = [file for file in files if file.src_dir != config.docs_dir]
    paths = sorted({path for pattern in (*PAGES, *ATTACHED) for path in root.glob(pattern) if path.is_file()})
    own = [File.generated(config, path.relative_to(root).as_posix(), abs_src_path=str(path)) for path in paths]
    return Files([*theme, *own])
