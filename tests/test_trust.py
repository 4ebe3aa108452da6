"""The chapter of guarantees: every figure that it names was measured, and only the tests write them."""

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from vlm_itl.core.checks import RunError
from vlm_itl.core.files import project_root, read_json
from vlm_itl.studies.trust import GUARANTEES, trust_figures, trust_table


def test_every_figure_was_measured() -> None:
    """No dash in the table, and no guarantee without a word on what is not promised."""
    figures = trust_figures()
    for promise, test, limit in GUARANTEES:
        assert promise.startswith("**") and limit
        for key in re.findall(r"{(\w+)}", test):
            assert figures[key] not in ("", "0", "nan") or key in ("leak_false_alarms", "load_handles"), key
    assert trust_table(figures).count("|\n|") == len(GUARANTEES) + 1


def test_nothing_failed_in_the_last_run() -> None:
    """A table of guarantees with failing tests behind it would lie."""
    tests = read_json(project_root() / "results/trust.json")["tests"]
    assert len(tests) == 9 and all(count["failed"] == 0 < count["passed"] for count in tests.values())


def test_figures_come_from_junit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shares of fuzzing are added up; other figures are the last ones."""
    monkeypatch.syspath_prepend(str(project_root() / "tools"))
    import trust

    suite = ElementTree.Element("testsuite")
    for name, value in (("a", "5"), ("b", "7")):
        case = ElementTree.SubElement(suite, "testcase", classname="tests.test_fuzz", name=name)
        properties = ElementTree.SubElement(case, "properties")
        ElementTree.SubElement(properties, "property", name="trust.fuzz_cases", value=value)
        ElementTree.SubElement(properties, "property", name="trust.exif_pairs", value="64")
    ElementTree.SubElement(case, "failure")
    ElementTree.ElementTree(suite).write(tmp_path / "junit.xml")
    found = trust.read_junit(tmp_path / "junit.xml")
    assert found["figures"] == {"fuzz_cases": 12, "exif_pairs": 64}
    assert found["tests"] == {"fuzz": {"passed": 1, "failed": 1, "skipped": 0}}


def test_missing_figures_are_dashes(tmp_path: Path) -> None:
    """A table without a run says so; a folder without results is one clear line."""
    assert "| SIGKILL at - points" in trust_table({})
    with pytest.raises(RunError, match="does not exist"):
        trust_figures(tmp_path)
