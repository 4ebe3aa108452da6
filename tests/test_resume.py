"""Nothing is lost: a run killed at any point goes on, and ends as if nothing had happened."""

import copy
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from faults import at_file, at_forward, at_step, files, in_child, kill
from torch.optim.optimizer import register_optimizer_step_post_hook
from toyloop import settings as toy_settings
from toyloop import toy_loop

import vlm_itl.experiment.judge_turn
from vlm_itl.core.checks import RunError
from vlm_itl.core.files import project_root
from vlm_itl.core.runfolder import RunFolder, Stopped
from vlm_itl.data.scenes import make_scenes
from vlm_itl.experiment.config import make_config
from vlm_itl.experiment.judge_turn import Journal
from vlm_itl.experiment.loop import run_al, run_experiment
from vlm_itl.judging.trial import make_judge_config, try_judge
from vlm_itl.model.segmenter import Segmenter
from vlm_itl.vlm.handler import HANDLERS, Judgement, VLMHandler

SMALL: dict[str, Any] = {
    "model": "segformer-nano",
    "proposer": "own",
    "mode": "vlm",
    "judge": "confidence",
    "acceptance": "threshold",
    "judge_threshold": 0.3,
    "steps": 6,
    "batch_size": 4,
    "image_size": 32,
    "initial": 4,
    "increment": 4,
    "max_labelled": 8,
    "gallery": 1,
    "val_share": 4,
    "eval_every": 3,
    "save_every": 2,
    "keep_models": "all",
}
CLOCKS = {"seconds", "latency_s", "path", "output_dir", "name"}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small VOC folder."""
    return make_scenes(tmp_path_factory.mktemp("scenes") / "voc", n_train=20, n_test=3, seed=3)


@pytest.fixture(scope="module", autouse=True)
def small_chunks() -> Any:
    """Answers are kept after every chunk; with few images, a chunk must be small to be interrupted in the middle."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vlm_itl.experiment.judge_turn, "JUDGE_CHUNK", 5)
        yield


def settings(scenes: Path, out: Path, **more: Any) -> Any:
    return make_config({**SMALL, "dataset": str(scenes), "output_dir": str(out), **more})


def timeless(value: Any) -> Any:
    """A JSON value without clocks and places."""
    if isinstance(value, dict):
        return {k: timeless(v) for k, v in value.items() if k not in CLOCKS}
    return [timeless(v) for v in value] if isinstance(value, list) else value


def content(folder: Path) -> dict[str, Any]:
    """All that a run left, without clocks; of figures only that they are there."""
    found: dict[str, Any] = {}
    for name, data in files(folder).items():
        if name.startswith(".lock") or name.startswith(".owner"):
            continue
        if name.endswith(".json"):
            found[name] = timeless(json.loads(data))
        elif name.endswith(".jsonl"):
            found[name] = [timeless(json.loads(line)) for line in data.decode().splitlines()]
        else:
            named = name.startswith("figures") or name.endswith("README.md")  # a card names its run
            found[name] = True if named else data
    return found


