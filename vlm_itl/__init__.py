"""How much of the labelling can a vision-language model take over, and how would you know?

Parts, each with its public names; a part imports earlier ones only:

- `vlm_itl.core`: checks, seeds, files, settings, guards, run folders
- `vlm_itl.data`: from files of any layout to images, masks and classes
- `vlm_itl.model`: any segmenter: loaded, trained, evaluated, asked how unsure it is
- `vlm_itl.sampler`: which images, or which parts of them, to label next
- `vlm_itl.vlm`: judges: local models, servers, simulated and free ones
- `vlm_itl.judging`: what a judge is worth
- `vlm_itl.experiment`: the loop, its configuration, tables and figures
- `vlm_itl.cli`: the command `vlm_itl_run`

Every public name of a part is known here, too, and imported when it is first asked for.
"""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

__version__ = "0.1.0"

_PARTS = ("core", "data", "model", "sampler", "vlm", "judging", "experiment")


# The flat modules of before, and the rooms that hold their names now. It goes when the chapters have been rewritten.
_MOVED = {
    "baselines": ["vlm.free"],
    "cache": ["vlm.cache", "vlm.handler"],
    "certify": ["judging.certify"],
    "checkpoints": ["model.checkpoints"],
    "compare": ["experiment.compare"],
    "corruption": ["judging.corruption"],
    "ensemble": ["vlm.ensemble"],
    "gradient": ["model.gradient"],
    "guards": ["core.guards"],
    "hf_judge": ["vlm.local"],
    "hf_model": ["vlm.local_model"],
    "judge": ["judging.measures"],
    "judge_figures": ["judging.judge_figures"],
    "labels": ["data.labels", "data.masks"],
    "leaks": ["data.leaks"],
    "metrics": ["model.metrics"],
    "openai_judge": ["vlm.server", "vlm.reply", "vlm.transport"],
    "pool": ["experiment.pool", "experiment.ledger", "experiment.annotator", "judging.measures"],
    "regions": ["sampler.regions"],
    "render": ["vlm.render"],
    "report": ["experiment.report", "experiment.run_figures", "core.figures"],
    "run": ["cli.run"],
    "runfolder": ["core.runfolder"],
    "scenes": ["data.scenes", "data.labels"],
    "scores": ["model.uncertainty"],
    "selects": ["sampler.selects"],
    "settings": ["experiment.config", "core.settings", "core.reading"],
    "simulated": ["vlm.simulated"],
    "tracking": ["experiment.tracking"],
    "train": ["model.train", "model.predict", "model.scoring", "data.masks"],
    "transforms": ["data.transforms"],
    "turns": ["experiment.human_turn", "experiment.judge_turn"],
}


class _Moved:
    "Finds the flat modules of before."

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        "A module that has the names of its rooms."
        package, _, old = name.rpartition(".")
        return ModuleSpec(name, _Moved()) if package == __name__ and old in _MOVED else None  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> None:
        "As usual."

    def exec_module(self, module: ModuleType) -> None:
        "Its names are looked up in the rooms."
        rooms = _MOVED[module.__name__.rpartition(".")[2]]

        def find(name: str) -> Any:
            if not name.startswith("__"):
                for room in rooms:
                    found = import_module(f"{__name__}.{room}")
                    if hasattr(found, name):
                        return getattr(found, name)
            raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}")

        module.__dict__["__getattr__"] = find


sys.meta_path.insert(0, _Moved)


def _names() -> dict[str, str]:
    "Public name -> its part."
    return {name: part for part in _PARTS for name in import_module(f"{__name__}.{part}").__all__}


def __getattr__(name: str) -> Any:
    "A part, or a public name of one."
    if name in _PARTS or name in _MOVED:
        return import_module(f"{__name__}.{name}")
    if name == "__all__":
        return sorted(_names())
    known = {} if name.startswith("_") else _names()
    if name not in known:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{known[name]}"), name)


def __dir__() -> list[str]:
    "What can be asked for."
    return sorted([*globals(), *_PARTS, *_names()])
