"""What a judge that learns from paid masks is worth on photographs, and what carries it.

    python benchmarks/bench_learned.py --shared ../shared   # 5 seeds, 40 to 160 labelled: half an hour on a core
    python benchmarks/bench_learned.py --shared ../shared --labelled 40

`--shared` holds data/VOCdevkit/VOC2012 (437 training images), data/grounded_sam_voc (masks of a foundation model for
them) and weights/mobilenet-v2-imagenet. The round's model is a linear probe of that encoder (strides 8 to 32 at 256 px,
multinomial logistic regression), trained on the labelled images: mIoU of the seven populated classes .39, .47 and .53.
Two kinds of proposals are judged: Grounded-SAM's, and the model's own. Every judge is fitted on the labelled images and
measured on all others. Results are written after each seed, to results/learned_judge.json.

Rows: `mask`: shape and class alone; `mask, no class`; `+ vectors`: likeness to paid segments in an encoder's features
(here the encoder is the model's own: a second one that has not seen VOC was not at hand); `+ model`: with the model's
opinion, of labelled images from twins that did not train on them; `naive`: the same from the model itself. `belief`,
`agreement`, `softmin`, `margin`, `entropy` are the model's own views of a mask. Of each: AUC of whole masks against
IoU >= .5 and .7, the same within fifths of the model's agreement with the mask (what the judge adds; for own masks,
within fifths of its confidence), mean error of a class's IoU, coverage and mean width of its 90 % intervals.
"""

import argparse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from vlm_itl.core.files import cache_root, read_json, write_json
from vlm_itl.data.labels import LabelSpace
from vlm_itl.data.masks import read_mask
from vlm_itl.data.sources import load_data
from vlm_itl.judging.cards import added_value
from vlm_itl.judging.measures import gather_answers
from vlm_itl.model.metrics import class_iou, count_pairs, mean_iou_of
from vlm_itl.model.scoring import grid_mask, grid_size
from vlm_itl.model.segmenter import load_model
from vlm_itl.proposals.learned import Lesson, Scholar
from vlm_itl.proposals.segments import MODEL, PROPOSER, SHAPE, Segments, describe_one, segment_ious
from vlm_itl.vlm.free import mask_confidence
from vlm_itl.vlm.handler import Judgement
from vlm_itl.vlm.simulated import mask_belief

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "results" / "learned_judge.json"
VOC, SIDE, PARTS = LabelSpace.voc(), 256, 3


