"""Parts of one's own: one registry for all of them, and files that bring them into any setting."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vlm_itl.core.checks import ConfigError
from vlm_itl.data.sources import SOURCES, register_source
from vlm_itl.experiment.config import Config, make_config, run_path
from vlm_itl.judging.corruption import ERROR_KINDS, register_error
from vlm_itl.model.doubt import AGGREGATORS, register_aggregate
from vlm_itl.model.segmenter import MODELS, register_model
from vlm_itl.sampler.regions import REGIONS, register_regions
from vlm_itl.sampler.strategy import (
    SCORES,
    SELECTS,
    SHORT,
    Sampler,
    parse_strategy,
    register_score,
    register_select,
    register_short,
)
from vlm_itl.sampler.uncertainty import scoring_options
from vlm_itl.vlm.handler import HANDLERS, VLMHandler, register_handler
from vlm_itl.vlm.render import STYLES, register_style

REGISTRIES: list[Any] = [AGGREGATORS, ERROR_KINDS, HANDLERS, MODELS, REGIONS, SCORES, SELECTS, SHORT, SOURCES, STYLES]


@pytest.fixture(autouse=True)
def shelves() -> Iterator[None]:
    """Every registry as it was."""
    try:
        from vlm_itl.core.registry import Registry

        undo = [registry.keep() for registry in Registry.all]
    except ImportError:  # an earlier version
        undo = []
    yield
    for restore in undo:
        restore()


def first(*arguments: Any, **named: Any) -> Any:
    """Fits everywhere."""


def second(*arguments: Any, **named: Any) -> Any:
    """Fits everywhere as well."""


class FirstJudge(VLMHandler):
    """Says nothing."""

    def _judge_one(self, query: Any) -> Any:
        raise NotImplementedError


class SecondJudge(FirstJudge):
    """Says nothing either."""


REGISTER: dict[str, Callable[[str, Any], Any]] = {
    "aggregate": lambda name, part: register_aggregate(name, "about", part),
    "error": lambda name, part: register_error(name)(part),
    "judge": lambda name, part: register_handler(name)(part),
    "model": lambda name, part: register_model(name)(part),
    "regions": lambda name, part: register_regions(name)(part),
    "score": lambda name, part: register_score(name, "about")(part),
    "pixel score": lambda name, part: register_score(name, "about", per_pixel=True)(part),
    "select": lambda name, part: register_select(name, "about")(part),
    "short": lambda name, part: register_short(name, part),
    "source": lambda name, part: register_source(name)(part),
    "style": lambda name, part: register_style(name, "note")(part),
}
TAKEN = {
    "aggregate": "mean", "error": "erode", "judge": "always_yes", "model": "segformer-nano", "regions": "slic",
    "score": "random", "pixel score": "entropy", "select": "top", "short": "entropy", "source": "folder",
    "style": "overlay",
}  # fmt: skip


@pytest.mark.parametrize("kind", REGISTER)
def test_29_a_word_that_is_taken_is_refused(kind: str) -> None:
    parts: tuple[Any, Any] = (first, second)
    parts = (FirstJudge, SecondJudge) if kind == "judge" else parts
    parts = ("random-none-top", "random-none-bottom") if kind == "short" else parts
    register = REGISTER[kind]
    for _ in range(2):  # a cell that is run again
        register("mine", parts[0])
    with pytest.raises(ConfigError, match="'mine' exists already"):
        register("mine", parts[1])
    with pytest.raises(ConfigError, match="exists already"):
        register(TAKEN[kind], parts[1])
    with pytest.raises(ConfigError):
        register("no words", parts[0])


@pytest.mark.parametrize("kind", sorted(set(REGISTER) - {"short"}))
def test_29_what_cannot_be_called_is_refused_at_once(kind: str) -> None:
    for wrong in (None, 3, lambda: None):
        with pytest.raises(ConfigError, match="'mine'"):
            REGISTER[kind]("mine", wrong)
    if kind != "judge":
        with pytest.raises(ConfigError, match="needs a name"):
            REGISTER[kind](first, first)  # type: ignore[arg-type]


def test_29_two_lambdas_are_two_functions() -> None:
    register_source("mine")(lambda source, **rest: 1)
    with pytest.raises(ConfigError, match="exists already"):
        register_source("mine")(lambda source, **rest: 2)


def test_29_a_pixel_score_and_an_aggregate_of_ones_own_are_computed() -> None:
    with pytest.raises(ConfigError, match=r"register_aggregate\('median', about, function\)"):
        register_aggregate("median", "median of the valid pixels")

    @register_score("gini", "1 - sum p^2", per_pixel=True)
    def gini(logits: torch.Tensor) -> torch.Tensor:
        return 1 - logits.softmax(1).square().sum(1)

    def middle(values: torch.Tensor, valid: torch.Tensor, predicted: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        return torch.stack([v[ok].double().median() * scale for v, ok in zip(values, valid, strict=True)])

    register_aggregate("middle", "median of the valid pixels", middle)
    logits, valid = torch.randn(3, 4, 5, 6, generator=torch.Generator().manual_seed(0)), torch.rand(3, 5, 6) > 0.3
    scorers = scoring_options(["gini-mean", "gini-middle", "entropy-middle"], scale=2.0)["scorers"]
    for image in range(3):
        truth = (1 - logits[image].softmax(0).square().sum(0))[valid[image]]
        assert torch.isclose(scorers["gini-mean"](logits, valid)[image], truth.double().mean(), atol=1e-6)
        assert torch.isclose(scorers["gini-middle"](logits, valid)[image], 2 * truth.double().median(), atol=1e-6)
    assert Sampler("gini-middle-top").needs == ("scores",) and parse_strategy("gini-mean-top").score_key == "gini-mean"
    assert make_config(strategy="gini-middle-top", strategy_options={"scale": 3.0}).strategy == "gini-middle-top"


def test_29_faults_of_a_part_are_one_line_with_its_own_file() -> None:
    @register_score("flat", "too flat", per_pixel=True)
    def flat(logits: torch.Tensor) -> torch.Tensor:
        return logits.sum()

    @register_score("broken", "fails")
    def broken(view: Any) -> np.ndarray:
        return np.zeros(3)[7]

    scorer = scoring_options(["flat-mean"])["scorers"]["flat-mean"]
    with pytest.raises(ConfigError, match=r"'flat' returned \(\), not a tensor"):
        scorer(torch.zeros(1, 2, 3, 3), torch.ones(1, 3, 3, dtype=torch.bool))
    with pytest.raises(ConfigError, match=r"'broken' failed: IndexError: .*test_plugins.py, line \d+"):
        Sampler("broken-none-top").select(None, ["a", "b"], 1, np.random.default_rng(0))
    with pytest.raises(ConfigError, match="reason"):
        register_score("odd", "about", reason="value {x}")


PART = """\
from vlm_itl.sampler.strategy import register_score, register_short

