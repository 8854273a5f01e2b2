"""`cbnb report` and its verdicts: they keep to their figures, a failure never helps, nothing of a stranger's
runs, and the page opens anywhere."""

import json
import math
import random
import re
import shutil
import struct
import sys
import time
import xml.etree.ElementTree as ET
import zlib
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from cbnb.basics.files import quoted_cell
from cbnb.basics.jsonfiles import write_json
from cbnb.basics.lease import identity
from cbnb.report.sweep import DOSE, dose_response, groups, sweep_figures, write_report_files
from cbnb.report.verdicts import (
    CHECKS,
    CONTROL_ATTACK,
    CONTROL_COSINE,
    COSINE_MARGIN,
    DOSE_MARGIN,
    GRADIENT_MARGIN,
    LIVE_CHECKS,
    ONSET_MARGIN,
    REROUTED,
    SEEDS,
    Sweep,
    all_verdicts,
    attack_verdicts,
    live_verdicts,
    read_sweep,
    specimen_run,
    sweep_advice,
    verdicts,
    write_specimen,
)
from helpers import BIN, NBS, ROOT, read, run

HOSTILE = '"><img src=x onerror=alert(1)><script>alert(2)</script>{{ 7*7 }}\u202e\x1b[31m'


def report(*arguments):
    return run(sys.executable, "-m", "cbnb.cli", "report", *arguments, cwd=ROOT)


# --- verdicts on made-up frames ---


def sweep_of(rows, *more):
    """A `Sweep` of made-up `rows`: of a breaker that works and is not changed by KL, where they do not say
    otherwise."""
    full = []
    for i, row in enumerate(rows):
        beta = row["beta_kl"]
        kl = row.get(
            "loss_kl",
            {0: 2.0, 0.1: 0.05, 0.3: 0.01}.get(beta, 0.004 / max(beta, 0.5)) * (1 + 0.01 * row["seed"]),
        )
        base = {
            "run": f"run{i}",
            "state": "done",
            "error": None,
            "code": "c",
            "data": "d",
            "harmful_cosine": 0.02 + 0.001 * row["seed"],
            "attack_success": 0.0,
            "attack_success_lax": 0.1,
            "before_attack_success": 1.0,
            "onset_step": 30.0 + row["seed"],
            "loss_reroute": 0.01,
            "loss_kl": kl,
            "beta_times_kl": beta * kl,
            "heldout_kl_in_domain": kl,
            "heldout_kl_off_domain": kl,
            "grad_norm_total": 0.5,
            "grad_norm_reroute": 0.4,
            "grad_cos_reroute_kl": -0.3,
            "kl_gradient_share": 0.1,
            "exact_match_plain": 1.0,
            "before_exact_match_plain": 1.0,
            "last_step": 60.0,
        }
        full.append(base | row)
    return Sweep("made up", pd.DataFrame(full), ["beta_kl", "seed", *more], {}, {}, [])


def cells(betas=(0.0, 0.1, 0.3, 3.0), seeds=(0, 1, 2), change=lambda row: {}):
    rows = [{"beta_kl": b, "seed": float(s)} for b in betas for s in seeds]
    return [row | change(row) for row in rows]


def said(sweep):
    return [v.verdict for v in verdicts(sweep)]


def test_supported():
    assert said(sweep_of(cells())) == ["supported"] * 3


def test_two_seeds_that_agree_are_not_enough():
    two = sweep_of(cells(seeds=(0, 1)))
    assert said(two) == ["inconclusive"] * 3 and all(
        "Support wants 3 paired seeds" in v.why for v in verdicts(two)
    )


def test_turning_the_harmful_states_around_is_no_better_than_to_right_angles():
    assert (
        said(sweep_of(cells(change=lambda r: {"harmful_cosine": -0.4 if r["beta_kl"] == 0 else 0.0})))
        == ["supported"] * 3
    )


def test_refuted_by_each_check():
    assert (
        said(
            sweep_of(
                cells(
                    change=lambda r: {"harmful_cosine": 0.8 + 0.01 * r["seed"]} if r["beta_kl"] == 3 else {}
                )
            )
        )[0]
        == "refuted"
    )
    assert (
        said(sweep_of(cells(change=lambda r: {"onset_step": 60 + r["seed"]} if r["beta_kl"] == 3 else {})))[0]
        == "refuted"
    )
    rising = {0: 0.01, 0.1: 0.02, 0.3: 0.05, 3: 0.2}
    assert (
        said(sweep_of(cells(change=lambda r: {"loss_kl": rising[r["beta_kl"]] * (1 + 0.01 * r["seed"])})))[1]
        == "refuted"
    )
    slow = sweep_of(
        cells(
            change=lambda r: {
                "loss_kl": {0: 2.0, 0.1: 1.0, 0.3: 0.6, 3: 0.2}[r["beta_kl"]] * (1 + 0.01 * r["seed"])
            }
        )
    )
    assert (
        said(slow)[1] == "refuted"
        and ": supported. " in verdicts(slow)[1].why
        and "hump refuted" in verdicts(slow)[1].why
    ), "KL falls, but its product rises all the way"
    flat = {"loss_kl": 1.0}
    assert said(sweep_of(cells(change=lambda r: flat | {"beta_times_kl": r["beta_kl"]})))[1] == "refuted", (
        "no fall and no hump: the published sign"
    )
    assert (
        said(sweep_of(cells(change=lambda r: {"grad_norm_total": 6.5} if r["beta_kl"] == 3 else {})))[2]
        == "refuted"
    )


