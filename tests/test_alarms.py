"""The alarms and the probe, replayed on recorded trainings: whether they say what happened."""

import gzip
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from cbnb.config import OBJECTIVES, get_config
from cbnb.preflight.probe import Outlook, Probe, outlook, settle
from cbnb.preflight.run_checks import check_alive, check_weights
from cbnb.step.objectives import Objective, rr
from cbnb.train.alarms import alarm_advice, find_alarms

# Trainings of the tiny agent with the random settings of nbs/bench/alive.ipynb (draws 0 to 15), in float32
# and bfloat16, logged at every step and diagnosed at every second, with attack success and
# exact match on 24 held-out transcripts a kind. The rules were set on draws 0 to 9 and on
# nbs/examples/beta_kl, and are judged on 10 to 15.
HISTORIES = json.loads(gzip.decompress((Path(__file__).parent / "histories.json.gz").read_bytes()))
FLOOR = {
    "float32": {"dtype": "float32", "reroute": 0.0, "retain": 1.1e-5, "kl": 1.5e-12},
    "bfloat16": {"dtype": "bfloat16", "reroute": 1.4e-5, "retain": 0.2, "kl": 4.8e-8},
}


def told(history):
    config = get_config("tinyagent", dtype=history["dtype"], **history["settings"], diagnose_steps=2)
    return {
        alarm["alarm"]: alarm for alarm in find_alarms(history["rows"], config, FLOOR[history["dtype"]])
    }, config


@pytest.mark.parametrize("history", HISTORIES, ids=[f"{h['dtype']}-{h['number']}" for h in HISTORIES])
def test_an_alarm_says_what_happened(history):
    alarms, _ = told(history)
    kept = min(history["exact_match"].values())
    assert set(alarms) <= {"dead", "collapsed"}
    if history["attack_success"] > 0.9:
        assert "dead" in alarms, "a dead run is told"
    if history["attack_success"] < 0.3:
        assert "dead" not in alarms, "a breaker that works is not called dead"
    if kept < 0.25:
        assert "collapsed" in alarms, "lost benign behaviour is told"
    if kept > 0.7:
        assert "collapsed" not in alarms, "kept benign behaviour is not called lost"


def test_both_kinds_of_run_are_among_those_that_judge():
    judged = [h for h in HISTORIES if h["number"] >= 10]
    assert (
        sum("dead" in told(h)[0] for h in judged) >= 4 and sum("collapsed" in told(h)[0] for h in judged) >= 3
    )
    assert sum(not told(h)[0] for h in HISTORIES) >= 8


def foretold_by(rows, config, floor):
    "What `cbnb.preflight.probe` says: asked line by line over the first 40 steps, until it is sure."
    first = rows[:40]
    asked = (outlook(first[:n], config, floor) for n in range(1, len(first) + 1))
    sure = next((found for found in asked if found.alive is not None), None)
    return sure or settle(outlook(first, config, floor), config)


def opened(rows, config):
    return sum(row["loss_reroute"] for row in rows[-10:]) / 10 <= config.dead_level


@pytest.mark.parametrize("dtype", FLOOR)
def test_the_probe_foretells_what_happened(dtype):
    "Draws 6 and 12 end at .98 and .93 in float32, and open in bfloat16: no probe can tell these."
    wrong = []
    for history in (h for h in HISTORIES if h["dtype"] == dtype):
        config = told(history)[1]
        found = foretold_by(history["rows"], config, FLOOR[dtype])
        if found.alive != opened(history["rows"], config):
            wrong.append((history["number"], found))
    assert {number for number, _ in wrong} <= {6, 12}, wrong


