"""What a training, a look at the pool and a judge cost on a GPU, and whether results there are reproducible.

Run as `python benchmarks/gpu.py [--data VOC_FOLDER] [--minutes 7] [--only PART ...] [--out FILE]`: needs no network
and no installation, only the library's folder on the path; without a GPU the same parts run in their small form on
the CPU. One JSON row a line with the keys {part, ours, peer, unit, ratio, goal, holds}; every part is tried on its
own, and one that fails says why. Weights are random, pictures are photographs where a VOC folder is given, else
scenes. Ways take turns, figures are medians.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLM_ITL_PROGRESS", "0")
os.environ.setdefault("WANDB_MODE", "disabled")

import torch
from torch.utils.data import DataLoader
from transformers import (
    MobileNetV2Config,
    MobileNetV2ForSemanticSegmentation,
    MobileNetV2Model,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    get_polynomial_decay_schedule_with_warmup,
)

from vlm_itl.core.seeds import seed_everything
from vlm_itl.data.sources import SegData, load_data
from vlm_itl.data.transforms import TrainingSet, collate
from vlm_itl.model.predict import Inference, autocast, predict_batches
from vlm_itl.model.recipe import TrainSettings, learning_rates, pixel_loss, train_transform
from vlm_itl.model.scoring import score_pool
from vlm_itl.model.segmenter import Segmenter, freeze_batchnorm, load_model, parameter_groups
from vlm_itl.model.train import fit
from vlm_itl.probe.probe_training import fit_probe

TESTS = Path(__file__).resolve().parent.parent / "tests"  # build tiny vision-language models
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
WORKERS = min(12, max(0, (os.cpu_count() or 1) - 2)) if GPU else 0
B4 = {"depths": [3, 8, 27, 3], "hidden_sizes": [64, 128, 320, 512], "decoder_hidden_size": 768}
STARTED = time.perf_counter()
ROWS: list[dict[str, Any]] = []


def row(part: str, ours: Any, peer: Any, unit: str, ratio: Any, goal: str, holds: bool) -> None:
    "Print one result as a line of JSON."
    values = {"part": part, "ours": ours, "peer": peer, "unit": unit, "ratio": ratio, "goal": goal, "holds": holds}
    ROWS.append(values)
    print(json.dumps(values), flush=True)


def wait() -> None:
    "Until the card has done what it was told."
    if GPU:
        torch.cuda.synchronize()


NAMES = {"b0": "SegFormer-b0", "b4": "SegFormer-b4", "mobilenet": "MobileNetV2 (DeepLabV3)"}


def network(data: SegData, size: str) -> Segmenter:
    "SegFormer-B0, -B4 or DeepLabV3 on MobileNetV2 with random weights; nano on a CPU."
    torch.manual_seed(0)
    if not GPU:
        return load_model("segformer-nano", data.labels)
    if size == "mobilenet":
        net = MobileNetV2ForSemanticSegmentation(MobileNetV2Config(num_labels=len(data.labels), output_stride=16))
        return Segmenter(net, data.labels)
    config = SegformerConfig(num_labels=len(data.labels), **(B4 if size == "b4" else {}))
    return Segmenter(SegformerForSemanticSegmentation(config), data.labels)


# --- training ---------------------------------------------------------------------------------------------------------


def settings(steps: int, batch: int, precision: str) -> TrainSettings:
    "The same for both ways."
    return TrainSettings(
        steps=steps,
        batch_size=batch,
        precision=precision,
        num_workers=WORKERS,
        device=DEVICE,
        crop=1.0,
        deterministic=False,
    )


def bare(model: Segmenter, data: SegData, how: TrainSettings, side: int) -> None:
    "The same maths in a loop of one's own, with everything such a loop should have: workers, pinned memory, clipping."
    examples = TrainingSet(data.train, train_transform(how, model, side), length=how.steps * how.batch_size, seed=0)
    rate, head_scale = learning_rates(how, model)
    optimizer = torch.optim.AdamW(parameter_groups(model, rate, head_scale, how.weight_decay), lr=rate)
    schedule = get_polynomial_decay_schedule_with_warmup(
        optimizer, round(how.warmup * how.steps), how.steps, lr_end=0.0, power=1.0
    )
    loader = DataLoader(examples, batch_size=how.batch_size, collate_fn=collate, num_workers=WORKERS, pin_memory=GPU)
    model.to(DEVICE).train()
    seed_everything(0, "train")
    device = torch.device(DEVICE)
    for batch in loader:
        freeze_batchnorm(model.train(), how.batch_norm)
        with autocast(device, how.precision):
            logits = model(batch["pixel_values"].to(device, non_blocking=True))
        pixel_loss(logits, batch["labels"].to(device, non_blocking=True)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), how.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    wait()


def training(data: SegData, size: str, side: int, batch: int, lengths: tuple[int, int], turns: int) -> None:
    "Images a second by the slope over two lengths, and peak memory."
    precision = "bf16" if GPU else "fp32"
    ways: dict[str, Callable[[Segmenter, TrainSettings], object]] = {
        "ours": lambda m, how: fit(m, data.train, how, Inference(side, device=DEVICE)),
        "bare": lambda m, how: bare(m, data, how, side),
    }
    taken: dict[str, dict[int, list[float]]] = {name: {n: [] for n in lengths} for name in ways}
    memory = {}
    for way in ways.values():
        way(network(data, size), settings(2, batch, precision))
    for _ in range(turns):
        for count in lengths:
            for name, way in ways.items():
                model = network(data, size)
                if GPU:
                    torch.cuda.empty_cache()
                    torch.cuda.reset_peak_memory_stats()
                start = time.perf_counter()
                way(model, settings(count, batch, precision))
                wait()
                taken[name][count].append(time.perf_counter() - start)
                memory[name] = torch.cuda.max_memory_allocated() / 2**20 if GPU else 0
    few, many = lengths
    speed = {}
    for name, seconds in taken.items():
        speed[name] = batch * (many - few) / (median(seconds[many]) - median(seconds[few]))
    ratio = speed["ours"] / speed["bare"]
    what = f"training, {NAMES[size] if GPU else 'SegFormer-nano'} at {side}, batch {batch}, {precision}"
    row(what, round(speed["ours"], 1), round(speed["bare"], 1), "images/s", round(ratio, 3), ">= .97", ratio >= 0.97)
    if GPU:
        share = memory["ours"] / memory["bare"]
        row(
            f"{what}, peak memory",
            round(memory["ours"]),
            round(memory["bare"]),
            "MB",
            round(share, 3),
            "<= 1.05",
            share <= 1.05,
        )


def busy(data: SegData, size: str, side: int, batch: int, steps: int) -> None:
    "Which share of the time the card computes, and what it waits for."
    if not GPU:
        return
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    fit(network(data, size), data.train, settings(2, batch, "bf16"), Inference(side, device=DEVICE))
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as watch:
        start = time.perf_counter()
        fit(network(data, size), data.train, settings(steps, batch, "bf16"), Inference(side, device=DEVICE))
        wait()
        wall = time.perf_counter() - start
    events = watch.key_averages()
    kernels = [e for e in events if e.device_type == DeviceType.CUDA]  # not the calls that launched them as well
    computing = sum(e.self_device_time_total for e in kernels) / 1e6
    row(f"card computing, {NAMES[size]} at {side}, batch {batch}, start of fit included", round(computing, 2),
        round(wall, 2), "s", round(computing / wall, 3), "none", True)  # fmt: skip
    waits = {e.key: round(e.cpu_time_total / 1e6, 2) for e in events if "Sync" in e.key or "next" in e.key.lower()}
    top = sorted(kernels, key=lambda e: -e.self_device_time_total)[:6]
    print(
        json.dumps({"waits_s": waits, "kernels_s": {e.key[:60]: round(e.self_device_time_total / 1e6, 2) for e in top}})
    )


def probe_round(data: SegData, work: Path) -> None:
    "A round of a probe: encode the pool once, train the head, look at the pool; and the same training again."
    os.environ["VLM_ITL_CACHE"] = str(work / "cache")
    torch.manual_seed(0)
    MobileNetV2Model(MobileNetV2Config()).save_pretrained(work / "encoder")
    view = Inference(256 if GPU else 64, batch_size=16, precision="bf16" if GPU else "fp32", device=DEVICE)
    how = TrainSettings(steps=150 if GPU else 5, batch_size=8, precision=view.precision, device=DEVICE)
    labelled = data.train.select(range(min(80, len(data.train))))
    found, seconds = [], []
    for _ in range(3):
        model = load_model(f"probe:{work / 'encoder'}", data.labels)
        start = time.perf_counter()
        fit_probe(model, labelled, how, view, seed=3)
        wait()
        middle = time.perf_counter()
        score_pool(model, data.train.remove_columns("mask"), view)
        wait()
        seconds.append((middle - start, time.perf_counter() - middle))
        found.append({k: v.detach().clone() for k, v in model.net.head.state_dict().items()})
    apart = max(difference(found[0], other) for other in found[1:])
    row("trainings of one seed, probe of MobileNetV2: largest difference of a weight", apart, 0.0, "", apart, "0",
        apart == 0)  # fmt: skip
    for number, when in ((0, "features not yet kept"), (-1, "features kept")):
        what = f"a probe's round, {how.steps} steps and a look at {len(data.train)} images, {when}"
        row(what, round(sum(seconds[number]), 2), None, "s", None, "none", True)


# --- reproducible? ----------------------------------------------------------------------------------------------------


def difference(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> float:
    "The largest difference of a weight."
    return max(float((one[key].double().cpu() - two[key].double().cpu()).abs().max()) for key in one)


def same_seed(data: SegData) -> None:
    "Trainings of one seed: as they are by default, and with `deterministic=False`."
    for name, precision in (("segformer-nano", "fp32"), ("b0", "bf16")):
        times = {}
        for fixed in (True, False):
            found, seconds = [], []
            for _ in range(3):
                model = network(data, "b0") if name == "b0" else load_model(name, data.labels)
                how = replace(settings(20, 4, precision), deterministic=fixed)
                start = time.perf_counter()
                result = fit(model, data.train, how, Inference(128, device=DEVICE), seed=3)
                wait()
                seconds.append(time.perf_counter() - start)
                weights = {k: v.detach().clone() for k, v in model.state_dict().items()}
                found.append({**weights, "loss": torch.tensor(result.train_loss)})
            apart = max(difference(found[0], other) for other in found[1:])
            times[fixed] = min(seconds)
            what = f"trainings of one seed, {name}, {precision}, deterministic={fixed}: largest difference of a weight"
            row(what, apart, 0.0, "", apart, "0" if fixed else "none", apart == 0 or not fixed)
        row(
            f"a training in a fixed order, {name}, {precision}", round(times[True], 2), round(times[False], 2), "s",
            round(times[True] / times[False], 2), "<= 1.25", times[True] <= 1.25 * times[False],
        )  # fmt: skip


def child(folder: str) -> None:
    "One run, for the part below: in a process of its own, so that it can be killed."
    from vlm_itl.experiment.config import make_config
    from vlm_itl.experiment.loop import run_al

    config = make_config(
        mode="vlm", judge="confidence", dataset="scenes", data_options={"n_train": 60, "n_test": 12}, steps=40,
        image_size=96,
        initial=8, increment=8, max_labelled=24, save_every=5, device=DEVICE, output_dir=folder, gallery=0, preflight=0,
    )  # fmt: skip
    for record in run_al(config):
        print(record, flush=True)


def _run(folder: Path, kill_when: Callable[[], bool] | None = None) -> int:
    "Start the child; kill it as soon as asked to."
    process = subprocess.Popen([sys.executable, __file__, "--child", str(folder)], stdout=subprocess.DEVNULL)
    while process.poll() is None:
        if kill_when is not None and kill_when():
            process.send_signal(signal.SIGKILL)
            process.wait()
            return -9
        time.sleep(0.02)
    return process.returncode


def _numbers(folder: Path) -> list[dict[str, Any]]:
    "What a run measured, without the clock."
    lines = (folder / "rounds.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


def killed(work: Path) -> None:
    "A run that was killed in the middle of a training, and one that was not."
    whole, broken, again = work / "whole", work / "broken", work / "again"
    codes = [_run(whole), _run(again)]
    at = lambda: bool(list(broken.glob("round_000*/**/checkpoint-*")) or list(broken.rglob("checkpoint-15*")))  # noqa: E731
    codes += [_run(broken, at), _run(broken)]
    same = _numbers(whole) == _numbers(again)
    row("two runs of one seed (three rounds, judge) equal to the last digit", same, True, "", codes[:2], "equal", same)
    same = _numbers(whole) == _numbers(broken)
    row(
        "a run killed in a training and resumed, equal to one undisturbed",
        same,
        True,
        "",
        codes[2:],
        "equal",
        same and codes[2] == -9,
    )


# --- looking and judging ----------------------------------------------------------------------------------------------


def scoring(data: SegData, size: str, side: int, turns: int) -> None:
    "A pass over the pool with all its scores, against the bare forward passes."
    view = Inference(
        side, batch_size=16 if GPU else 4, precision="bf16" if GPU else "fp32", num_workers=WORKERS, device=DEVICE
    )
    rows = data.train.select(range(min(len(data.train), 64 if GPU else 16)))
    many = [n for n in range(len(rows))] * (12 if GPU else 1)
    blind = data.train.remove_columns("mask").select(many)
    from vlm_itl.data.masks import DecodeRows, make_rows, raw_rows

    cells = raw_rows(blind)[:]
    blind = (
        make_rows([f"n{n}" for n in range(len(many))], cells["image"], [None] * len(many))
        .with_transform(DecodeRows(data.labels))
        .remove_columns("mask")
    )
    model = network(data, size)

    def forward() -> None:
        for _ in predict_batches(model, blind, view):
            pass
        wait()

    ways: dict[str, Callable[[], object]] = {"ours": lambda: score_pool(model, blind, view), "bare": forward}
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(turns + 1):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            taken[name].append(time.perf_counter() - start)
    speed = {name: len(blind) / median(seconds[1:]) for name, seconds in taken.items()}
    ratio = speed["ours"] / speed["bare"]
    row(
        f"scoring, {NAMES[size] if GPU else 'SegFormer-nano'} at {side}",
        round(speed["ours"], 1),
        round(speed["bare"], 1),
        "images/s",
        round(ratio, 3),
        ">= .9",
        ratio >= 0.9,
    )


def vlm(folder: Path, big: bool) -> Path:
    "A random LLaVA: the tests' tiny one, or one with 500 million weights that reads 576 tokens a picture."
    import transformers as tf

    sys.path.insert(0, str(TESTS))
    import tiny_vlms

    if not big:
        return tiny_vlms.build("llava", folder)
    tok = tiny_vlms.tokenizer(("Yes", "No"))
    images = tiny_vlms.CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336})
    processor = tf.LlavaProcessor(images, tok, patch_size=14, vision_feature_select_strategy="default",
                                  num_additional_image_tokens=1, chat_template=tiny_vlms.CHAT)  # fmt: skip
    vision = tf.CLIPVisionConfig(
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        image_size=336,
        patch_size=14,
    )
    text = tf.LlamaConfig(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16,
                          num_key_value_heads=16,
                          vocab_size=len(tok), max_position_embeddings=4096, pad_token_id=tok.pad_token_id)  # fmt: skip
    config = tf.LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tok.convert_tokens_to_ids("<image>"),
        image_seq_length=576,
    )
    torch.manual_seed(0)
    model = tf.LlavaForConditionalGeneration(config)
    print(json.dumps({"vlm_million_weights": round(sum(p.numel() for p in model.parameters()) / 1e6)}))
    model.to(torch.bfloat16).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def judging(data: SegData, work: Path, big: bool, count: int) -> None:
    "Masks judged a second by a local model, and batched answers against single ones."
    import vlm_itl.vlm.local  # noqa: F401, registers the judge
    from vlm_itl.vlm.handler import JudgeQuery, make_handler

    folder = vlm(work / ("big" if big else "tiny"), big)
    queries = []
    for n in range(count):
        cells = data.train[n % len(data.train)]
        queries.append(JudgeQuery(f"q{n}", cells["image"], cells["mask"], labels=data.labels))
    judge = make_handler(
        "hf",
        model=str(folder),
        device=DEVICE,
        batch_size=16 if GPU else 4,
        dtype="bfloat16" if big and GPU else "float32",
        min_mass=0.0,  # random weights: the words yes and no are as likely as any other
    )
    judge.judge(queries[:4])
    start = time.perf_counter()
    answers = judge.judge(queries)
    wait()
    seconds = time.perf_counter() - start
    single = [judge.judge([query])[0] for query in queries[:6]]
    apart = max(abs((a.p_yes or 0) - (b.p_yes or 0)) for a, b in zip(answers, single, strict=False))
    errors = {str(a.error) for a in answers if a.error}
    row(
        f"judging, {'500M-shaped' if big else 'tiny'} VLM: masks a second",
        round(count / seconds, 1),
        None,
        "masks/s",
        None,
        "none",
        not errors,
    )
    limit = 0.02 if big else 1e-4
    row(
        f"judging, {'500M-shaped' if big else 'tiny'} VLM: batched against single",
        apart,
        0.0,
        "p_yes",
        apart,
        f"<= {limit}",
        apart <= limit,
    )
    if errors:
        print(json.dumps({"abstained": len(errors), "for example": min(errors)}))


# --- all --------------------------------------------------------------------------------------------------------------


def parts(data: SegData, work: Path) -> Iterator[tuple[str, Callable[[], None]]]:
    "In the order of what one most wants to know."
    side, few, many = (512, 20, 80) if GPU else (64, 2, 6)
    yield "same seed", lambda: same_seed(data)
    yield "killed", lambda: killed(work)
    if GPU:
        yield "judging 500M", lambda: judging(data, work, True, 256)
    yield "judging tiny", lambda: judging(data, work, False, 128 if GPU else 8)
    yield "training b0", lambda: training(data, "b0", side, 16 if GPU else 2, (few, many), 2)
    yield "training b4", lambda: training(data, "b4", side, 8 if GPU else 2, (few // 2, many // 2), 2 if GPU else 1)
    yield "scoring", lambda: scoring(data, "b0", side, 2)
    yield "training mobilenet", lambda: training(data, "mobilenet", side // 2, 32 if GPU else 2, (few, many), 2)
    yield "probe", lambda: probe_round(data, work)
    for size, edge, batch in (("b0", side, 16), ("b4", side, 8), ("mobilenet", side // 2, 32)):
        yield f"busy {size}", lambda s=size, e=edge, b=batch: busy(data, s, e, b, 40)  # type: ignore[misc]


def main() -> None:
    "All parts that fit into the time."
    ask = argparse.ArgumentParser()
    ask.add_argument("--data", default="scenes")
    ask.add_argument("--minutes", type=float, default=7)
    ask.add_argument("--out", type=Path)
    ask.add_argument("--only", nargs="*", help="names of parts")
    ask.add_argument("--child")
    given = ask.parse_args()
    if given.child:
        return child(given.child)
    card = torch.cuda.get_device_name() if GPU else "no GPU: small form on the CPU"
    print(json.dumps({"card": card, "torch": torch.__version__, "workers": WORKERS}), flush=True)
    options = {} if given.data != "scenes" else {"n_train": 40, "n_test": 4}
    data = load_data(given.data, options=options, val_share=1, leaks="off")
    with tempfile.TemporaryDirectory() as work:
        for name, part in parts(data, Path(work)):
            if given.only and name not in given.only:
                continue
            left = 60 * given.minutes - (time.perf_counter() - STARTED)
            if left < 25:
                print(json.dumps({"left out": name}), flush=True)
                continue
            start = time.perf_counter()
            try:
                part()
            except Exception as error:
                print(json.dumps({"part": name, "failed": f"{type(error).__name__}: {error}"[:400]}), flush=True)
                traceback.print_exc(limit=-6)
            print(json.dumps({"part": name, "seconds": round(time.perf_counter() - start, 1)}), flush=True)
    if given.out:
        given.out.write_text(json.dumps({"card": card, "rows": ROWS}, indent=1) + "\n")


if __name__ == "__main__":
    main()