def test_an_onset_that_never_comes_is_no_missing_figure():
    never = sweep_of(cells(change=lambda r: {"onset_step": math.nan} if r["beta_kl"] == 3 else {}))
    assert said(never)[0] == "refuted" and verdicts(never)[0].comparisons[5].mean == math.inf
    once = sweep_of(
        cells(change=lambda r: {"onset_step": math.nan} if r["beta_kl"] == 3 and r["seed"] == 1 else {})
    )
    assert said(once)[0] == "inconclusive"


@pytest.mark.parametrize("runs_without", ["all", "one"])
def test_an_objective_without_a_range_has_no_onset_and_the_verdict_says_so(tmp_path, runs_without):
    """An objective of one's own may declare neither start nor low of its reroute term. Then no step is an
    onset: that is not a pair of seeds that lacks a figure, and not an onset that never came."""
    folder = write_specimen(tmp_path / "own", betas=(0.0, 0.1, 0.3))
    configs = sorted(folder.glob("*/config.json"))
    for path in configs if runs_without == "all" else configs[-1:]:
        write_json(path, json.loads(path.read_text()) | {"objective": "mine:own"})
    sweep = read_sweep([folder])
    reroute, dose, gradients = verdicts(sweep)
    assert reroute.verdict == "inconclusive" and dose.verdict == gradients.verdict == "supported"
    assert "the onset, which support wants too, cannot be judged" in reroute.why
    assert not re.search("no pair of seeds|lacks? a figure|from step|nan|inf", reroute.why)
    assert all(c.measure != "onset_step" for c in reroute.comparisons)
    turned = sweep.frame.assign(harmful_cosine=[0.02] * 6 + [0.9, 0.91, 0.92])
    assert said(replace(sweep, frame=turned))[0] == "refuted", "its cosine can still refute it"
    if runs_without == "all":
        done = report(folder)
        assert done.returncode == 0 and "cannot be judged: give the reroute term" in done.stdout


def test_an_objective_of_ones_own_that_declares_its_range_has_an_onset(tmp_path):
    folder = write_specimen(tmp_path / "own", betas=(0.0, 0.1, 0.3))
    words = [
        {"name": name, "title": name, "unit": "", "low": 0.0, "start": start, "factors": []}
        for name, start in {"reroute": 1.0, "retain": 0.0, "kl": 0.0}.items()
    ]
    for run_folder in folder.glob("specimen-*"):
        for name, more in {"config": {"objective": "mine:own"}, "status": {"terms": words}}.items():
            path = run_folder / f"{name}.json"
            write_json(path, json.loads(path.read_text()) | more)
    sweep = read_sweep([folder])
    assert sweep.notes == [] and sweep.frame["onset_step"].notna().all() and said(sweep) == ["supported"] * 3


def test_inconclusive_by_spread_one_seed_and_unpaired_seeds():
    wide = sweep_of(
        cells(
            change=lambda r: {
                "harmful_cosine": 0.2 * r["seed"] * (r["beta_kl"] == 3),
                "grad_norm_total": 0.5 * 2 ** (r["seed"] * (r["beta_kl"] == 3)),
                "loss_kl": 2.0 * 10 ** (random.Random(str(r)).uniform(-3, 0)),
            }
        )
    )
    assert said(wide) == ["inconclusive"] * 3
    unclear = sweep_of(
        cells(
            change=lambda r: (
                {"loss_kl": {0: 2.0, 0.1: 0.06, 0.3: 0.02 * 1.3 ** (r["seed"] - 1), 3: 0.002}[r["beta_kl"]]}
                | ({"loss_kl": 0.002 * 1.5 ** r["seed"]} if r["beta_kl"] == 3 else {})
            )
        )
    )
    assert (
        said(unclear)[1] == "inconclusive"
        and ": supported. " in verdicts(unclear)[1].why
        and "hump inconclusive" in verdicts(unclear)[1].why
    )
    one = sweep_of(cells(seeds=(0,)))
    assert said(one) == ["inconclusive"] * 3 and all("n = 1, so no interval" in v.why for v in verdicts(one))
    unpaired = sweep_of([r for r in cells(seeds=(0, 1, 2, 3)) if (r["beta_kl"] == 0) == (r["seed"] < 2)])
    assert said(unpaired) == ["inconclusive"] * 3 and "no pair of seeds" in verdicts(unpaired)[0].why
    partly = verdicts(sweep_of([r for r in cells(seeds=(0, 1, 2, 3)) if r["beta_kl"] != 0 or r["seed"] < 2]))
    assert all(c.n == 2 for v in (partly[0], partly[2]) for c in v.comparisons)


@pytest.mark.parametrize(
    "change",
    [
        {"harmful_cosine": 1.0},
        {"harmful_cosine": math.nan},
        {"attack_success": 0.3},
        {"attack_success": math.nan},
        {"before_attack_success": 0.0},
        {"attack_success": 0.15, "before_attack_success": 0.2},
    ],
)
def test_a_control_that_does_not_work_makes_all_void(change):
    assert (
        said(sweep_of(cells(change=lambda r: change if r["beta_kl"] == 0 and r["seed"] == 1 else {})))
        == ["void"] * 3
    )
    everywhere = sweep_of(cells(change=lambda r: change))
    assert said(everywhere) == ["void"] * 3 and sweep_advice(everywhere) == []