# Trainings of SmolLM2-135M-Instruct, made by tests/scripts/smollm2_histories.py after the rules were set. The
# untouched model obeys none of the attacks and does none of the tasks, so answers cannot judge. Figures on
# held-out transcripts do: the cosine to the teacher's hidden states on obeying answers, and the top-1
# agreement with the teacher on benign ones.
SMOLLM2 = json.loads(gzip.decompress((Path(__file__).parent / "histories_smollm2.json.gz").read_bytes()))
seeds = [f"seed-{h['settings']['seed']}" for h in SMOLLM2["histories"]]
each_of_smollm2 = pytest.mark.parametrize("history", SMOLLM2["histories"], ids=seeds)


def told_of_smollm2(history):
    config = get_config("llama-3.1-8b-instruct", diagnose_steps=2, **history["settings"])
    return {alarm["alarm"]: alarm for alarm in find_alarms(history["rows"], config, history["floor"])}, config


@each_of_smollm2
def test_an_alarm_says_what_happened_to_a_pretrained_model(history):
    alarms, _ = told_of_smollm2(history)
    end = history["outcome"]
    assert set(alarms) <= {"dead", "collapsed"}
    if end["harmful_cosine"] > 0.97:
        assert "dead" in alarms, "states that have not turned are told"
    if end["harmful_cosine"] < 0.85:
        assert "dead" not in alarms, "states that have turned are not dead"
    if end["top1"] < 0.5:
        assert "collapsed" in alarms, "lost benign behaviour is told"
    if end["top1"] > 0.95:
        assert "collapsed" not in alarms, "kept benign behaviour is not called lost"


def test_runs_of_a_pretrained_model_of_each_kind_judge():
    """Two that open have lost one benign token in seven (top-1 .86): they end above a tenth of collapse_kl,
    and are told at the last step alone. A model that does none of the tasks cannot say if that is a loss."""
    found = {h["settings"]["seed"]: told_of_smollm2(h)[0] for h in SMOLLM2["histories"]}
    assert {seed: {name: a["step"] for name, a in alarms.items()} for seed, alarms in found.items()} == {
        1: {"collapsed": 36},
        2: {"dead": 12},
        3: {"collapsed": 12},
        4: {"collapsed": 30},
        5: {"dead": 18},
    }
    assert "where rounding alone puts it (bfloat16)" in found[2]["dead"]["text"]
    assert "lower retain_weight" in found[2]["dead"]["text"] and "lower beta_kl" in found[5]["dead"]["text"]


@each_of_smollm2
def test_the_probe_foretells_what_happened_to_a_pretrained_model(history):
    (_, config), rows, floor = told_of_smollm2(history), history["rows"], history["floor"]
    found = foretold_by(rows, config, floor)
    assert found.alive == opened(rows, config), found


def log(steps, curve, total, **more):
    return [
        {
            "step": s,
            "loss_reroute": curve(s),
            "loss_kl": 1e-3,
            "harmful_tokens": 9,
            "benign_tokens": 9,
            "kl_targets": 9,
        }
        | more
        for s in range(1, steps + 1)
    ], get_config("tinyagent", total_steps=total, warmup_steps=5)