@pytest.fixture(scope="module")
def undisturbed(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What an undisturbed run leaves."""
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    list(run_al(settings(scenes, out)))
    found = content(out)
    assert len(found["rounds.jsonl"]) == 2 and found["rounds.jsonl"][0]["judge"]["n"] == 12
    return found


def between_rounds(config: Any) -> None:
    """Run, and die when the first round has been handed over."""
    for _ in run_al(config):
        kill()


POINTS: dict[str, Any] = {
    "first file of the run": lambda: at_file("*config.json*", 1, kill),
    "data card": lambda: at_file("*data.json*", 1, kill),
    "training, before a checkpoint": lambda: at_step(1, kill),
    "training, after a checkpoint": lambda: at_step(3, kill),
    "training, last step of round 1": lambda: at_step(12, kill),
    "in a checkpoint": lambda: at_file("*checkpoint-4/trainer_state.json", 1, kill),
    "checkpoint not yet marked": lambda: at_file("*checkpoint-4/.whole.json*", 1, kill),
    "dropping an old checkpoint": lambda: at_file("*checkpoint-2", 1, kill, "shutil.rmtree"),
    "end of training not yet marked": lambda: at_file("*end/.whole.json*", 1, kill),
    "validating": lambda: at_forward(Segmenter, 3, kill),
    "scoring": lambda: at_forward(Segmenter, 5, kill),
    "writing masks": lambda: at_file("*masks/*.png", 7, kill),
    "judging": lambda: at_file("*pool.jsonl", 2, kill),
    "writing judgements": lambda: at_file("*judgements.jsonl*", 1, kill),
    "gallery": lambda: at_file("*gallery/*.png", 2, kill),
    "saving the model": lambda: at_file("*round_000.tmp/model/*", 1, kill),
    "writing the record": lambda: at_file("*round_001.tmp/.record.json*", 1, kill),
    "renaming the round": lambda: at_file("*round_001", 1, kill, "os.rename"),
    "dropping the work of a round": lambda: at_file("*.round_000.work", 1, kill, "shutil.rmtree"),
    "writing the index": lambda: at_file("*rounds.jsonl*", 2, kill),
    "between rounds": None,
    "final evaluation": lambda: at_file("*test_001.json*", 1, kill),
    "summary": lambda: at_file("*summary.json*", 1, kill),
    "figures": lambda: at_file("*figures/*", 1, kill),
}


OUTSIDE = (
    "first file of the run",
    "data card",
    "judging",
    "writing judgements",
    "gallery",
    "saving the model",
    "writing the record",
    "renaming the round",
    "dropping the work of a round",
    "writing the index",
    "between rounds",
    "final evaluation",
    "summary",
)
# no training is needed to be killed here: `test_the_toy_killed_at` is, in every run of the tests
ON_THE_TOY = {**{p: POINTS[p] for p in OUTSIDE}, "writing masks": lambda: at_file("*masks/*.png", 2, kill)}
SLOW = (*ON_THE_TOY, "training, last step of round 1", "end of training not yet marked", "validating")


def run_toy(folder: Path) -> None:
    """The whole loop on six images."""
    loop = toy_loop(toy_settings(folder, gallery=2))
    try:
        for _ in loop.run():
            pass
    finally:
        loop.folder.close()


@pytest.fixture(scope="module")
def undisturbed_toy(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What an undisturbed run of the toy leaves."""
    out = tmp_path_factory.mktemp("undisturbed_toy") / "run"
    run_toy(out)
    return content(out)


@pytest.mark.parametrize("point", ON_THE_TOY)
def test_the_toy_killed_at(point: str, tmp_path: Path, undisturbed_toy: dict[str, Any]) -> None:
    """SIGKILL at each point outside a training, then the same again: the same files, bit for bit."""
    plant = ON_THE_TOY[point]

    def work() -> None:
        if plant is None:
            for _ in toy_loop(toy_settings(tmp_path / "run", gallery=2)).run():
                kill()
        plant()
        run_toy(tmp_path / "run")

    assert in_child(work) == (-signal.SIGKILL, ""), "the point was not reached"
    run_toy(tmp_path / "run")
    assert content(tmp_path / "run") == undisturbed_toy


@pytest.mark.parametrize("point", [pytest.param(p, marks=[pytest.mark.slow] if p in SLOW else []) for p in POINTS])
def test_killed_at(point: str, scenes: Path, tmp_path: Path, undisturbed: dict[str, Any]) -> None:
    """SIGKILL at each of these points, then the same command again: the same files, bit for bit."""
    config = settings(scenes, tmp_path / "run")
    plant = POINTS[point]

    def work() -> None:
        if plant is None:
            between_rounds(config)
        plant()
        list(run_al(config))

    assert in_child(work) == (-signal.SIGKILL, ""), "the point was not reached"
    list(run_al(config))
    assert content(tmp_path / "run") == undisturbed


def test_killed_again_and_again(
    scenes: Path, tmp_path: Path, undisturbed: dict[str, Any], record_property: Any
) -> None:
    """A process that dies after every fourth step still gets there: it never falls behind its last checkpoint."""
    config = settings(scenes, tmp_path / "run")
    record_property("trust.kill_points", len(POINTS))

    def work() -> None:
        at_step(4, kill)
        list(run_al(config))

    deaths = 0
    while in_child(work)[0] == -signal.SIGKILL:
        deaths += 1
        assert deaths < 12
    assert deaths >= 3 and content(tmp_path / "run") == undisturbed


@pytest.mark.parametrize(
    "more",
    [
        {"early_stopping": 1, "early_stopping_threshold": 1.0, "steps": 12, "save_every": 0},
        {"warm_start": True, "strategy": "bald", "save_every": 3},
        {"judge": "mock", "policy": "triage", "acceptance": "certified", "alpha": 0.9, "delta": 0.5},
        pytest.param({"num_workers": 2, "scheduler": "cosine"}, marks=pytest.mark.slow),
    ],
    ids=["early stopping", "warm start and dropout", "mock and certified", "data workers"],
)
def test_other_settings_resume_alike(more: dict[str, Any], scenes: Path, tmp_path: Path) -> None:
    """Killed in round 1's training, and where it is ending."""
    list(run_al(settings(scenes, tmp_path / "a", **more)))
    config = settings(scenes, tmp_path / "b", **more)
    steps = [json.loads(line)["metrics"]["steps"] for line in open(tmp_path / "a" / "rounds.jsonl")]

    def dies_in_training() -> None:
        at_step(steps[0] + min(5, steps[1]), kill)
        list(run_al(config))

    def dies_at_its_end() -> None:
        at_file("*.round_001.work/training/end/model/*", 1, kill)
        list(run_al(config))

    for work in (dies_in_training, dies_at_its_end):
        assert in_child(work) == (-signal.SIGKILL, "")
    list(run_al(config))
    assert content(tmp_path / "a") == content(tmp_path / "b")


def test_baseline_resumes(scenes: Path, tmp_path: Path) -> None:
    """Full supervision, killed in the middle of its one training, in a moved folder."""
    more = {"mode": "baseline", "steps": 9}
    list(run_experiment(settings(scenes, tmp_path / "a", **more)))

    def work() -> None:
        at_step(8, kill)
        list(run_experiment(settings(scenes, tmp_path / "b", **more)))

    assert in_child(work) == (-signal.SIGKILL, "")
    shutil.move(tmp_path / "b", tmp_path / "c")
    resumed = settings(scenes, tmp_path / "c", **more)
    taken = 0

    def count() -> None:
        nonlocal taken
        taken += 1

    hook = register_optimizer_step_post_hook(lambda *_: count())
    list(run_experiment(resumed))
    hook.remove()
    assert taken == 3, "steps 1 to 6 were in the checkpoint"
    assert content(tmp_path / "a") == content(tmp_path / "c")


def test_checkpoint_of_another_training_is_not_used(scenes: Path, tmp_path: Path, undisturbed: dict[str, Any]) -> None:
    """A checkpoint that was put there from elsewhere, or was tampered with, does not count."""
    config = settings(scenes, tmp_path / "run")
    other = settings(scenes, tmp_path / "other", seed=7)

    def die(which: Any) -> Any:
        def work() -> None:
            at_step(5, kill)
            list(run_al(which))

        return work

    for which in (config, other):
        assert in_child(die(which))[0] == -signal.SIGKILL
    work = "run/.round_000.work/training"
    shutil.rmtree(tmp_path / work)
    shutil.copytree(tmp_path / "other/.round_000.work/training", tmp_path / work)
    list(run_al(config))
    assert content(tmp_path / "run") == undisturbed


@pytest.mark.parametrize("end", ["", '{"key": "ab', '{"key": 1}\n', '{"key": "cd", "verdict": "perhaps"}\n', "\x00\n"])
def test_journal_survives_its_own_death(end: str, tmp_path: Path) -> None:
    """Whatever the last line looks like, the answers before and after it count."""
    path = tmp_path / "pool.jsonl"
    answer = Judgement("yes", p_yes=0.1 + 0.2, raw="Yes ✓\n", tokens=3)
    Journal(path).add({"one": answer})
    with open(path, "a") as file:
        file.write(end)
    Journal(path).add({"two": answer})
    assert {k: v for k, v in Journal(path).known.items() if k in ("one", "two")} == {"one": answer, "two": answer}


def test_trial_resumes(scenes: Path, tmp_path: Path) -> None:
    """A judge's trial killed while it writes: the answers are not asked for again, the report is the same."""

    def config(name: str) -> Any:
        return make_judge_config(dataset=str(scenes), output_dir=str(tmp_path / name), limit=3, resamples=20)

    want = try_judge(config("a"))

    def work() -> None:
        at_file("*judgements.jsonl*", 1, kill)
        try_judge(config("b"))

    assert in_child(work) == (-signal.SIGKILL, "")
    found = try_judge(config("b"))
    for one, two in ((want, found), (want, try_judge(config("b")))):
        assert timeless(one.report["cards"]) == timeless(two.report["cards"])
        assert one.report["ranking"] == two.report["ranking"]
    paid = [one.report["cost"]["mock"] | {"seconds_per_call": 0} for one in (want, found, try_judge(config("b")))]
    assert paid[0] == paid[1] == paid[2], "what the killed process had asked is paid, once"


@pytest.mark.parametrize(
    ("where", "number"),
    [
        ("training", signal.SIGINT),
        ("training", signal.SIGTERM),
        ("scoring", signal.SIGINT),
        ("final evaluation", signal.SIGTERM),
    ],
)
def test_signals_end_in_good_order(
    where: str, number: int, scenes: Path, tmp_path: Path, undisturbed: dict[str, Any]
) -> None:
    """Ctrl-C and SIGTERM: one line that says how to go on; in training, the work so far is in a checkpoint."""
    config = settings(scenes, tmp_path / "run", save_every=100)

    def send() -> None:
        os.kill(os.getpid(), number)

    def work() -> None:
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        if where == "training":
            at_step(5, send)
        elif where == "scoring":
            at_file("*round_001.tmp/masks/*.png", 2, send)
        else:
            at_file("*test_000.json*", 1, send)
        list(run_al(config))

    code, said = in_child(work)
    assert code == 3 and said.startswith("Stopped: stopped during ")
    assert "run the same again to go on" in said and "\n" not in said
    if where == "training":
        assert (tmp_path / "run/.round_000.work/training/checkpoint-5/whole.json").is_file()
    list(run_al(config))
    found, want = content(tmp_path / "run"), copy.deepcopy(undisturbed)
    for left in (found, want):  # save_every was set otherwise
        del left["config.json"], left["summary.json"]["config"]
    assert found == want


HOLD = """
import sys, time
from vlm_itl.core.runfolder import RunFolder
run = RunFolder.open(sys.argv[1], {"seed": 0})
print("held", flush=True)
time.sleep(60)
"""


def test_two_processes(tmp_path: Path) -> None:
    """The second is refused by name; as soon as the first is killed, it gets in."""
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "run")], stdout=subprocess.PIPE)
    assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
    try:
        with pytest.raises(RunError, match=rf"is in use: process {holder.pid} on \S+ has it since .*; wait for it or"):
            RunFolder.open(tmp_path / "run", {"seed": 0})
        assert RunFolder(tmp_path / "run").rounds() == [], "reading is always allowed"
    finally:
        holder.kill()
        holder.wait()
    began = time.monotonic()
    RunFolder.open(tmp_path / "run", {"seed": 0}).close()
    assert time.monotonic() - began < 10


