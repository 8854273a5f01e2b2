"""The objective dpo: a third stream of pairs, exact, kept, resumed and looked at as the twins of rr_twin."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pandas as pd
import pytest
import torch

import cbnb.train.breaker
from cbnb.basics.jsonfiles import RunError, write_json
from cbnb.config import ConfigError, get_config
from cbnb.preflight.plan import plan_lines
from cbnb.preflight.run_checks import probe_gradient_findings
from cbnb.preflight.step_checks import check_run_start, gradient_findings, preference_findings, twin_findings
from cbnb.report.figures import panels_of
from cbnb.run.settings import run_settings
from cbnb.run.stages import Run
from cbnb.step.objectives import dpo, run_terms
from cbnb.train.same import keep_twins
from cbnb.train.teacher_cache import open_cache
from test_twins import CONFIG as TWIN_CONFIG
from test_twins import StopAt, away, checked, twin_world
from test_twins import trained as trained_by
from train_common import load

CONFIG = replace(TWIN_CONFIG, objective="dpo")


@pytest.fixture(scope="module")
def world():
    "The tiny world with pairs."
    return twin_world(CONFIG)


def trained(folder, world, config=CONFIG, **more):
    "`(done, log, adapter)` of a run with pairs."
    return trained_by(folder, world, config, **more)


def test_the_log_has_the_term_its_weight_its_pairs_and_no_pull_on_hidden_states(tmp_path, world):
    done, rows, _ = trained(tmp_path / "run", world)
    assert done and len(rows) == 4
    for row in rows:
        weights = dpo.weights(CONFIG, row["c_s"], row["c_r"])
        assert row["loss"] == pytest.approx(sum(weights[name] * row[f"loss_{name}"] for name in dpo.names))
        assert row["preference_pairs"] == 4 and row["loss_preference"] > 0
        assert row["weighted_reroute"] == row["weighted_retain"] == 0 and "loss_twin" not in row
    assert rows[1]["grad_norm_preference"] > 0
    status = load(tmp_path / "run" / "status.json")
    assert [t["name"] for t in status["terms"]] == list(dpo.names) and status["floor"]["preference"] < 1e-4


def test_twins_have_the_rows_that_the_objective_reads(tmp_path, world):
    masker, harmful, benign, pairs, report = world
    assert all(list(pair.rows) == ["injected", "rejected"] == list(pair.for_teacher) for pair in pairs)
    with pytest.raises(
        ConfigError, match="rr_twin reads injected and clean rows of twins, and injected and rej"
    ):
        trained(tmp_path / "run", world, TWIN_CONFIG)
    with pytest.raises(
        ConfigError, match="dpo reads injected and rejected rows of twins, and none were given"
    ):
        trained(tmp_path / "run", (masker, harmful, benign, None, report))


def test_settings_of_the_preference_are_refused_where_they_would_do_nothing():
    for name, value in (("dpo_beta", 0.5), ("dpo_logprob", "mean")):
        for objective in ("rr", "rr_kl", "rr_twin"):
            with pytest.raises(ConfigError, match=f"{name} {value} would do nothing"):
                run_settings({"preset": "tinyagent", "objective": objective, name: value})
        config, _ = run_settings({"preset": "tinyagent", "objective": "dpo", name: value})
        assert getattr(config, name) == value
    for name, value in (("beta_twin", 2.0), ("retain_weight", 0.5), ("retain_layers", "all")):
        with pytest.raises(ConfigError, match="would do nothing"):
            run_settings({"preset": "tinyagent", "objective": "dpo", name: value})
    for wrong in ({"dpo_beta": 0.0}, {"dpo_beta": math.inf}, {"dpo_logprob": "max"}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            get_config("tinyagent", objective="dpo", **wrong)


@pytest.mark.slow
def test_stopped_and_resumed_is_the_uninterrupted_run_bit_for_bit(tmp_path, world):
    config = replace(CONFIG, lora_dropout=0.1)
    _, rows, adapter = trained(tmp_path / "whole", world, config)
    done, first, _ = trained(tmp_path / "run", world, config, callbacks=[StopAt(tmp_path / "run", 2)])
    assert not done and len(first) == 2
    done, again, resumed = trained(tmp_path / "run", world, config)
    assert done and again == rows and torch.equal(resumed, adapter)


@pytest.mark.slow
def test_accumulation_and_savings_change_nothing(tmp_path, world):
    _, rows, adapter = trained(tmp_path / "whole", world)
    for name, changes in {
        "at once": {"batch_size": 4, "gradient_accumulation_steps": 1},
        "no savings": {"savings": ("none",)},
    }.items():
        _, others, other = trained(tmp_path / name, world, replace(CONFIG, **changes))
        for a, b in zip(rows, others, strict=True):
            for key in ("loss", "loss_preference", "loss_kl", "preference_pairs", "grad_norm_total"):
                assert a[key] == pytest.approx(b[key], rel=1e-3), (name, key)
        assert (adapter - other).norm() < 1e-3 * adapter.norm(), name


@pytest.mark.slow
def test_with_a_teacher_cache_no_teacher_is_run_and_the_run_is_the_same(tmp_path, world, monkeypatch):
    masker, harmful, benign, pairs, _ = world
    _, rows, _ = trained(tmp_path / "teacher", world)
    (tmp_path / "cache").mkdir()
    student = away(CONFIG)
    pad = masker.tokenizer.pad_token_id
    cache = open_cache(tmp_path / "states", student, harmful, benign, CONFIG, pad, twins=pairs)
    # the floor, which takes a pass of the base, is that of the run before
    floor = load(tmp_path / "teacher" / "status.json")["floor"]
    write_json(tmp_path / "cache" / "status.json", {"state": "running", "floor": floor})
    for name in ("both_passes", "teacher_pass"):
        monkeypatch.setattr(cbnb.train.breaker, name, lambda *_: pytest.fail("the teacher was run"))
    _, others, _ = trained(tmp_path / "cache", world, cache=cache, student=student)
    for a, b in zip(rows, others, strict=True):
        assert all(a[k] == pytest.approx(b[k], rel=1e-4) for k in ("loss", "loss_preference", "loss_kl"))


def test_other_pairs_than_those_of_the_run_are_refused(tmp_path, world):
    pairs, run = world[3], Run(tmp_path, attempt=2)
    keep_twins(Run(tmp_path), pairs)
    (tmp_path / "answers.jsonl").touch()  # what an earlier attempt leaves
    keep_twins(run, pairs)
    with pytest.raises(RunError, match="rejected is another one"):
        keep_twins(run, [*pairs[:-1], pairs[-1]._replace(rejected=pairs[0].rejected)])


def test_pre_flight_looks_at_the_preference_and_catches_answers_that_are_mixed_up(world):
    breaker, batch, plain = checked(world, CONFIG)
    check_run_start(breaker.student, CONFIG, batch, plain)
    findings = [*preference_findings(breaker, batch), *gradient_findings(breaker, batch)]
    assert {f.verdict for f in findings} == {"pass"}, [f.text for f in findings]
    said = " · ".join(f.text for f in findings)
    assert "difference of log-ratios" in said and "the gradient of the preference is exactly zero" in said
    assert twin_findings(breaker, batch) == []

    def swapped(pairs):
        return own([{"injected": p["rejected"], "rejected": p["injected"]} for p in pairs])

    own, breaker.preference = breaker.preference, swapped
    assert [f.severity for f in preference_findings(breaker, batch)] == ["fail"]
    breaker.preference = lambda pairs: own([dict.fromkeys(pairs[0], batch["benign"])])
    assert any("preference" in f.text and f.severity == "fail" for f in gradient_findings(breaker, batch))


@pytest.mark.parametrize("name, verdict", [("rr", "warn"), ("dpo", "pass")])
def test_no_breaker_is_held_shut_where_none_is_to_open(name, verdict):
    terms = run_terms(name)
    frame = pd.DataFrame(
        [[2.0 if term == "kl" else 1.0 for term in terms]], columns=[f"norm_{t}" for t in terms]
    )
    probe = SimpleNamespace(outlook=SimpleNamespace(alive=False))
    assert [f.verdict for f in probe_gradient_findings(frame, probe, terms)] == [verdict]


def test_curves_and_plan_know_the_term():
    panels = panels_of(run_terms("dpo"))
    keys = [key for _, _, lines, _ in panels for key in lines]
    assert {"loss_preference", "weighted_preference", "grad_norm_preference"} <= set(keys)
    assert any("KL and preference" in title for title, *_ in panels)
    first = next(plan_lines(get_config("tinyagent", objective="dpo")))
    assert "8 twins of two rows" in first
