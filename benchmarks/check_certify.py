"""The certified threshold beside the naive one and MAPIE's, over simulated judges whose truth is known in closed form.

    pip install -c constraints.txt -e '.[benchmark]'     # MAPIE: not a requirement of the library
    python benchmarks/check_certify.py                   # half a minute on one core; --repetitions 500

alpha = delta = 0.1. A repetition draws a calibration sample, each rule chooses a threshold on it, and the promise is
broken if the true bad share above that threshold exceeds alpha. MAPIE's `BinaryClassificationController` controls the
precision at 1 - alpha with confidence 1 - delta: with its default (Bonferroni-Holm over its 100 thresholds), with its
own fixed sequence over them, and with a fixed sequence over exactly the thresholds that `certify` visits. The last is
the same test with another bound, so the two can be compared sample by sample. Results go to results/certify.json.
"""

import argparse
import math
import os
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from mapie.risk_control import BinaryClassificationController
from scipy import stats

from vlm_itl.core.files import write_json
from vlm_itl.core.seeds import make_rng
from vlm_itl.judging.certify import CERTIFY_GRID, certify, least_sample

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "results" / "certify.json"
ALPHA, DELTA, BASE = 0.1, 0.1, 0.6
CASES = [(0.92, 200), (0.92, 500), (0.92, 1000), (0.85, 200), (0.85, 500), (0.85, 1000)]  # AUC, n
MAPIE_GRID = np.linspace(0.99, 0.0, 100)  # its default thresholds, strict to lenient


def draw(rng: np.random.Generator, n: int, auc: float) -> tuple[np.ndarray, np.ndarray]:
    """p_yes and goodness of n masks: binormal, 60 % good; p_yes is the true P(good), so that any grid suits it."""
    good = rng.random(n) < BASE
    d = math.sqrt(2) * float(stats.norm.ppf(auc))
    latent = rng.normal(size=n) + good * d
    return 1 / (1 + np.exp(-(d * latent - d * d / 2 + math.log(BASE / (1 - BASE))))), good


def true_shares(threshold: float | None, auc: float) -> tuple[float, float]:
    """P(accepted), P(bad | accepted)."""
    if threshold is None or threshold >= 1:
        return 0.0, 0.0
    d = math.sqrt(2) * float(stats.norm.ppf(auc))
    odds = math.log(max(threshold, 1e-12) / (1 - threshold))
    latent = (odds + d * d / 2 - math.log(BASE / (1 - BASE))) / d
    good, bad = BASE * float(stats.norm.sf(latent - d)), (1 - BASE) * float(stats.norm.sf(latent))
    return good + bad, bad / (good + bad) if good + bad > 0 else 0.0


def naive(p_yes: np.ndarray, good: np.ndarray) -> float | None:
    """The lowest score with an observed bad share of at most alpha above it."""
    order = np.argsort(-p_yes)
    clean = np.flatnonzero(np.cumsum(~good[order]) / np.arange(1, len(order) + 1) <= ALPHA)
    return float(p_yes[order][clean[-1]]) if len(clean) else None


def ours(p_yes: np.ndarray, good: np.ndarray) -> float | None:
    """The certified threshold."""
    threshold = certify(p_yes, good, ALPHA, DELTA)["threshold"]
    return None if threshold is None else float(threshold)


def sequence(p_yes: np.ndarray) -> np.ndarray:
    """The thresholds that `certify` visits, strict to lenient."""
    accepted = (p_yes[None] >= CERTIFY_GRID[:, None]).sum(axis=1)
    return CERTIFY_GRID[accepted >= max(0.15 * len(p_yes), least_sample(ALPHA, DELTA))]


def mapie(method: str, same: bool = False) -> Callable[[np.ndarray, np.ndarray], float | None]:
    """MAPIE's most lenient valid threshold."""

    def choose(p_yes: np.ndarray, good: np.ndarray) -> float | None:
        controller = BinaryClassificationController(
            lambda x: np.stack([1 - x[:, 0], x[:, 0]], axis=1),
            "precision",
            1 - ALPHA,
            confidence_level=1 - DELTA,
            best_predict_param_choice="predicted_positive_fraction",
            list_predict_params=sequence(p_yes) if same else MAPIE_GRID,
            fwer_method=method,
        )
        controller.calibrate(p_yes[:, None], good.astype(int))
        valid = np.asarray(controller.valid_predict_params).ravel()
        return float(valid.min()) if len(valid) else None

    return choose


RULES: dict[str, Callable[[np.ndarray, np.ndarray], float | None]] = {
    "naive": naive,
    "certify": ours,
    "mapie_bonferroni_holm": mapie("bonferroni_holm"),
    "mapie_fixed_sequence": mapie("fixed_sequence"),
    "mapie_same_sequence": mapie("fixed_sequence", same=True),
}


def case(auc: float, n: int, repetitions: int) -> dict[str, Any]:
    """Broken promises and accepted share of each rule."""
    shares: dict[str, list[tuple[float, float]]] = {rule: [] for rule in RULES}
    for repetition in range(repetitions):
        p_yes, good = draw(make_rng(repetition, "check certify", auc, n), n, auc)
        for rule, choose in RULES.items():
            shares[rule].append(true_shares(choose(p_yes, good), auc))
    pairs_of = list(zip(shares["certify"], shares["mapie_same_sequence"], strict=True))
    best = [true_shares(float(t), auc) for t in CERTIFY_GRID]
    row: dict[str, Any] = {"auc": auc, "n": n, "best_possible": max(a for a, bad in best if bad <= ALPHA)}
    row["mapie_accepts_no_more"] = float(np.mean([theirs[0] <= mine[0] + 1e-9 for mine, theirs in pairs_of]))
    row["both_or_neither"] = float(np.mean([(theirs[0] > 0) == (mine[0] > 0) for mine, theirs in pairs_of]))
    for rule, pairs in shares.items():
        row[rule] = {
            "violates": float(np.mean([bad > ALPHA for _, bad in pairs])),
            "accepts": float(np.mean([a for a, _ in pairs])),
        }
    return row


def main() -> None:
    """All cases, printed and written."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=500)
    repetitions = parser.parse_args().repetitions
    began = time.process_time()
    rows = []
    for auc, n in CASES:
        rows.append(case(auc, n, repetitions))
        told = "; ".join(f"{r} {rows[-1][r]['violates']:.3f}/{rows[-1][r]['accepts']:.2f}" for r in RULES)
        print(f"AUC {auc}, n {n}: violates/accepts {told}; best {rows[-1]['best_possible']:.2f}", flush=True)
    limit = DELTA + 3 * math.sqrt(DELTA * (1 - DELTA) / repetitions)
    write_json(
        OUT,
        {
            "command": "python benchmarks/check_certify.py",
            "alpha": ALPHA,
            "delta": DELTA,
            "base_rate": BASE,
            "repetitions": repetitions,
            "allowed_violations": limit,
            "kept": all(row["certify"]["violates"] <= limit for row in rows),
            "cases": rows,
            "versions": {name: version(name) for name in ("mapie", "scikit-learn", "numpy", "scipy")},
            "threads": os.environ.get("OMP_NUM_THREADS", "default"),
            "cpu_seconds": round(time.process_time() - began, 1),
        },
    )
    print(f"wrote {OUT.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