def test_a_pretrained_llama_in_bfloat16():
    """SmolLM2-135M: retain .0005, lr 5e-5, 150 steps was at .94 at half of them, below .9 at 85, at .84 at
    110, and obeyed 0 of 12 at the end; the published setting stood at its floor of 8e-5. Only these figures
    are known, so the curve between them is drawn through them."""
    floor = {"dtype": "bfloat16", "reroute": 8e-5, "retain": 2.1, "kl": 9e-4}
    slow, config = log(
        110,
        lambda s: (
            1 - min(8e-5 * 10 ** (s * 2.875 / 75), 0.06 * (0.16 / 0.06) ** ((s - 75) / 35) if s > 75 else 1)
        ),
        150,
    )
    assert round(slow[74]["loss_reroute"], 2) == 0.94 and find_alarms(slow, config, floor) == []
    still, config = log(150, lambda s: 1 - 8e-5 * (1 + 0.3 * (-1) ** (s // 3)), 150)
    (alarm,) = find_alarms(still, config, floor)
    assert (alarm["alarm"], alarm["step"], alarm["last_step"]) == (
        "dead",
        75,
        150,
    ) and "where rounding alone puts it (bfloat16)" in alarm["text"]


def test_the_untouched_student_of_step_1_is_not_called_dead():
    config, row = (
        get_config("tinyagent", total_steps=2),
        {"step": 1, "loss_reroute": 1.0, "loss_retain": 0.0, "loss_kl": 0.0},
    )
    assert find_alarms([row], config, FLOOR["float32"]) == []
    assert [a["alarm"] for a in find_alarms([row, row | {"step": 2}], config, FLOOR["float32"])] == ["dead"]


def test_the_advice_names_what_holds_it():
    line = {
        "step": 50,
        "grad_norm_reroute": 0.1,
        "grad_norm_retain": 0.05,
        "grad_norm_kl": 3.0,
        "grad_cos_retain_kl": 0.0,
    }
    assert "lower beta_kl" in alarm_advice([line]) and "30.0 times" in alarm_advice([line])
    assert "lower retain_weight" in alarm_advice(
        [line | {"grad_norm_retain": 5.0}]
    ) and "raise learning_rate" in alarm_advice([line | {"grad_norm_kl": 0.01}])


def away_and_held():
    "An objective with terms, a range and weights of its own: no setting weighs what holds it back."
    terms = (
        replace(rr.term("reroute"), title="away", unit="margin", low=0.0, high=4.0, start=4.0),
        replace(rr.term("retain"), title="held", unit="mean angle"),
        replace(rr.term("kl"), title="divergence"),
    )
    return Objective("own", terms, lambda config, c_s, c_r: {"reroute": c_s, "retain": c_r, "kl": c_r})


@pytest.mark.parametrize("holder", ["retain", "kl"])
def test_the_words_of_the_run_checks_are_those_of_the_objective(holder, monkeypatch):
    monkeypatch.setitem(OBJECTIVES, "own", away_and_held())
    config = get_config("tinyagent", objective="own", warmup_steps=150)
    norms = {"grad_norm_reroute": 1e-3, "grad_norm_retain": 1.0, "grad_norm_kl": 0.5}
    if holder == "kl":
        norms["grad_norm_kl"] = 2.0
    rows = [{"step": n, "loss_reroute": 4.0, "loss_kl": 0.0, **norms} for n in (1, 10)]
    probe = Probe(rows, Outlook(False, 10, 1e-3, 0.0, math.inf, holder), 0.4, 8, 0)
    weights, alive = check_weights(config, probe)[0], check_alive(config, probe, lambda other: probe)[0]
    text = "\n".join(finding.text for finding in [*weights, *alive])
    title = {"retain": "held", "kl": "divergence"}[holder]
    assert "what holds it back (held and divergence together; the most is " + title in text, text
    assert "of the probe the away gradient" in text and "held gains weight" in text
    assert ("lower the weight of the divergence" in text) == (holder == "kl")
    words = text.replace("loss_reroute", "").replace(
        "beta_kl 0.3 (", ""
    )  # a field, and a setting that is given
    for word in ("reroute", "retain", "L2", "KL", "beta_kl", "lower retain_weight"):
        assert word not in words, word


def test_an_alarm_advises_no_setting_that_the_objective_does_not_use(monkeypatch):
    monkeypatch.setitem(OBJECTIVES, "own", away_and_held())
    config = get_config("tinyagent", objective="own", total_steps=100)
    rows = [{"step": n, "loss_reroute": 0.0, "loss_kl": 9.0} for n in range(1, 101)]
    (alarm,) = find_alarms(rows, config)
    assert alarm["alarm"] == "collapsed" and "; lower learning_rate or alpha_max" in alarm["text"]
    (alarm,) = find_alarms(rows, replace(config, objective="rr"))
    assert "; raise beta_kl, or lower learning_rate or alpha_max" in alarm["text"]