def test_no_control_is_void_and_a_dead_run_elsewhere_is_not():
    assert said(sweep_of(cells(betas=(0.1, 0.3)))) == ["void"] * 3
    assert (
        said(sweep_of(cells(change=lambda r: {"state": "failed"} if r["beta_kl"] == 0 else {})))
        == ["void"] * 3
    )
    assert said(sweep_of(cells(change=lambda r: {"state": "failed"}))) == ["void"] * 3
    assert (
        said(
            sweep_of(
                cells(
                    change=lambda r: (
                        {
                            "harmful_cosine": 1.0,
                            "attack_success": 1.0,
                            "onset_step": math.nan,
                            "loss_reroute": 1.0,
                        }
                        if r["beta_kl"] == 3
                        else {}
                    )
                )
            )
        )[0]
        == "refuted"
    )


def test_a_temperature_is_a_group_of_its_own():
    rows = [r | {"kl_temperature": 1.0} for r in cells(betas=(0.0, 0.1, 0.3, 0.5))]
    hot = [
        {"beta_kl": 0.3, "seed": float(s), "kl_temperature": 2.0, "loss_kl": 40.0, "harmful_cosine": 0.9}
        for s in range(3)
    ]
    mixed, plain = sweep_of(rows + hot, "kl_temperature"), sweep_of(cells(betas=(0.0, 0.1, 0.3, 0.5)))
    found = verdicts(mixed)
    assert [replace(v, label="") for v in found[:3]] == verdicts(plain), (
        "T = 2 must not change what is said of T = 1"
    )
    assert [v.verdict for v in found[3:]] == ["refuted", "inconclusive", "supported"] and {
        v.label for v in found[3:]
    } == {"kl_temperature 2"}
    assert [(a.action, a.beta, a.label) for a in sweep_advice(mixed)] == [("lower", 0.3, "kl_temperature 2")]
    failed = sweep_of(
        [r | {"state": "failed"} if r["beta_kl"] == 0 and r["seed"] == 0 else r for r in rows + hot],
        "kl_temperature",
    )
    assert "supported" not in said(failed), "a control that failed counts for those who borrow it"


def test_other_code_or_data_is_never_compared():
    rows = cells(change=lambda r: {"code": "new"} if r["beta_kl"] == 0 else {})
    found = verdicts(sweep_of(rows))
    assert "supported" not in [v.verdict for v in found] and {
        v.verdict for v in found if "code c" in v.label
    } == {"void"}


def test_advice():
    loses = sweep_of(
        cells(change=lambda r: {"exact_match_plain": 0.3 + 0.01 * r["seed"] if r["beta_kl"] < 0.3 else 1.0})
    )
    assert (
        [(a.action, a.beta) for a in sweep_advice(loses)] == [("raise", 0.0), ("raise", 0.1)]
        and "at 0.3 it is kept" in sweep_advice(loses)[1].text
        and "0.31" in sweep_advice(loses)[1].text
    )
    suppressed = sweep_of(
        cells(change=lambda r: {"attack_success": 0.9 + 0.01 * r["seed"]} if r["beta_kl"] == 3 else {})
    )
    assert [(a.action, a.beta) for a in sweep_advice(suppressed)] == [
        ("lower", 3.0)
    ] and "0.91" in sweep_advice(suppressed)[0].text
    both = sweep_of(
        cells(change=lambda r: {"attack_success": 0.9, "exact_match_plain": 0.1} if r["beta_kl"] == 3 else {})
    )
    assert [a.action for a in sweep_advice(both)] == ["conflict"]
    assert (
        sweep_advice(sweep_of(cells())) == []
        and sweep_advice(sweep_of(cells(seeds=(0,), change=lambda r: {"exact_match_plain": 0.1}))) == []
    )


KL = st.floats(-3, 1).map(lambda e: 10.0**e)
ROW = st.fixed_dictionaries(
    {
        "state": st.sampled_from(["done"] * 12 + ["failed", "lost", "running", "missing"]),
        "harmful_cosine": st.sampled_from([-0.4, 0.0, 0.02, 0.05, 0.3, 0.9]),
        "onset_step": st.sampled_from([30.0, 31.0, 35.0, 60.0, math.nan]),
        "loss_kl": KL,
        "grad_norm_total": st.floats(0.1, 8),
        "attack_success": st.sampled_from([0.0, 0.0, 0.0, 0.1, 0.9]),
    }
)


