"""Let the site have the pages of the repository that lie outside of `docs/`, at the links that lead to them.

A link such as `../SECURITY.md` works where the repository is browsed. On the site it leads to a copy of that page. A
link to a file that is no page of the site, such as a folder or a table of numbers, becomes plain text there.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

from griffe import Extension, Object
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
GUESTS = ("ARCHITECTURE.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "benchmarks/README.md", "results/*.md")
CODE = ("examples/*.py",)
LINK = re.compile(r"(!?)\[((?:[^\[\]]|!\[[^\]]*\]\([^)]*\))*)\]\(([^)\s#:]+)(#[^)\s]*)?\)")
FENCE = re.compile(r"^( *)(```|~~~).*?^\1\2 *$", re.MULTILINE | re.DOTALL)


class Examples(Extension):
    """Show what a docstring has under `Example:` as code: the parser knows the plural alone."""

    def on_object(self, *, obj: Object, **kwargs: Any) -> None:
        """Rename the section."""
        if obj.docstring:
            obj.docstring.value = re.sub(r"^( *)Example:$", r"\1Examples:", obj.docstring.value, flags=re.MULTILINE)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the guests, and the pictures that they show."""
    for path in (path for pattern in GUESTS for path in sorted(ROOT.glob(pattern))):
        guest = str(path.relative_to(ROOT))
        files.append(File.generated(config, guest, content=path.read_text()))
        for _, _, target, _ in LINK.findall(path.read_text()):
            picture = posixpath.normpath(posixpath.join(posixpath.dirname(guest), target))
            is_new = files.get_file_from_path(picture) is None and not picture.startswith(("docs/", ".."))
            if picture.endswith((".svg", ".png")) and (ROOT / picture).is_file() and is_new:
                files.append(File.generated(config, picture, abs_src_path=str(ROOT / picture)))
    for path in (path for pattern in CODE for path in sorted(ROOT.glob(pattern))):
        name = str(path.relative_to(ROOT))
        content = f"# {path.name}\n\n```python\n{path.read_text()}```\n"
        files.append(File.generated(config, f"{name.removesuffix('.py')}.md", content=content))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let links lead to where the site has what they name; code stays as it is."""
    source = page.file.src_uri
    here = posixpath.dirname(f"docs/{source}" if (ROOT / "docs" / source).is_file() else source)

    def led(found: re.Match[str]) -> str:
        picture, text, target, anchor = found[1], found[2], found[3], found[4] or ""
        text = LINK.sub(led, text)
        there = posixpath.normpath(posixpath.join(here, target))
        on_site = _on_site(there)
        if files.get_file_from_path(on_site) or not (ROOT / there).exists():
            # what does not exist stays a link, of which the strict build complains
            return f"{picture}[{text}]({posixpath.relpath(on_site, posixpath.dirname(source) or '.')}{anchor})"
        return text

    parts, end = [], 0
    for fence in FENCE.finditer(markdown):
        parts += [LINK.sub(led, markdown[end : fence.start()]), fence[0]]
        end = fence.end()
    return "".join([*parts, LINK.sub(led, markdown[end:])])


def _on_site(path: str) -> str:
    """Say where the site has a file of the repository."""
    if path == "README.md":
        return "README.md"  # the site's first page has its place
    if re.fullmatch(r"examples/\w+\.py", path):
        return f"{path.removesuffix('.py')}.md"
    return path.removeprefix("docs/")