@register_score("{name}", "for a test", per_pixel=True)
def {name}(logits):
    return logits.sum(1)

register_short("{name}", "{name}-mean-top")
"""


def test_29_plugins_bring_parts_into_any_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "parts").mkdir()
    Path("parts/mine.py").write_text(PART.format(name="mine"))
    Path("a_module_for_a_test.py").write_text(PART.format(name="other"))
    monkeypatch.syspath_prepend(str(tmp_path))
    for given in (["parts/mine.py"], "parts/mine.py", "[parts/mine.py]", str(tmp_path / "parts/mine.py")):
        config = make_config(plugins=given, strategy="mine")
        assert config.to_dict()["plugins"][0].startswith("mine.py sha256:")
    assert make_config(config.to_dict()).plugins == config.to_dict()["plugins"]
    assert make_config(plugins=["a_module_for_a_test"], strategy="other-topk-power").plugins
    assert "plugins" in Config().to_dict() and Config().plugins == []
    before = run_path(config)
    Path("parts/mine.py").write_text(PART.format(name="mine") + "# changed\n")
    changed = make_config(plugins="parts/mine.py", strategy="mine")
    assert changed.to_dict() != config.to_dict() and run_path(changed) != before == run_path(config)
    with pytest.raises(ConfigError, match="another one by now"):
        make_config(plugins=[f"parts/{config.to_dict()['plugins'][0]}"])
    (tmp_path / "mine.py").symlink_to(tmp_path / "parts" / "mine.py")
    with pytest.raises(ConfigError, match=r"mine.py, line \d+: the .*'mine' exists already"):
        make_config(plugins=["parts/mine.py", "mine.py"])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("import json\nimport nothing_of_this_name\n", "line 2: ModuleNotFoundError"),
        ("x = 1\nif x\n", "line 2: SyntaxError"),
        ("import sys\n\nsys.exit(3)\n", "line 3: SystemExit"),
        ("1 / 0\n", "line 1: ZeroDivisionError"),
        (PART.format(name="twice") + PART.format(name="twice"), "line 10: the pixel score 'twice' exists already"),
        (PART.format(name="entropy"), "exists already"),
        ("x = '\0'\n", "odd.py"),
    ],
)
def test_29_a_plugin_that_fails_is_one_line_and_leaves_nothing(
    text: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("odd.py").write_text(text)
    before = [list(registry) for registry in REGISTRIES]
    with pytest.raises(ConfigError) as error:
        make_config(plugins=["odd.py"])
    assert "odd.py" in str(error.value) and said in str(error.value) and "\n" not in str(error.value)
    assert [list(registry) for registry in REGISTRIES] == before


@pytest.mark.parametrize(
    ("given", "said"),
    [(["none.py"], "no Python file"), (["no.such.module"], "no module"), (["a b"], "neither"), ([3], "no name"),
     ([""], "no name"), ({"a": 1}, "no name"), ("mine", "mine.py")],
)  # fmt: skip
def test_29_plugins_that_are_not_there(given: Any, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text("")
    with pytest.raises(ConfigError, match=said):
        make_config(plugins=given)


def test_a_promised_part_is_known_before_its_module_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Listed, counted and found by word or by prefix; imported once, when it is first looked up."""
    from vlm_itl.core.registry import Registry

    later: Registry[Any] = Registry("greeting", homes={"late": "greetings_of_a_test", "to:": "greetings_of_a_test"})
    try:
        register = "from vlm_itl.core.registry import Registry\n"
        register += "[Registry.all[-1].add(word, word.upper()) for word in ('late', 'to:')]\n"
        (tmp_path / "greetings_of_a_test.py").write_text(register)
        monkeypatch.syspath_prepend(str(tmp_path))
        later.add("early", "EARLY")
        assert later["early"] == "EARLY" and "greetings_of_a_test" not in sys.modules
        assert list(later) == ["early", "late", "to:"] and len(later) == 3
        assert "to:me" in later and "to" not in later and "from:me" not in later and 3 not in later
        with pytest.raises(KeyError):
            later["from:me"]
        restore = later.keep()  # a plugin that asks for it, and then fails
        assert later["to:me"] == later["to:"] == "TO:" and later["late"] == "LATE"
        restore()
        assert later["to:me"] == "TO:" and len(later) == 3
        with pytest.raises(ConfigError, match="must be"):
            later.add("from:", "not promised, so no word")
    finally:
        Registry.all.remove(later)
        sys.modules.pop("greetings_of_a_test", None)