@st.composite
def made_up(draw):
    "A sweep of any shape: runs that differ much or little, some of them not done, some figures missing."
    rows, calm, works = [], draw(st.integers(0, 3)), draw(st.integers(0, 4)) > 0
    betas = draw(
        st.sampled_from(
            [
                (0.0, 0.1, 0.3),
                (0.0, 0.3),
                (0.0, 0.1, 0.3, 3.0),
                (0.0, 0.1, 0.3),
                (0.0, 0.1, 0.3, 0.5),
                (0.1, 0.3),
                (0.0,),
            ]
        )
    )
    seeds = draw(st.integers(1, 4))
    for beta in betas:
        for seed in range(max(1, seeds - (draw(st.integers(0, 9)) == 0))):
            row = {"beta_kl": beta, "seed": float(seed)}
            if calm == 0 or calm == 1 and draw(st.integers(0, 9)) == 0:
                row |= draw(ROW)
            if beta == 0 and works:
                row |= {
                    "harmful_cosine": draw(st.sampled_from([-0.3, 0.0, 0.02])),
                    "attack_success": 0.0,
                    "onset_step": 30.0,
                }
            if beta == betas[-1] and calm == 2:
                row |= draw(
                    st.fixed_dictionaries(
                        {
                            "harmful_cosine": st.floats(0.6, 0.8),
                            "loss_kl": st.floats(2, 3),
                            "grad_norm_total": st.floats(6, 8),
                        }
                    )
                )
            if calm == 3 and (beta, seed) == (betas[-1], 0):
                row["harmful_cosine"] = 0.9
            if "loss_kl" in row:
                row["beta_times_kl"] = beta * row["loss_kl"]
            if draw(st.integers(0, 60)) == 0:
                row["harmful_cosine"] = math.nan
            rows.append(row)
    return sweep_of(rows)


def keyed(sweep):
    return {(v.check, v.label): v.verdict for v in verdicts(sweep)}


@pytest.mark.slow
@settings(max_examples=30)
@given(made_up(), st.randoms(use_true_random=False))
def test_order_does_not_matter_and_a_failure_never_helps(sweep, rng):
    order = list(range(len(sweep.frame)))
    rng.shuffle(order)
    shuffled = replace(sweep, frame=sweep.frame.iloc[order].reset_index(drop=True))
    assert repr(verdicts(shuffled)) == repr(verdicts(sweep)) and repr(sweep_advice(shuffled)) == repr(
        sweep_advice(sweep)
    )
    before = keyed(sweep)
    outliers = sweep.frame.index[(sweep.frame["harmful_cosine"] > 0.5) & (sweep.frame["beta_kl"] > 0)][:2]
    for victim in {rng.randrange(len(sweep.frame)), *outliers}:
        worse = sweep.frame.copy()
        worse.loc[victim, "state"] = rng.choice(["failed", "lost", "missing"])
        for key, verdict in keyed(replace(sweep, frame=worse)).items():
            assert verdict != "supported" or before.get(key) == "supported"


@settings(max_examples=40)
@given(made_up())
def test_verdicts_agree_with_figures_worked_out_another_way(sweep):
    done = sweep.frame[sweep.frame["state"] == "done"]
    control = done[done["beta_kl"] == 0].set_index("seed")
    works = len(control) > 0 and all(
        (control["harmful_cosine"] < CONTROL_COSINE) & (control["attack_success"] <= CONTROL_ATTACK)
    )
    found = {v.check: v for v in verdicts(sweep)}
    assert all((v.verdict == "void") == (not works) for v in found.values())
    if not works:
        return
    highs = []
    for beta, runs in done[done["beta_kl"] > 0].groupby("beta_kl"):
        d = (
            runs.set_index("seed")["harmful_cosine"].clip(lower=0) - control["harmful_cosine"].clip(lower=0)
        ).dropna()
        low, high = (
            (stats.t.interval(0.95, len(d) - 1, d.mean(), stats.sem(d)) if d.std() > 0 else (d.mean(),) * 2)
            if len(d) > 1
            else (math.nan,) * 2
        )
        highs.append(high)
        if len(d) > 1:
            shown = next(c for c in found["reroute"].comparisons if c.measure == REROUTED and c.beta == beta)
            assert (
                math.isclose(shown.low, low, abs_tol=1e-9)
                and math.isclose(shown.high, high, abs_tol=1e-9)
                and shown.n == len(d)
            )
    for v in found.values():
        if v.verdict == "supported":
            assert (
                (sweep.frame["state"] == "done").all()
                and all(c.n >= SEEDS for c in v.comparisons)
                and done["seed"].nunique() >= 3
            )
    if found["reroute"].verdict == "supported":
        assert all(high < COSINE_MARGIN for high in highs)
    if found["reroute"].verdict == "refuted":
        assert any(
            c.low_any > (COSINE_MARGIN if c.measure == REROUTED else ONSET_MARGIN)
            for c in found["reroute"].comparisons
            if c.measure in (REROUTED, "onset_step")
        )
    if found["dose"].verdict == "supported":
        means = np.log(done.groupby("beta_kl")["loss_kl"].apply(lambda v: np.exp(np.log(v).mean())))
        if (done.groupby("beta_kl")["seed"].count() == control.index.size).all():
            assert means.iloc[-1] < means.iloc[0] - math.log(DOSE_MARGIN)
    for c in found["gradients"].comparisons:
        if found["gradients"].verdict == "supported":
            assert abs(c.mean) < math.log(GRADIENT_MARGIN)


# --- folders ---