def test_stale_note_of_a_dead_process(tmp_path: Path) -> None:
    """A lock file and a note that a killed process left do not keep anybody out."""
    RunFolder.open(tmp_path / "run", {"seed": 0}).close()
    (tmp_path / "run/.lock").write_text("")
    (tmp_path / "run/.owner.json").write_text(json.dumps({"pid": 2**22 + 1, "host": "elsewhere", "since": "long ago"}))
    RunFolder.open(tmp_path / "run", {"seed": 0}).close()


def test_one_process_takes_over_from_itself(tmp_path: Path) -> None:
    """A cell that is run again works; the older object is refused from then on, and its end frees nothing."""
    old = RunFolder.open(tmp_path / "run", {"seed": 0})
    new = RunFolder.open(tmp_path / "run", {"seed": 0})
    with pytest.raises(RunError, match="opened again later"), old.write_round(0):
        pass
    old.close()
    del old
    new.check_held()
    assert in_child(lambda: RunFolder.open(tmp_path / "run", {"seed": 0}))[0] == 3
    new.close()
    assert in_child(lambda: RunFolder.open(tmp_path / "run", {"seed": 0}))[0] == 0
    with pytest.raises(RunError, match="closed"):
        new.check_held()


def test_a_fork_does_not_free_the_lock(tmp_path: Path) -> None:
    """Data workers are forks: their end must not open the folder to others."""
    run = RunFolder.open(tmp_path / "run", {"seed": 0})

    def worker() -> None:
        global run_in_worker
        run_in_worker = run
        run.close()
        del run_in_worker

    assert in_child(worker)[0] == 0
    assert in_child(lambda: subprocess.run([sys.executable, "-c", HOLD, str(run.path)], check=True, timeout=20))[0] == 3


