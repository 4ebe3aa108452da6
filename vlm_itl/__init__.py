"""How much of the labelling can a vision-language model take over, and how would you know?

Parts, each with its public names; a part imports earlier ones only:

- `vlm_itl.core`: checks, seeds, files, settings, guards, run folders
- `vlm_itl.data`: from files of any layout to images, masks and classes
- `vlm_itl.formats`: masks in and out of annotation tools and other data sets
- `vlm_itl.model`: any segmenter: loaded, trained, evaluated, asked how unsure it is
- `vlm_itl.probe`: a segmenter for fast rounds: a frozen encoder, its features kept on disk, and a small head
- `vlm_itl.sampler`: which images, or which parts of them, to label next
- `vlm_itl.vlm`: judges: local models, servers, simulated and free ones
- `vlm_itl.proposals`: whose masks a judge sees, how much of one to believe, what it costs to correct it
- `vlm_itl.judging`: what a judge is worth
- `vlm_itl.people`: what people are asked, where they answer, and what comes back
- `vlm_itl.reports`: trackers, tables, figures and comparisons of runs
- `vlm_itl.experiment`: the loop and its configuration
- `vlm_itl.cli`: the command `vlm_itl_run`

Every public name of a part is known here, too, and imported when it is first asked for.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_PARTS = (
    *("core", "data", "formats", "model", "probe", "sampler", "vlm", "proposals", "judging", "people", "reports"),
    "experiment",
)


def _names() -> dict[str, str]:
    "Public name -> its part."
    return {name: part for part in _PARTS for name in import_module(f"{__name__}.{part}").__all__}


def __getattr__(name: str) -> Any:
    "A part, or a public name of one."
    if name in _PARTS:
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
