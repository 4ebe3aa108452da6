"""Run the tests of the guarantees, write their figures to results/trust.json: `python tools/trust.py`, half an hour."""

import datetime
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from vlm_itl.core.files import read_json, write_json

ROOT = Path(__file__).resolve().parent.parent
FILES = ("resume", "determinism", "faults", "leaks", "fuzz", "fuzz_pictures", "fuzz_runs", "security", "load")
SUMMED = ("fuzz_cases",)  # each test reports its own share


def read_junit(path: Path) -> dict[str, Any]:
    """Figures by their key, and how many tests of each file passed, failed or were skipped."""
    figures: dict[str, Any] = {}
    tests: dict[str, dict[str, int]] = {}
    for case in ElementTree.parse(path).iter("testcase"):
        name = case.get("classname", "").split(".")[-1].removeprefix("test_")
        failed = case.find("failure") is not None or case.find("error") is not None
        outcome = "failed" if failed else "skipped" if case.find("skipped") is not None else "passed"
        counts = tests.setdefault(name, {"passed": 0, "failed": 0, "skipped": 0})
        counts[outcome] += 1
        for entry in case.iter("property"):
            key = entry.get("name", "")
            if key.startswith("trust."):
                key, value = key.removeprefix("trust."), float(entry.get("value", "nan"))
                figures[key] = figures.get(key, 0) + value if key in SUMMED else value
    whole = {key: int(value) if float(value).is_integer() else round(value, 3) for key, value in figures.items()}
    return {"figures": whole, "tests": {name: tests[name] for name in FILES if name in tests}}


def main(arguments: list[str]) -> int:
    """Run, or read the junit file that is given."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(arguments[0]) if arguments else Path(folder) / "junit.xml"
        code = 0
        if not arguments:
            files = [f"tests/test_{name}.py" for name in FILES]
            command = [sys.executable, "-m", "pytest", "-q", *files, f"--junitxml={path}"]
            code = subprocess.run(command, cwd=ROOT).returncode
        found = read_junit(path)
    out = ROOT / "results" / "trust.json"
    before = read_json(out)["figures"] if out.is_file() else {}
    found["figures"] = dict(sorted({**before, **found["figures"]}.items()))
    write_json(out, {"date": f"{datetime.date.today()}", **found})
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
