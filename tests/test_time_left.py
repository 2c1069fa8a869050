"""The time that is left: against runs on a made-up clock, in words, and as the scripts show it."""

import itertools
from datetime import datetime, timedelta
from types import SimpleNamespace

import pytest
from conftest import FIT, SMALL

from dcase.data.labels import TAU22_LABELS
from dcase.data.tau22 import load_splits, split_by_location
from dcase.runs.config import DeviceConfig, MachineConfig
from dcase.training import pace, seeds
from dcase.training.fine_tuning import FineTuning
from dcase.training.pace import FURTHER_RUNS, Plan, TimeLeft, clock, spoken

FIRST, STEP, VALIDATION = 5.0, 2.0, 0.75  # seconds of an epoch's first batch, of another, of one in validation


class Clock:
    def __init__(self, monkeypatch):
        self.now = 1000.0
        monkeypatch.setattr(pace.time, "monotonic", lambda: self.now)


def run(plan: Plan, clock: Clock, time_left: TimeLeft, epoch: int = 1, done: int = 0, slow: float = 60.0):
    """Train from after ``done`` batches of an epoch; yield (epoch, batches done) at each batch's end.

    The first batches are ``slow``.
    """
    slow_ones = itertools.chain([slow] * 3, itertools.repeat(0.0))
    for e in range(epoch, plan.epochs + 1):
        for i in range(done if e == epoch else 0, plan.batches):
            clock.now += (FIRST if i == 0 else STEP) + next(slow_ones)
            time_left.batch_ends(is_first=i == 0)
            yield e, i + 1
        if plan.validates(e):
            clock.now += VALIDATION * plan.val_batches
            time_left.validation_ends(VALIDATION * plan.val_batches)


@pytest.mark.parametrize("begin", [(1, 0), (3, 4)], ids=["whole", "resumed within an epoch"])
@pytest.mark.parametrize("plan", [Plan(10, 8, 4, 3), Plan(5, 8), Plan(40, 1, 1, 2)])
def test_what_is_left_is_what_the_run_then_takes(plan, begin, monkeypatch):
    begin = (begin[0], min(begin[1], plan.batches - 1))
    clock, time_left = Clock(monkeypatch), TimeLeft(plan)
    said = []
    for place in run(plan, clock, time_left, *begin):
        has_seen_all = place[0] > begin[0] + (plan.every_n_epochs or 1) and place[0] > 4
        if time_left.is_known() and has_seen_all:
            said.append((clock.now, time_left.of_run(*place)))
    assert said
    for now, left in said:
        assert now + left == pytest.approx(clock.now)


def test_the_first_steps_do_not_count_and_little_is_not_enough(monkeypatch):
    plan = Plan(2, 100)
    clock, time_left = Clock(monkeypatch), TimeLeft(plan)
    for _, done in run(plan, clock, time_left, slow=500.0):
        if time_left.is_known():
            break
        assert time_left.in_words(1, done) == ""
    assert done == 3 + 10  # 20 s of steps
    assert time_left.of_epoch() == 100 * STEP  # no epoch's beginning is known yet
    assert time_left.of_run(1, done) == (200 - done) * STEP


def test_a_validation_counts_before_it_is_measured(monkeypatch):
    plan = Plan(10, 100, 10, 30)
    time_left = TimeLeft(plan)
    place = next(p for p in run(plan, Clock(monkeypatch), time_left) if time_left.is_known())
    assert time_left.of_run(*place) == pytest.approx((1000 - place[1]) * STEP + 30 * STEP / 3)


def test_a_median_follows_a_machine_that_becomes_slower_and_ignores_a_pause(monkeypatch):
    clock, time_left = Clock(monkeypatch), TimeLeft(Plan(1, 2000))
    for seconds in [1.0] * 300 + [900.0] + [1.0] * 50:
        clock.now += seconds
        time_left.batch_ends(is_first=False)
    assert time_left.of_run(1, 1000) == 1000
    for _ in range(200):
        clock.now += 3
        time_left.batch_ends(is_first=False)
    assert time_left.of_run(1, 1000) == 3000


def test_later_plans_and_further_seeds_count(monkeypatch):
    monkeypatch.setenv(FURTHER_RUNS, "2")
    plan, later = Plan(10, 60), Plan(5, 60)
    time_left = TimeLeft(plan, [later, later])
    place = next(p for p in run(plan, Clock(monkeypatch), time_left) if time_left.is_known())
    rest = STEP * (600 - place[1] + 2 * 300)
    assert time_left.of_run(*place) == rest
    assert time_left.in_words(*place).startswith(
        f"about {spoken(rest)} left, {spoken(rest + 2 * STEP * 1200)} with the seeds after it (until "
    )
    monkeypatch.delenv(FURTHER_RUNS)
    time_left = TimeLeft(plan)
    list(run(plan, Clock(monkeypatch), time_left))
    assert time_left.in_words(10, 60) == ""  # nothing is left


@pytest.mark.parametrize(
    "seconds, said",
    [(4.4, "4.4 s"), (45, "45 s"), (90, "1.5 min"), (252, "4.2 min"), (240, "4 min"), (5399, "90 min"), (36000, "10 h"),
     (47 * 3600, "47 h"), (84 * 3600, "3.5 days"), (120 * 86400, "120 days")],
)  # fmt: skip
def test_a_time_in_words(seconds, said):
    assert spoken(seconds) == said


@pytest.mark.parametrize(
    "hours, said", [(1, "16:20"), (9, "Tue 00:20"), (12.5, "Tue 03:50"), (143, "Sun 14:20"), (150, "Sun 8 Nov 21:20")]
)
def test_a_time_of_day(hours, said, monkeypatch):
    class Monday(datetime):
        @classmethod
        def now(cls):
            return cls(2026, 11, 2, 15, 20)

    monkeypatch.setattr(pace, "datetime", Monday)
    assert clock(timedelta(hours=hours).total_seconds()) == said


def test_stage_2_counts_the_devices_that_follow(learnable):
    clips = split_by_location(load_splits(learnable, "split25")[0], 0.34)
    config = DeviceConfig(machine=MachineConfig(batch_size=5), lr_choices="0.1,0.2")
    tuning = FineTuning(SimpleNamespace(labels=TAU22_LABELS), clips, None, config, None, ())
    n_train, n_val = (len(part.of_device("b")) for part in clips)
    per_device = [Plan(50, -(-n_train // 5), 10, -(-n_val // 5))] * 2
    assert tuning._after("a") == 2 * per_device  # b and s1: c, s2 and s3 have no clips
    assert tuning._after("s1") == [] and tuning._plans("c") == []


def test_every_seed_knows_how_many_follow(learnable, call_main, monkeypatch):
    import train_base

    told = []

    def finish(args, environment):
        told.append(int(environment[FURTHER_RUNS]))
        run_id = args[args.index("--run_id") + 1]
        (folder := seeds.Path("P") / run_id).mkdir(parents=True)
        (folder / "results.json").write_text("{}")
        return 0

    monkeypatch.setattr(seeds, "_run", finish)
    monkeypatch.setattr(seeds, "_finish", lambda *args: None)
    args = ["--dataset_dir", learnable, *SMALL, *FIT, "--project_name", "P", "--seeds", "3"]
    call_main(train_base.main, *args).succeeded()
    assert told == [2, 1, 0]