@pytest.fixture(scope="module")
def messy(tmp_path_factory):
    """A sweep in which much went wrong, with a stranger's texts wherever there can be any; and what `cbnb
    report` said of it."""
    folder = write_specimen(tmp_path_factory.mktemp("runs") / "messy")
    for seed in range(3):
        specimen_run(folder / f"t2-seed{seed}", 0.3, seed, kl_temperature=2.0)

    def at(beta, seed):
        return folder / f"specimen-beta_kl{beta}-seed{seed}"

    write_json(
        at(0.1, 0) / "status.json", {"state": "failed", "error": f"OutOfMemoryError: {HOSTILE}", "attempt": 3}
    )
    write_json(at(0.1, 1) / "status.json", {"state": "running", "node": None, "pid": 2**22 + 1, "attempt": 1})
    write_json(
        at(0.1, 2) / "status.json",
        {"state": "running", **identity() | {"pid": 2**22 + 1, "pid_started": "1"}, "attempt": 1},
    )
    (at(0.5, 0) / "metrics.jsonl").write_text((at(0.5, 0) / "metrics.jsonl").read_text()[:5000] + "\n{torn\n")
    (at(0.5, 1) / "result.json").write_text('{"after": {"attack_success"')
    (at(0.5, 2) / "status.json").write_text("")
    shutil.rmtree(at(3, 1))
    (at(3, 2) / "metrics.jsonl").unlink()
    (at(3, 2) / "report.html").write_text("<p>the report of a run</p>")
    specimen_run(
        folder / HOSTILE.replace("/", "_"), 0.3, 7, **{HOSTILE: HOSTILE, "state": HOSTILE, "note": "=1+1"}
    )
    plan = json.loads((folder / "sweep.json").read_text())
    plan["runs"] += [{"dir": "../../outside"}, {"dir": HOSTILE}, "no entry"]
    write_json(folder / "sweep.json", plan)
    done = report(folder)
    assert done.returncode == 0, done.stdout
    return folder, done.stdout


@pytest.mark.slow
def test_the_files_are_whole(messy):
    folder, text = messy
    out = folder / "report"
    assert f"report: {out / 'report.html'}" in text
    figures = sweep_figures(read_sweep([folder]))
    assert {p.name for p in out.iterdir()} == {
        "report.html",
        "report.json",
        "runs.csv",
        "runs.parquet",
        *(f"{name}.png" for name in figures),
    } and len(figures) >= 4
    for name, (figure, _) in figures.items():
        data = (out / f"{name}.png").read_bytes()
        assert data[:8] == b"\x89PNG\r\n\x1a\n"
        at, pixels = 8, b""
        while at < len(data):
            size, kind = struct.unpack(">I4s", data[at : at + 8])
            assert (
                zlib.crc32(data[at + 4 : at + 8 + size])
                == struct.unpack(">I", data[at + 8 + size : at + 12 + size])[0]
            )
            if kind == b"IHDR":
                width, height, depth, colour = struct.unpack(">IIBB", data[at + 8 : at + 18])
            if kind == b"IDAT":
                pixels += data[at + 8 : at + 8 + size]
            at += 12 + size
        assert (width, height) == (1800, 2 * figure.layout.height)
        raw = np.frombuffer(zlib.decompress(pixels), np.uint8).reshape(height, -1)
        assert raw[:, 1:].std() > 5, "an empty picture"
        left = raw[:, 1:].reshape(height, width, -1)[:, :120]
        assert (left < 200).any(), "no text along the left edge: the renderer found no font"


def test_parquet_is_csv(messy):
    folder, _ = messy
    parquet = pd.read_parquet(folder / "report" / "runs.parquet")
    csv = pd.read_csv(
        folder / "report" / "runs.csv", dtype={c: str for c in parquet if parquet[c].dtype.kind != "f"}
    )
    assert list(csv) == list(parquet) and len(csv) == 19
    for column in parquet:
        if parquet[column].dtype.kind == "f":
            assert np.array_equal(parquet[column], csv[column].astype(float), equal_nan=True), column
        else:
            assert [quoted_cell(v) if isinstance(v, str) else None for v in parquet[column]] == [
                v if isinstance(v, str) else None for v in csv[column]
            ], column
    assert not any(
        v != quoted_cell(v) for column in csv for v in [column, *csv[column]] if isinstance(v, str)
    ), "no cell is a formula"


def test_every_run_is_listed_and_every_defect_told(messy):
    folder, text = messy
    frame = pd.read_parquet(folder / "report" / "runs.parquet").set_index("run")
    states = {
        name: frame.state[f"specimen-beta_kl{name}"]
        for name in ("0.1-seed0", "0.1-seed1", "0.1-seed2", "0.5-seed2", "3-seed1", "3-seed2")
    }
    assert states == {
        "0.1-seed0": "failed",
        "0.1-seed1": "running",
        "0.1-seed2": "lost",
        "0.5-seed2": "unreadable",
        "3-seed1": "missing",
        "3-seed2": "done",
    }
    assert (
        frame.attempt["specimen-beta_kl0.1-seed0"] == 3
        and "OutOfMemoryError" in frame.error["specimen-beta_kl0.1-seed0"]
    )
    assert (
        math.isnan(frame.loss_kl["specimen-beta_kl0.5-seed0"])
        and math.isnan(frame.harmful_cosine["specimen-beta_kl0.5-seed1"])
        and math.isnan(frame.loss_kl["specimen-beta_kl3-seed2"])
    )
    page = (folder / "report" / "report.html").read_text()
    for told in (
        "2 lines of metrics.jsonl cannot be read",
        "its log ends at step",
        "result.json is not readable",
        "status.json is not readable",
        "names no run folder",
    ):
        assert told in page and told in text, told
    for name in frame.index[frame.state != "done"]:
        assert f"Not done: {name}" in text
    assert ": supported" not in text and "planned runs are not finished" in text


