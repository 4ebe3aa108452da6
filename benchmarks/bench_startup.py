"""What it takes before anything is computed: the command's list, and the import of the loop.

Run as `python benchmarks/bench_startup.py [repeats]` (a minute): CPU seconds of fresh processes in turns, rows as in
table.py. The peers are what no segmentation run can do without (torch, transformers, datasets), and for the list a
Python that imports nothing.
"""

import subprocess
import sys

from table import Row, compare, publish, take_turns

ENGINES = "import torch, transformers, datasets; from transformers import Trainer"
WAYS = {
    "list": [sys.executable, "-c", "import sys; from vlm_itl.cli.run import main; sys.exit(main(['list']))"],
    "papermill": [sys.executable, "-c", "import papermill"],
    "experiment": [sys.executable, "-c", "from vlm_itl.experiment import make_config, run_al"],
    "engines": [sys.executable, "-c", ENGINES],
}


def main(repeats: int = 5) -> list[Row]:
    "All rows."
    ways = {
        name: lambda command=command: subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        for name, command in WAYS.items()
    }
    taken = take_turns(ways, repeats)
    return [
        compare("vlm_itl_run list / import papermill", taken["list"], taken["papermill"], "CPU s", "<= 1.1"),
        compare("import of the loop / its engines", taken["experiment"], taken["engines"], "CPU s", "<= 1.5"),
    ]


if __name__ == "__main__":
    publish(main(*map(int, sys.argv[1:2])))
