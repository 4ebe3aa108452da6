"""Make README.md from nbs/index.ipynb; with --check only say whether it is up to date.

Cells that start with `#| hide` are left out, other directive lines are dropped, links and pictures are rewritten from
nbs/ to the project's root, and pictures among the outputs are written to nbs/images/ instead of into the text.
"""

from __future__ import annotations

import posixpath
import re
import sys
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "nbs" / "index.ipynb"
README = ROOT / "README.md"
IMAGES = "images"  # below nbs/
HEAD = "<!-- Made from nbs/index.ipynb by tools/make_readme.py: edit the notebook, then run `make sync`. -->\n\n"

DIRECTIVE = re.compile(r"^\s*#\s*\|\s*(\S+?):?(?:\s+(.*))?$")
FENCE = re.compile(r"(^```.*?^```\s*?$|`[^`\n]+`)", re.MULTILINE | re.DOTALL)
LINK = re.compile(r'(\]\(|(?:src|href)=")([^)"\s#][^)"\s]*)')
ELSEWHERE = re.compile(r"^([a-z][a-z0-9+.-]*:|/|#)", re.IGNORECASE)


def directives(source: str) -> dict[str, str]:
    """The `#| name value` lines that a code cell starts with."""
    found = {}
    for line in source.splitlines():
        match = DIRECTIVE.match(line)
        if match is None:
            break
        found[match[1]] = (match[2] or "").strip()
    return found


def prepare(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Drop hidden cells and directive lines; honour `echo: false` and `output: false`."""
    cells = []
    for cell in notebook.cells:
        if cell.cell_type == "raw":
            continue
        if cell.cell_type == "code":
            said = directives(cell.source)
            if "hide" in said or "default_exp" in said or said.get("include") == "false":
                continue
            cell.source = "\n".join(cell.source.splitlines()[len(said) :]).strip("\n")
            if said.get("echo") == "false" or "hide_input" in said:
                cell.source = ""
            if said.get("output") == "false" or "hide_output" in said:
                cell.outputs = []
            if not cell.source:  # only what it shows; an empty code block would stand above it
                shown = [o["data"]["text/markdown"] for o in cell.outputs if "text/markdown" in o.get("data", {})]
                cells += [nbformat.v4.new_markdown_cell(text, id=f"{cell.id}-{n}") for n, text in enumerate(shown)]
                if shown or not cell.outputs:
                    continue
        cells.append(cell)
    notebook.cells = cells
    return notebook


def from_root(markdown: str) -> str:
    """Rewrite relative links, which in the notebook start at nbs/, to start at the project's root."""

    def rewrite(match: re.Match[str]) -> str:
        opening, target = match.groups()
        if ELSEWHERE.match(target):
            return match[0]
        return opening + posixpath.normpath(posixpath.join("nbs", target))

    parts = FENCE.split(markdown)  # code stands at the odd places
    return "".join(part if place % 2 else LINK.sub(rewrite, part) for place, part in enumerate(parts))


def render() -> tuple[str, dict[str, bytes]]:
    """Return the README's text and the pictures (path below nbs/ -> content) it shows."""
    notebook = prepare(nbformat.read(SOURCE, as_version=4))
    exporter = MarkdownExporter(exclude_input_prompt=True, exclude_output_prompt=True)
    resources = {
        "unique_key": "index",
        "output_files_dir": IMAGES,
        "metadata": {"name": "index"},
    }
    text, resources = exporter.from_notebook_node(notebook, resources)
    text = text.replace("```ipython3", "```python")
    text = re.sub(r"```python\s*```", "", text)  # code not shown (echo: false)
    text = re.sub(r"<style scoped>.*?</style>\n?", "", text, flags=re.DOTALL)  # pandas; GitHub does not apply it
    text = "\n".join(line.rstrip() for line in text.split("\n"))
    text = re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"
    return HEAD + from_root(text), dict(resources.get("outputs", {}))


def main() -> int:
    """Write the README, or compare it with `--check`."""
    text, pictures = render()
    if "data:image" in text:
        print("make_readme: nbs/index.ipynb embeds a picture in its text: link a file instead", file=sys.stderr)
        return 1
    wanted = {README: text.encode(), **{ROOT / "nbs" / name: content for name, content in pictures.items()}}
    stale = [path for path, content in wanted.items() if not path.is_file() or path.read_bytes() != content]
    names = ", ".join(str(path.relative_to(ROOT)) for path in stale)
    left = [path for path in sorted((ROOT / "nbs" / IMAGES).glob("index_*")) if path not in wanted]
    if "--check" in sys.argv[1:]:
        if stale:
            print(f"make_readme: not in sync with nbs/index.ipynb: {names} (run `make sync`)", file=sys.stderr)
        return 1 if stale else 0
    for path in left:
        path.unlink()
    for path in stale:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(wanted[path])
    print(f"wrote {names}" if stale else "README.md is up to date")
    return 0


if __name__ == "__main__":
    sys.exit(main())