def test_a_strangers_text_stays_text(messy):
    folder, text = messy
    assert "\x1b" not in text and "\u202e" not in text
    page = (folder / "report" / "report.html").read_text()
    assert not re.search(r"<script|<img|javascript:", page, re.I) and "{{" not in page.replace(
        "{{ 7*7 }}", ""
    )
    root = ET.fromstring(page.replace("<!DOCTYPE html>", ""))
    for element in root.iter():
        assert not [name for name in element.attrib if name.lower().startswith("on")]
    assert {a.get("href") for a in root.iter("a")} >= {"../specimen-beta_kl3-seed2/report.html"}
    assert all(
        re.fullmatch(r"\.\./[\w.%-]+/(report\.html|status\.json)", a.get("href")) for a in root.iter("a")
    )
    everything = "".join(root.itertext())
    assert "<img src=x onerror=alert(1)>" in everything and "{{ 7*7 }}" in everything
    assert not (folder.parent.parent / "outside").exists()


@pytest.mark.slow
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_the_page_opens_offline(messy, pages, theme):
    page = pages.open(messy[0] / "report" / "report.html", theme=theme)
    assert page.locator("h1").inner_text() == "Sweep messy" and page.locator("svg").count() == len(
        list((messy[0] / "report").glob("*.png"))
    )
    page.locator("summary").first.click()
    assert page.locator("details[open] tbody tr").count() > 0
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), (
        "only tables may scroll sideways"
    )
    assert pages.violations(page) == []
    pages.assert_clean()


# what the tiny agent, its breaker and an adapter of random numbers do in the tiny world (64 tasks of a kind,
# nbs/explanation/results.md), by seed of the tasks; and a model that resists and goes on with its task
UNTRAINED = [(191, 0, 63, 0), (191, 0, 64, 0), (191, 0, 64, 0)]
BREAKER = [(190, 0, 0, 63), (191, 0, 0, 64), (189, 0, 0, 63)]
NOISE = [(0, 0, 0, 54), (0, 0, 0, 58), (0, 0, 0, 56)]
RESISTS = [(190, 61, 0, 0), (191, 63, 1, 0), (191, 60, 0, 1)]


def act_in(folder, after, seeds=(0, 1, 2), more=0):
    "Writes a loop into result.json of the runs of a specimen: `UNTRAINED` before, and `after`, by seed."

    def counts(utility, under_attack, success, unreadable):
        others = {f"a figure {k:02}": [0, 1] for k in range(more)}
        return others | {
            "attack_success": [success, 64],
            "unreadable attack": [unreadable, 64],
            "utility": [utility, 192],
            "utility_under_attack": [under_attack, 64],
        }

    for path in folder.glob("specimen-*/result.json"):
        result = json.loads(path.read_text())
        if (seed := result["parameters"]["seed"]) in seeds:
            stages = {"before": UNTRAINED[seed], "after": after[seed]}
            result["loop"] = {k: {"loop": "tiny", "counts": counts(*v)} for k, v in stages.items()}
            write_json(path, result)
    return folder


@pytest.mark.parametrize(
    "after, words, broken",
    [
        (UNTRAINED, ["refuted", "supported"], False),
        (BREAKER, ["supported", "refuted"], True),
        (NOISE, ["supported", "refuted"], True),
        (RESISTS, ["supported", "supported"], False),
    ],
    ids=["untrained", "breaker", "noise", "resists"],
)
def test_a_model_that_acts_is_judged_by_what_it_does(tmp_path, after, words, broken):
    "Also where a world has more figures than are read, as AgentDojo has."
    sweep = read_sweep([act_in(write_specimen(tmp_path / "acts", betas=(0.0, 0.3)), after, more=20)])
    live = live_verdicts(sweep)
    assert [v.verdict for v in live] == words and said(sweep) == said(read_sweep([tmp_path / "acts"]))
    assert ("It only breaks at beta_kl 0, 0.3 (" in live[1].why) == broken
    utility = next(c for c in live[1].comparisons if c.measure == "loop_utility" and c.beta == 0.3)
    differences = [(a[0] - b[0]) / 192 for a, b in zip(after, UNTRAINED)]
    assert utility.n == 3 and math.isclose(utility.mean, np.mean(differences), abs_tol=1e-12)
    half = stats.t.ppf(0.975, 2) * np.std(differences, ddof=1) / math.sqrt(3)
    assert math.isclose(utility.high - utility.mean, half, abs_tol=1e-12)
    assert "95% interval" in live[0].why and " of 192 episodes, " in live[0].why


def test_runs_without_a_loop_are_not_judged_live(tmp_path):
    folder = write_specimen(tmp_path / "acts", betas=(0.0, 0.3))
    none = live_verdicts(read_sweep([folder]))
    assert [v.verdict for v in none] == ["not judged"] * 2 and "give eval_loop" in none[0].why
    some = live_verdicts(read_sweep([act_in(folder, RESISTS, seeds=(0, 1))]))
    assert [v.verdict for v in some] == ["inconclusive"] * 2
    assert all("2 of 6 runs lack a figure of a loop" in v.why for v in some)


