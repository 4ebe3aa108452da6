"""How well the book can be read: statistics of its chapters beside those of the best books of this kind.

Run as `make house` or `python tools/house.py [folder of notebooks]`. A mirror, not a gate: long cells are named, so
that their chapters can say why.
"""

from __future__ import annotations

import ast
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
BEST = {"used within two cells": "80-89 %", "shown there": "80-89 %", "p90": "10-14", "longest": "47", "over 30": "2 %"}


def cells(path: Path) -> list[dict[str, Any]]:
    "The code cells of a notebook: source, whether exported, what is defined, what is seen."
    found = []
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] != "code":
            continue
        source = "".join(cell["source"])
        exported = bool(re.match(r"\s*#\|\s*exporti?\b", source))
        try:
            body = ast.parse(re.sub(r"^\s*[%!].*$", "", source, flags=re.M)).body
        except SyntaxError:
            body = []
        names = [n.name for n in body if isinstance(n, ast.FunctionDef | ast.ClassDef) and not n.name.startswith("_")]
        for node in body:
            if isinstance(node, ast.Assign):
                names += [t.id for t in node.targets if isinstance(t, ast.Name) and t.id.isupper() and t.id[0] != "_"]
        lines = [line for line in source.splitlines() if line.strip() and not line.startswith("#|")]
        found.append({"id": cell.get("id", ""), "source": source, "exported": exported, "lines": len(lines)})
        found[-1]["names"] = names if exported else []
        found[-1]["body"] = body
    return found


def uses(source: str, name: str) -> bool:
    "Does a cell mention a name?"
    return re.search(rf"\b{re.escape(name)}\b", source) is not None


def chapter(path: Path) -> dict[str, Any]:
    "The statistics of one chapter."
    code = cells(path)
    used = shown = total = 0
    for place, cell in enumerate(code):
        after = [c for c in code[place + 1 :]][:2]
        for name in cell["names"]:
            total += 1
            used += any(uses(c["source"], name) for c in after)
            shown += any(uses(c["source"], name) and not c["exported"] for c in after)
    lengths = [c["lines"] for c in code if c["exported"] and c["body"] and not _only_imports(c["body"])]
    return {
        "cells": len(code), "exports": total, "used": used, "shown": shown, "lengths": lengths,
        "all": [c["lines"] for c in code], "long": [(c["lines"], c["id"]) for c in code if c["lines"] > 80],
    }  # fmt: skip


def _only_imports(body: list[ast.stmt]) -> bool:
    return all(isinstance(n, ast.Import | ast.ImportFrom) for n in body)


def rows(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    "Every chapter that exports something."
    for path in sorted(folder.rglob("*.ipynb")):
        if ".ipynb_checkpoints" not in path.parts:
            found = chapter(path)
            if found["exports"]:
                yield str(path.relative_to(folder).with_suffix("")), found


def share(part: float, whole: float) -> str:
    "In percent."
    return f"{100 * part / whole:.0f} %" if whole else "-"


def main() -> None:
    "Print the table."
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "nbs"
    every = dict(rows(folder))
    print(f"{'chapter':34} cells exports  used  shown  p90 longest  over 30")
    for name, one in every.items():
        p90 = np.percentile(one["lengths"], 90) if one["lengths"] else 0
        print(
            f"{name:34} {one['cells']:5} {one['exports']:7} {share(one['used'], one['exports']):>5} "
            f"{share(one['shown'], one['exports']):>6} {p90:4.0f} {max(one['lengths'], default=0):7}"
            f"  {share(sum(n > 30 for n in one['all']), one['cells']):>6}"
        )
    exports = sum(one["exports"] for one in every.values())
    lengths = [n for one in every.values() for n in one["lengths"]]
    everything = [n for one in every.values() for n in one["all"]]
    used, shown = sum(o["used"] for o in every.values()), sum(o["shown"] for o in every.values())
    print(
        f"\nall: {len(every)} chapters, {exports} exports; used within two cells {share(used, exports)} "
        f"(best books {BEST['used within two cells']}), shown there {share(shown, exports)} ({BEST['shown there']}); "
        f"exporting cells p90 {np.percentile(lengths, 90):.0f} ({BEST['p90']}), longest {max(lengths)}; "
        f"cells over 30 lines {share(sum(n > 30 for n in everything), len(everything))} ({BEST['over 30']})"
    )
    for name, one in every.items():
        for lines, cell in one["long"]:
            print(f"over 80 lines: {name} #{cell}: {lines}")


if __name__ == "__main__":
    main()