def test_damaged_round_is_not_dropped(scenes: Path, tmp_path: Path) -> None:
    """A record that vanished is damage, not a leftover: nothing is removed, and the line says what to do."""
    config = settings(scenes, tmp_path / "run")
    list(run_al(config))
    (tmp_path / "run/round_000/record.json").unlink()
    before = files(tmp_path / "run")
    with pytest.raises(RunError, match=r"round_000 is damaged: record.json is missing. Put it back, or remove"):
        list(run_al(config))
    after = {k: v for k, v in files(tmp_path / "run").items() if not k.startswith(".owner")}
    assert after == {k: v for k, v in before.items() if not k.startswith(".owner")}


@pytest.mark.parametrize(
    "number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow), signal.SIGKILL]
)
def test_the_command_is_stopped_and_goes_on(
    number: int, scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`vlm_itl_run` under papermill: the kernel ends too, the text says how to go on, and the next run ends alike."""
    monkeypatch.setattr(vlm_itl.experiment.judge_turn, "JUDGE_CHUNK", 32)  # as in the kernel, which may get that far
    list(run_al(settings(scenes, tmp_path / "whole")))
    given = {**SMALL, "dataset": str(scenes), "output_dir": str(tmp_path / "run"), "steps": 6}
    command = [sys.executable, "-c", "import sys; from vlm_itl.cli.run import main; sys.exit(main())"]
    command += [str(project_root() / "nbs/run_al.ipynb"), str(tmp_path / "out.ipynb")]
    for name, value in given.items():
        command += ["-p", name, str(value)]
    environment = {k: v for k, v in os.environ.items() if k != "VLM_ITL_MAX_STEPS"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    give_up = time.monotonic() + 120
    while not (tmp_path / "run/.round_000.work").is_dir() and not (tmp_path / "run/round_000").is_dir():
        assert process.poll() is None and time.monotonic() < give_up, process.communicate()[0]
        time.sleep(0.02)
    process.send_signal(number)
    said = process.communicate(timeout=60)[0]
    if number != signal.SIGKILL:
        assert process.returncode == 130 and "run the same again to go on" in said and "Traceback" not in said
    else:
        assert process.returncode == -9
    config = settings(scenes, tmp_path / "run")
    list(run_al(config))
    assert content(tmp_path / "run") == content(tmp_path / "whole")


def test_stopped_is_an_interrupt() -> None:
    """Code that catches errors does not swallow it."""
    assert issubclass(Stopped, KeyboardInterrupt) and not issubclass(Stopped, Exception)


class Counting(VLMHandler):
    """Accepts every other image, and writes down whom it was asked about."""

    def __init__(self, *, log: str = "") -> None:
        self.log = log

    def _judge_one(self, query: Any) -> Judgement:
        with open(self.log, "a") as file:
            file.write(f"{query.id}\n")
        return Judgement("yes" if sum(map(ord, query.id)) % 2 else "no", p_yes=0.5)


def test_nobody_is_asked_twice(scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed in the middle of judging: answers that were kept are not asked for again."""
    monkeypatch.setitem(HANDLERS, "counting", Counting)
    log = tmp_path / "asked.txt"
    more = {"judge": "counting", "judge_options": {"log": str(log)}, "judge_threshold": 0.5, "preflight": 0}
    config = settings(scenes, tmp_path / "run", **more)

    def work() -> None:
        at_file("*judgements.jsonl*", 1, kill)
        list(run_al(config))

    assert in_child(work) == (-signal.SIGKILL, "") and len(log.read_text().split()) == 12
    records = list(run_al(config))
    asked = log.read_text().split()
    assert len(asked) == 12 + 8 and len(set(asked[:12])) == 12
    assert records[-1].budget["judge_calls"] == 20, "every answer is charged once"


def test_helpers_of_a_dead_process_are_waited_for(tmp_path: Path) -> None:
    """A data worker may outlive its parent by some seconds, with the lock open: that is no second process."""

    def work() -> None:
        RunFolder.open(tmp_path / "run", {"seed": 0})
        if os.fork() == 0:  # a helper, which has what its parent had open
            time.sleep(5)
            os._exit(0)
        kill()

    started = time.monotonic()
    assert in_child(work, with_helpers=False)[0] == -signal.SIGKILL
    assert time.monotonic() - started < 4.5, "the helper is alive"
    RunFolder.open(tmp_path / "run", {"seed": 0}).close()


def test_what_fails_keeps_nobody_out(scenes: Path, tmp_path: Path) -> None:
    """A notebook keeps a failed cell's objects alive; the folder must be free for others all the same."""
    config = settings(scenes, tmp_path / "run")
    list(run_al(config))
    record = tmp_path / "run/round_000/record.json"
    good = record.read_bytes()
    kept = []
    for bad in (None, good.replace(b'"train_', b'"nobody_')):
        record.unlink() if bad is None else record.write_bytes(bad)
        with pytest.raises(RunError) as caught:
            list(run_al(config))
        kept.append(caught)  # with its traceback, and all that lives in its frames
        record.write_bytes(good)
        assert in_child(lambda: list(run_al(config)), 60) == (0, "")


def test_the_slower_of_two_starts_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process made the folder, with other settings, while this one waited for the lock."""
    import vlm_itl.core.runfolder as module

    take = module._take_lock

    def late(path: Path) -> Any:
        monkeypatch.setattr(module, "_take_lock", take)
        assert in_child(lambda: RunFolder.open(path, {"seed": 1}).close())[0] == 0
        return take(path)

    monkeypatch.setattr(module, "_take_lock", late)
    with pytest.raises(RunError, match="belongs to another configuration"):
        RunFolder.open(tmp_path / "run", {"seed": 0})
    RunFolder.open(tmp_path / "run", {"seed": 1}).close()