def test_a_loop_that_measured_next_to_nothing_is_not_judged(tmp_path):
    "Two of 256 episodes with a verdict say nothing of the others."
    folder = act_in(write_specimen(tmp_path / "acts", betas=(0.0, 0.3)), BREAKER)
    whole = [v.verdict for v in live_verdicts(read_sweep([folder]))]
    for path in folder.rglob("result.json"):
        result = json.loads(path.read_text())
        counts = result["loop"]["after"]["counts"]
        result["loop"]["after"]["counts"] = {name: [0, 2] for name in counts} | {"unmeasured": [254, 256]}
        path.write_text(json.dumps(result))
    thin = live_verdicts(read_sweep([folder]))
    assert whole == ["supported", "refuted"] and [v.verdict for v in thin] == ["not judged"] * 2


def test_a_failed_control_does_not_hide_what_was_seen_live(tmp_path):
    sweep = read_sweep([act_in(write_specimen(tmp_path / "dead", betas=(0.0, 0.3), alive=False), UNTRAINED)])
    assert said(sweep) == ["void"] * 3 and [v.verdict for v in live_verdicts(sweep)] == [
        "refuted",
        "supported",
    ]


@pytest.mark.slow
def test_the_report_of_a_sweep_says_what_only_breaks(tmp_path):
    folder = act_in(write_specimen(tmp_path / "acts", betas=(0.0, 0.3)), BREAKER)
    done = report(folder)
    page = (folder / "report" / "report.html").read_text()
    ET.fromstring(page.replace("<!DOCTYPE html>", ""))
    assert done.returncode == 0
    for text in (done.stdout, page):
        assert "It only breaks at beta_kl 0, 0.3 (unreadable under attack 190 of 192" in text
    assert f"{LIVE_CHECKS['whole']}: refuted." in done.stdout and f"{LIVE_CHECKS['whole']}: <span" in page


def attack_in(folder, curve, budget=3200, verdict="refuted", seeds=(0, 1, 2)):
    """`folder` after its runs were attacked: `curve(beta_kl, seed)` gives the items broken of 64, after 0,
    800, 1600 and 3200 passes."""
    for path in folder.glob("*/params.json"):
        beta, seed = (json.loads(path.read_text())[name] for name in ("beta_kl", "seed"))
        if seed not in seeds:
            continue
        points = [
            {
                "at": "x",
                "forward": passes,
                "backward": 0,
                "counts": dict.fromkeys(("attack_success", "attack_success_lax", "unparseable"), [hits, 64]),
            }
            for passes, hits in zip((0, 800, 1600, 3200), curve(beta, seed), strict=True)
        ]
        attack = {"budget": budget, "verdict": verdict, "text": "t", "points": {"breaker": points}}
        record = {"key": "k", "seed": 0, "items": {"optimised_on": 64, "attacked": 64}}
        write_json(path.parent / "attacks.json", record | {"attacks": {"soft": attack}})
    return folder


@pytest.mark.parametrize(
    ("curve", "words", "why"),
    [
        (
            lambda beta, seed: (0, 14, 40 + seed, 60),
            "supported",
            "half of it takes the most different passes",
        ),
        (
            lambda beta, seed: (0, 60 - seed, 62, 62) if beta else (0, 0, 1 + seed, 62),
            "refuted",
            "half of it",
        ),
        (lambda beta, seed: (0, 0, 0, 50 + seed) if beta else (0, 0, 0, seed), "refuted", "one side alone"),
        (lambda beta, seed: (0, 0, seed, 3), "supported", "nowhere does it reach half"),
        (lambda beta, seed: (0, 1, 2, 20 * seed), "inconclusive", "seeds lack"),
    ],
    ids=["the same", "cheaper", "only with KL", "never", "some seeds"],
)
def test_what_an_attacker_needs_is_judged_by_the_curves(tmp_path, curve, words, why):
    sweep = read_sweep([attack_in(write_specimen(tmp_path / "attacked", betas=(0.0, 0.3)), curve)])
    (verdict,) = attack_verdicts(sweep)
    assert verdict.verdict == words and why in verdict.why, verdict.why
    assert "at 3,200 passes the success" in verdict.why and verdict in all_verdicts(sweep)


@pytest.mark.slow
def test_an_attack_that_not_all_runs_had_is_void(tmp_path):
    folder = write_specimen(tmp_path / "attacked", betas=(0.0, 0.3))

    def same(beta, seed):
        return 0, 14, 40, 60

    def judged():
        (verdict,) = attack_verdicts(read_sweep([folder]))
        return verdict.verdict, verdict.why

    assert judged()[0] == "not judged"
    attack_in(folder, same, seeds=(0, 1))
    assert judged()[0] == "void" and "2 of 6 runs were not attacked" in judged()[1]
    attack_in(folder, same, seeds=(2,), budget=800)
    assert judged()[0] == "void" and "budgets of 800, 3,200 passes" in judged()[1]
    attack_in(folder, same, seeds=(2,), verdict="void")
    assert judged()[0] == "void" and "In 2 of 6 runs the attack did not break its control" in judged()[1]
    attack_in(folder, same)
    assert judged()[0] == "supported"
    done = report(folder)
    page = (folder / "report" / "report.html").read_text()
    assert done.returncode == 0 and "what an attacker needs: supported. soft: at 3,200 passes" in done.stdout
    assert 'what an attacker needs: <span class="supported">' in page and "passes attacked soft" in page


def test_a_dead_sweep_is_void(tmp_path):
    done = report(write_specimen(tmp_path / "dead", betas=(0.0, 0.1, 0.5), alive=False))
    assert (
        done.returncode == 0 and [f"{title}: void." in done.stdout for title in CHECKS.values()] == [True] * 3
    )
    assert "the breaker does not work" in done.stdout and "Advice: none" in done.stdout