def features(shared: Path, rows: Any) -> torch.Tensor:
    """Strides 8 to 32 of the encoder, side by side at stride 8: (N, D, 32, 32), fp16; kept in the cache."""
    kept = cache_root() / "bench_learned_features.pt"
    if kept.is_file():
        return torch.load(kept)
    net, maps = load_model(str(shared / "weights/mobilenet-v2-imagenet"), VOC).encoder.eval(), []
    for row in rows:
        pixels = np.asarray(row["image"].resize((SIDE, SIDE), Image.Resampling.BILINEAR), np.float32) / 127.5 - 1
        with torch.inference_mode():
            hidden = net(torch.tensor(pixels).permute(2, 0, 1)[None], output_hidden_states=True).hidden_states
        last = {h.shape[-1]: h for h in hidden if h.shape[-1] <= SIDE // 8}  # the last map of each stride
        same = [F.interpolate(h, size=(SIDE // 8,) * 2, mode="bilinear") for _, h in sorted(last.items())]
        maps.append(torch.cat(same, 1)[0].half())
    kept.parent.mkdir(parents=True, exist_ok=True)
    torch.save(torch.stack(maps), kept)
    return torch.stack(maps)


class Probe:
    """A linear probe: multinomial logistic regression on the cells of feature maps."""

    def __init__(self, maps: torch.Tensor, truths: list[np.ndarray], rows: np.ndarray, seed: int):
        sample = maps[::7].float()
        self.centre, self.scale = sample.mean((0, 2, 3)), sample.std((0, 2, 3)) + 1e-3
        small = np.stack(
            [np.asarray(Image.fromarray(truths[i]).resize((32, 32), Image.Resampling.NEAREST)) for i in rows]
        )
        x, y = self._cells(maps[torch.as_tensor(rows)]), torch.as_tensor(small).long().flatten()
        keep = torch.nonzero(y != 255)[:, 0]
        keep = keep[torch.randperm(len(keep), generator=torch.Generator().manual_seed(seed))[:40_000]]
        x, y = x[keep], y[keep]
        self.weight, self.bias = torch.zeros(x.shape[1], len(VOC)), torch.zeros(len(VOC))
        for tensor in (self.weight, self.bias):
            tensor.requires_grad_(True)
        solver = torch.optim.LBFGS([self.weight, self.bias], max_iter=60, history_size=8, line_search_fn="strong_wolfe")

        def loss() -> torch.Tensor:
            solver.zero_grad()
            value = F.cross_entropy(x @ self.weight + self.bias, y) + 0.01 * self.weight.square().sum()
            value.backward()
            return value

        solver.step(loss)

    def _cells(self, maps: torch.Tensor) -> torch.Tensor:
        return ((maps.float() - self.centre[:, None, None]) / self.scale[:, None, None]).movedim(1, -1).flatten(0, 2)

    def look(self, one: torch.Tensor, size: tuple[int, int]) -> np.ndarray:
        """Probabilities (C, h, w) of one image."""
        with torch.no_grad():
            logits = (self._cells(one[None]) @ self.weight + self.bias).T.reshape(1, len(VOC), *one.shape[-2:])
            return F.interpolate(logits, size=size, mode="bilinear")[0].softmax(0).numpy()


def own_views(p: np.ndarray, mask: np.ndarray) -> dict[str, float]:
    """What the model says of a mask, higher is better; all on the grid."""
    small, logits = grid_mask(mask), torch.from_numpy(np.log(np.maximum(p, 1e-12)))
    agreed = mean_iou_of(class_iou(count_pairs(p.argmax(0).astype(np.uint8), small, len(VOC))).tolist())
    kinds = {kind: mask_confidence(logits, small, kind) for kind in ("softmin", "margin", "entropy")}
    return {"agreement": agreed, "belief": mask_belief(p, small), **kinds}


def lesson(tables: list[Segments], ious: list[np.ndarray], truths: list[Segments]) -> Lesson:
    """As the library makes it, from tables that are there."""
    joined = Segments.join(tables)
    iou = np.concatenate([values[table.class_ids] for values, table in zip(ious, tables, strict=True)])
    whole = {str(table.ids[0]): float(np.nanmean(values)) for values, table in zip(ious, tables, strict=True)}
    known = np.isfinite(iou)
    return Lesson(joined.take(known), iou[known], whole, Segments.join(truths))


def columns(table: Segments, names: tuple[str, ...], vectors: bool) -> Segments:
    """A table with some of its columns."""
    values = table.values[:, [table.names.index(name) for name in names]]
    none = np.zeros((len(table), 0), np.float32)
    pooled, ring = (table.pooled, table.ring) if vectors else (none, none)
    return replace(table, values=values, names=names, pooled=pooled, ring=ring)


def measured(scores: np.ndarray, whole: np.ndarray, stratum: np.ndarray) -> dict[str, float]:
    """AUC of whole masks, plain and within fifths of the model's own view."""
    found = {}
    for tau in (0.5, 0.7):
        said = [Judgement("yes", p_yes=float(s)) for s in scores.argsort().argsort() / len(scores)]
        added = added_value(gather_answers(said, whole, tau), stratum, resamples=1)
        found |= {f"auc_{tau}": added["roc_auc"]["value"], f"partial_{tau}": added["partial_auc"]["value"]}
    return found


class NoClass(Scholar):
    """Without the class among its columns."""

    def columns(self, segments: Segments, without: Any = ()) -> np.ndarray:
        return super().columns(segments, without)[:, : segments.values.shape[1]]


def judge(
    lesson: Lesson, tables: list[Segments], ious: list[np.ndarray], stratum: np.ndarray, kind: Any = Scholar
) -> dict:
    """Learn, guess about the pool, compare."""
    each, whole = kind(lesson, len(VOC), tau=0.5).judge(Segments.join(tables))
    truth = np.concatenate([values[t.class_ids] for values, t in zip(ious, tables, strict=True)])
    guess, low, high = (np.array([getattr(g, name) for g in each]) for name in ("iou", "low", "high"))
    some = np.isfinite(truth)
    right = np.array([np.nanmean(values) for values in ious])
    p_good = np.array([whole[str(t.ids[0])].p_good for t in tables])
    return {
        **measured(np.array([whole[str(t.ids[0])].iou for t in tables]), right, stratum),
        "error": float(np.abs(guess - truth)[some].mean()),
        "coverage": float(((low <= truth + 1e-9) & (truth - 1e-9 <= high))[some].mean()),
        "width": float((high - low)[some].mean()),
        "brier": float(((p_good - (right >= 0.5)) ** 2).mean()),
        "accepted": float((p_good >= 0.5).mean()),
        "precision": float((right[p_good >= 0.5] >= 0.5).mean()) if (p_good >= 0.5).any() else float("nan"),
    }


class Bench:
    """The photographs, their truth, the proposals, the feature maps."""

    def __init__(self, shared: Path):
        rows = load_data(str(shared / "data/VOCdevkit/VOC2012"), val_share=1, leaks="off")
        everything = [*rows.train, *rows.val]
        self.ids = [row["id"] for row in everything]
        self.truths = [np.asarray(row["mask"]) for row in everything]
        self.gsam = [read_mask(shared / f"data/grounded_sam_voc/{i}.png", VOC) for i in self.ids]
        self.maps = features(shared, everything)
        told = [self.table(j, truth) for j, truth in enumerate(self.truths)]
        self.told = told

    def table(self, j: int, mask: np.ndarray, p: np.ndarray | None = None) -> Segments:
        return describe_one(self.ids[j], mask, VOC, probabilities=p, features=self.maps[j].float().numpy())

    def run(self, seed: int, count: int) -> Iterator[tuple[str, str, dict[str, float]]]:
        """(proposals, judge, measures) for one draw of labelled images."""
        order = np.random.default_rng(seed).permutation(len(self.ids))
        human, pool = order[:count], order[count:]
        whole_model = Probe(self.maps, self.truths, human, seed)
        twins = {}
        for part in range(PARTS):
            twin = Probe(self.maps, self.truths, np.setdiff1d(human, human[part::PARTS]), seed + 100 * (part + 1))
            twins |= dict.fromkeys(human[part::PARTS].tolist(), twin)
        sizes = [grid_size(truth.shape) for truth in self.truths]
        seen = [whole_model.look(self.maps[j], sizes[j]) for j in range(len(self.ids))]
        unseen = {j: twins[j].look(self.maps[j], sizes[j]) for j in human.tolist()}
        yield from self.masks_of("gsam", human, pool, seen, unseen, lambda j, p: self.gsam[j])
        yield from self.masks_of("own", human, pool, seen, unseen, lambda j, p: p.argmax(0).astype(np.uint8))

    def masks_of(
        self, kind: str, human: Any, pool: Any, seen: Any, unseen: Any, mask: Any
    ) -> Iterator[tuple[str, str, dict]]:
        truth = self.truths if kind == "gsam" else [grid_mask(t) for t in self.truths]
        there = {j: self.table(j, mask(j, seen[j]), seen[j]) for j in range(len(self.ids))}
        honest = there | {j: self.table(j, mask(j, unseen[j]), unseen[j]) for j in human.tolist()}
        ious = {j: segment_ious(mask(j, seen[j]), truth[j]) for j in there}
        honest_ious = ious | {j: segment_ious(mask(j, unseen[j]), truth[j]) for j in human.tolist()}
        views = {j: own_views(seen[j], mask(j, seen[j])) for j in pool.tolist()}
        stratum = np.array([views[j]["agreement" if kind == "gsam" else "belief"] for j in pool])
        right = np.array([np.nanmean(ious[j]) for j in pool])
        for view in ("belief", "agreement", "softmin", "margin", "entropy"):
            if kind == "gsam" or view != "agreement":
                yield kind, f"the model's {view}", measured(np.array([views[j][view] for j in pool]), right, stratum)
        mask_only, all_of_it = (*SHAPE, *PROPOSER), (*SHAPE, *PROPOSER, *MODEL)
        sets = [
            ("mask, no class", mask_only, False, honest, honest_ious, NoClass),
            ("mask", mask_only, False, honest, honest_ious, Scholar),
            ("mask + vectors", mask_only, True, honest, honest_ious, Scholar),
            ("mask + model", all_of_it, False, honest, honest_ious, Scholar),
            ("mask + model, naive", all_of_it, False, there, ious, Scholar),
        ]
        for name, names, vectors, tables, values, scholar in sets:
            cut = {j: columns(tables[j], names, vectors) for j in tables}
            lessons = lesson([cut[j] for j in human], [values[j] for j in human], [self.told[j] for j in human])
            pooled = [columns(there[j], names, vectors) for j in pool]
            yield kind, name, judge(lessons, pooled, [ious[j] for j in pool], stratum, scholar)


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean over seeds, and half the width of a 95 % t interval of the AUC."""
    out: dict[str, Any] = {}
    for key in dict.fromkeys((r["proposals"], str(r["labelled"]), r["judge"]) for r in runs):
        these = [r for r in runs if (r["proposals"], str(r["labelled"]), r["judge"]) == key]
        names = [name for name in these[0] if isinstance(these[0][name], float)]
        out[" | ".join(key)] = {name: round(float(np.nanmean([r[name] for r in these])), 3) for name in names}
        out[" | ".join(key)]["seeds"] = len(these)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, required=True)
    parser.add_argument("--labelled", type=int, nargs="+", default=[40, 80, 160])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=OUT)
    given = parser.parse_args()
    torch.set_num_threads(1)
    bench = Bench(given.shared)
    runs: list[dict[str, Any]] = read_json(given.out, dict)["runs"] if given.out.is_file() else []
    done = {(r["seed"], r["labelled"]) for r in runs}
    for count in given.labelled:
        for seed in range(given.seeds):
            if (seed, count) in done:
                continue
            fresh = [
                {"seed": seed, "labelled": count, "proposals": p, "judge": j, **m} for p, j, m in bench.run(seed, count)
            ]
            runs += fresh
            write_json(given.out, {"summary": summary(runs), "runs": runs})
            print(count, seed, "done", flush=True)
    for row, values in summary(runs).items():
        print(f"{row:44}", values)


if __name__ == "__main__":
    main()
