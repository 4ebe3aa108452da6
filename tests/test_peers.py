"""The table of other libraries, and that the library itself needs none of them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from vlm_itl.core.checks import ConfigError, RunError
from vlm_itl.core.files import write_json
from vlm_itl.studies.peers import peers_table, read_peers

PEERS = ("baal", "skactiveml", "small_text", "skmatter", "distil")


def test_every_known_defect_stands_in_the_table():
    table = peers_table()
    names = " ".join(table["library"])
    for library in ("baal", "nnActive", "small-text", "distil", "TypiClust", "Mittal", "scikit-activeml"):
        assert library in names
    what = " ".join(table["what"])
    for word in ("logits", "width", "PowerSampling", "NaN", "mixes", "model.train()", "N % 500", "by row", "0-255"):
        assert word in what
    assert all(row["shown"] for row in read_peers()["rows"]) and "missing" not in set(table["how"])


def test_agreement_is_with_three_libraries():
    table = peers_table("agreement")
    assert {name.split()[0] for name in table["library"]} == {"skmatter", "scikit-activeml", "baal"}
    assert list(table.columns) == ["library", "what", "input", "theirs", "how"]


def test_missing_libraries_stand_in_the_table(tmp_path: Path):
    row: dict[str, Any] = {"library": "baal", "kind": "defect", "part": "x", "input": "", "ours": "", "how": "missing"}
    row |= {"peer": "missing: pip install baal", "shown": None}
    write_json(tmp_path / "peers.json", {"versions": {"baal": None}, "rows": [row]})
    table = peers_table(path=tmp_path / "peers.json")
    assert table["library"].tolist() == ["baal"] and table["theirs"][0] == "missing: pip install baal"
    assert len(peers_table("agreement", tmp_path / "peers.json")) == 0


def test_bad_input(tmp_path: Path):
    with pytest.raises(ConfigError, match="kind"):
        peers_table("defects")
    with pytest.raises(RunError, match="does not exist"):
        peers_table(path=tmp_path / "none.json")


def test_the_library_imports_no_peer(root: Path):
    pattern = re.compile(rf"^\s*(import|from)\s+({'|'.join(PEERS)})\b", re.M)
    assert pattern.search("    from baal.active import x")
    files = sorted((root / "vlm_itl").rglob("*.py"))
    assert len(files) > 20 and not [f.name for f in files if pattern.search(f.read_text())]
