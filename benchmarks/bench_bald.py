"""BALD of a pool's images: extra memory and time beside baal's leanest way, and beside keeping the T passes.

Run as `python benchmarks/bench_bald.py [repeats] [JSON]`: each way in a fresh process (Linux: peak of /proc), so turns
are processes; a SegFormer of B0's size with random weights, 32 images, T = 10, one thread. `pip install baal==2.1.0`
for baal's rows; without it they are left out, which is said. What is compared is equal: the same scores from looks of
two images at once as from looks of all.
"""

import importlib.util
import sys

import torch
from bench_sampler import IMAGES, T, alone, small_model
from table import Row, compare, publish, same

from vlm_itl.sampler import uncertainty
from vlm_itl.sampler.uncertainty import look_maps


def equality() -> Row:
    "Of the scores from few images at once, and from all."
    model = small_model()
    pixels = torch.randint(0, 256, (4, 3, 64, 64), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    few = look_maps(model, pixels, T)[0]["bald"]
    uncertainty._AT_ONCE, before = len(pixels), uncertainty._AT_ONCE
    whole = look_maps(model, pixels, T)[0]["bald"]
    uncertainty._AT_ONCE = before
    return same("BALD: two images at once, and all", float((few - whole).abs().max()), 1e-6)


def main(repeats: int = 3) -> list[Row]:
    "Equality, memory, time."
    torch.set_num_threads(1)
    rows = [equality()]
    peers = {"stacked": "the T passes kept"}
    if importlib.util.find_spec("baal"):
        peers["lean"] = "baal's leanest"
    else:
        print("baal is not installed (pip install baal==2.1.0): its rows are left out", flush=True)
    found: dict[str, list[dict[str, float]]] = {way: [] for way in ("ours", *peers)}
    for _ in range(repeats):
        for way, taken in found.items():
            taken.append(alone("bald", way))
    ours, head = found["ours"], f"BALD, T = {T}, {IMAGES} images"
    for way, words in peers.items():
        megabytes = [[turn["mb"] for turn in turns] for turns in (ours, found[way])]
        seconds = [[turn["seconds"] for turn in turns] for turns in (ours, found[way])]
        rows.append(compare(f"{head}: extra memory / {words}", *megabytes, "MB", "<= 0.5"))
        rows.append(compare(f"{head}: CPU time / {words}", *seconds, "s", "<= 0.333" if way == "lean" else "<= 1.1"))
    return rows


if __name__ == "__main__":
    publish(main(int(sys.argv[1]) if len(sys.argv) > 1 else 3), sys.argv[2] if len(sys.argv) > 2 else None)