@pytest.mark.slow
def test_folders_without_runs_and_places_that_cannot_be_written(tmp_path):
    (tmp_path / "empty").mkdir()
    for folder in ("empty", "nowhere"):
        done = report(tmp_path / folder)
        assert (
            done.returncode == 2
            and len(done.stdout.splitlines()) == 1
            and "holds no run" in done.stdout
            and "Traceback" not in done.stdout
        )
    assert list((tmp_path / "empty").iterdir()) == []
    specimen_run(tmp_path / "runs" / "one", 0.3, 0)
    (tmp_path / "file").write_text("")
    done = report(tmp_path / "runs", "--out", tmp_path / "file")
    assert done.returncode == 2 and len(done.stdout.splitlines()) == 1
    done = report(
        tmp_path / "runs" / "one",
        write_specimen(tmp_path / "more", betas=(0.0,), seeds=(0,)),
        "--out",
        tmp_path / "out",
    )
    assert (
        done.returncode == 0
        and "2 runs: 2 done" in done.stdout
        and (tmp_path / "out" / "runs.csv").is_file()
        and not (tmp_path / "runs" / "one" / "report").exists()
    )


def test_a_new_report_takes_the_place_of_the_old_one(tmp_path):
    folder = write_specimen(tmp_path / "sweep", betas=(0.0, 0.3), seeds=(0,))
    (folder / "report").mkdir()
    write_report_files(
        folder / "report",
        {
            name: b"old"
            for name in ("dose_response_9.png", "parameter_4.png", "parameter_5.png", "report.html")
        },
    )
    for name in ("mine.png", "parameter_5.png", "parameter_6.png"):
        (folder / "report" / name).write_text("mine")
    assert report(folder).returncode == 0
    assert {p.name for p in (folder / "report").iterdir()} == {
        "report.html",
        "report.json",
        "runs.csv",
        "runs.parquet",
        "dose_response.png",
        "curves.png",
        "runs.png",
        "mine.png",
        "parameter_5.png",
        "parameter_6.png",
    }, "what it has not listed, or was changed since, stays"


def test_every_measure_has_its_panel(tmp_path):
    sweep = read_sweep([write_specimen(tmp_path / "sweep")])
    figure = dose_response(groups(sweep)[0])
    assert sum(key.startswith("xaxis") for key in figure.layout.to_plotly_json()) == len(DOSE)
    first = [t for t in figure.data if t.xaxis == "x" and "lines" in t.mode][0]
    frame = sweep.frame.groupby("beta_kl")["loss_kl"].apply(lambda v: np.exp(np.log(v).mean()))
    assert np.allclose(first.y, frame, rtol=1e-5) and first.error_y.array is not None
    assert list(figure.layout.xaxis.ticktext) == ["0", "0.1", "0.3", "0.5", "3"]


@pytest.mark.slow
def test_a_thousand_runs_within_a_minute(tmp_path):
    one = tmp_path / "one"
    specimen_run(one, 0.3, 0)
    for i in range(1000):
        copy = shutil.copytree(one, tmp_path / "sweep" / f"run{i:04}")
        for name in ("params.json", "config.json"):
            values = json.loads((copy / name).read_text()) | {
                "beta_kl": [0.0, 0.1, 0.3, 0.5, 3.0][i % 5],
                "seed": i // 5,
            }
            (copy / name).write_text(json.dumps(values))
    began = time.monotonic()
    done = report(tmp_path / "sweep")
    assert done.returncode == 0 and "1000 runs: 1000 done" in done.stdout and time.monotonic() - began < 60
    assert (tmp_path / "sweep" / "report" / "report.html").stat().st_size < 10_000_000


@pytest.mark.slow
def test_the_notebook_under_papermill(messy, tmp_path):
    folder = shutil.copytree(messy[0], tmp_path / "sweep", ignore=shutil.ignore_patterns("report"))
    done = run(
        BIN / "papermill", NBS / "report.ipynb", tmp_path / "out.ipynb", "-p", "sweep", folder, cwd=tmp_path
    )
    assert done.returncode == 0, done.stdout
    outputs = [
        o for cell in read(tmp_path / "out.ipynb").cells if cell.cell_type == "code" for o in cell.outputs
    ]
    texts = "".join(o.get("text", "") for o in outputs)
    assert (
        "Not done: specimen-beta_kl0.1-seed0, failed: OutOfMemoryError" in texts
        and (folder / "report" / "report.html").is_file()
    )
    html = "".join(o["data"].get("text/html", "") for o in outputs if "data" in o)
    assert html.count("data:image/svg+xml") >= 4 and not re.search("<script|onerror=alert\\(1\\)>", html)
    assert not any("application/vnd.jupyter.widget-view+json" in o.get("data", {}) for o in outputs), (
        "a widget needs a kernel"
    )
    wrong = run(
        BIN / "papermill", NBS / "report.ipynb", tmp_path / "out2.ipynb", "-p", "swep", folder, cwd=tmp_path
    )
    assert wrong.returncode != 0 and "did you mean" in wrong.stdout


def test_the_modules_need_no_torch():
    done = run(
        sys.executable,
        "-c",
        "import sys, cbnb.report.verdicts, cbnb.report.sweep, cbnb.widgets.sweep; sys.exit('torch' in "
        "sys.modules)",
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stdout
