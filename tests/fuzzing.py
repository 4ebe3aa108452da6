"""What every fuzzed test shares: how many cases, what is allowed to happen, and the count of what was tried."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from PIL import Image

from vlm_itl.core.checks import VlmItlError

# Times the usual number of cases. At 1 they are the same cases each time; above, new ones.
FACTOR = float(os.environ.get("VLM_ITL_FUZZ", "1"))


def fuzz(cases: int) -> settings:
    """So many cases, without a data base or a clock."""
    return settings(
        max_examples=max(1, int(cases * FACTOR)),
        derandomize=FACTOR == 1,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


class Tried:
    """Counts cases, and holds each to the contract: it works, or one line says what is wrong."""

    def __init__(self) -> None:
        self.count = 0

    @contextmanager
    def case(self) -> Iterator[None]:
        """One case: nothing but an error of ours may come out, in one line; and no warning."""
        self.count += 1
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            # pytest takes the filters of vlm_itl.data.labels away; another test tries the real ones
            warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
            warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
            warnings.filterwarnings("ignore", category=ResourceWarning)
            try:
                yield
            except VlmItlError as error:
                said = str(error)
                assert said.strip() and "\n" not in said and len(said) < 3000, said
                assert "Traceback" not in said and said.isprintable(), said

    def report(self, record_property: Callable[[str, Any], None]) -> None:
        """Say how many; the sum over all tests is the figure."""
        record_property("trust.fuzz_cases", self.count)


SIZES = st.sampled_from([1, 2, 3, 7, 8])
NUMBERS = st.one_of(
    st.integers(-3, 3),
    st.floats(),
    st.sampled_from([400, 5000]).map(lambda digits: 10**digits),  # made late: they cannot be printed
    st.sampled_from([10**18, 2**63, -(2**63), 1e-300, 1e308, 0.5, 1.5, True, False]),
)
TEXTS = st.one_of(
    st.text(max_size=12),
    st.text(st.characters(), max_size=4),
    st.sampled_from(
        [
            "",
            " ",
            "none",
            "None",
            "{",
            "{a: 1}",
            "[1, 2",
            "{a: &x [*x]}",
            "&a [*a]",
            "!!int ''",
            "!!binary '?'",
            "1e5",
            "-.inf",
            ".nan",
            "2001-99-99",
            "2026-01-31",
            "!!python/object:os.system {}",
            "a: b: c",
            "\x00",
            "\ud800",
            "x" * 5000,
            "[" * 2000,
            "0x",
            "12_3",
            "~nobody/x",
            "{a: .nan}",
            "random",
            "entropy-mean-top",
            "0.1",
            "yes",
            "{question!r}",
            "{0}",
            "{class_names:>99}",
            "\n",
            "..",
            "/",
        ]
    ),
)
PLAIN = st.one_of(st.none(), NUMBERS, TEXTS)
ODD = st.one_of(
    PLAIN,
    st.binary(max_size=4),
    st.just(object()),
    st.just({1, 2}),
    st.just(1 + 2j),
    st.lists(PLAIN, max_size=3),
    st.dictionaries(TEXTS, PLAIN, max_size=3),
)
WILD = st.recursive(
    ODD, lambda inner: st.lists(inner, max_size=2) | st.dictionaries(TEXTS, inner, max_size=2), max_leaves=6
)
