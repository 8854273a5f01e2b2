"""The objective rr_twin_adv: a search for soft prompts beside the training, kept, resumed and looked at."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from cbnb.basics.jsonfiles import write_json
from cbnb.config import OBJECTIVES, ConfigError, get_config
from cbnb.data.streams import Sample, Twin
from cbnb.data.twins import draft_twins, encode_twins
from cbnb.preflight.plan import plan_lines, plan_step
from cbnb.preflight.step_checks import (
    check_run_start,
    gradient_findings,
    preference_findings,
    some_pairs,
    twin_findings,
)
from cbnb.report.figures import panels_of
from cbnb.run.settings import check_processes, run_settings
from cbnb.run.stages import Run, read_status
from cbnb.step.objectives import ALL_NAMES, COUNTS, Objective, dpo_adv, rr_twin_adv, run_terms, term_words
from cbnb.step.soft import VECTORS
from cbnb.train import breaker
from cbnb.train.alarms import aside_words, forces
from cbnb.train.trainer import SEARCHES, checkpoints
from cbnb.transcripts.tinyworld import make_transcripts
from test_twins import CONFIG as TWIN_CONFIG
from test_twins import StopAt, away, checked, twin_world
from test_twins import trained as trained_by

CONFIG = replace(TWIN_CONFIG, objective="rr_twin_adv")


@pytest.fixture(scope="module")
def world():
    "The tiny world with soft rows."
    return twin_world(CONFIG)


def trained(folder, world, config=CONFIG, **more):
    "`(done, log, adapter)` of a run with soft rows."
    return trained_by(folder, world, config, **more)


def test_the_log_has_both_halves_of_each_term(tmp_path, world):
    done, rows, _ = trained(tmp_path / "run", world)
    assert done and len(rows) == 4
    for row in rows:
        weights = rr_twin_adv.weights(CONFIG, row["c_s"], row["c_r"])
        assert row["loss"] == pytest.approx(sum(w * row[f"loss_{name}"] for name, w in weights.items()))
        assert row["loss_soft_twin"] > 0 and row["preference_pairs"] == 4 and 0 < row["loss_soft_reroute"] < 1


def test_the_soft_prompt_stands_between_the_injected_text_and_what_follows_it(world):
    masker, *_, twins, _ = world
    for transcript, twin in zip(make_transcripts("injection", 12), twins, strict=True):
        span = transcript.injection_spans[-1]
        words = transcript.messages[span.message]["content"][span.start : span.end]
        for sample in (twin.injected, twin.rejected):
            before = masker.tokenizer.decode(sample.input_ids[: sample.soft_place])
            whole = before + masker.tokenizer.decode(sample.input_ids[sample.soft_place :])
            start, end = whole.index(words), whole.index(words) + len(words)
            # what may be missing are the characters of a token that reaches over the end
            assert end - 3 <= len(before) <= end and start < len(before), (before[-80:], words)
            assert not sample.loss_mask[: sample.soft_place].any()


@pytest.mark.slow
def test_stopped_and_resumed_is_the_uninterrupted_run_bit_for_bit(tmp_path, world):
    config = replace(CONFIG, lora_dropout=0.1)
    # as behind an evaluation, which leaves a student that draws no dropout
    students = [away(config).eval() for _ in range(3)]
    _, rows, adapter = trained(tmp_path / "whole", world, config, student=students[0])
    stop = [StopAt(tmp_path / "run", 2)]
    done, first, _ = trained(tmp_path / "run", world, config, callbacks=stop, student=students[1])
    assert not done and len(first) == 2
    (newest, *_) = checkpoints(tmp_path / "run" / "checkpoints").values()
    assert (newest / SEARCHES).is_file()
    done, again, resumed = trained(tmp_path / "run", world, config, student=students[2])
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
            for key in ("loss", "loss_soft_twin", "loss_soft_reroute", "grad_norm_total"):
                assert a[key] == pytest.approx(b[key], rel=1e-3), (name, key)
        assert (adapter - other).norm() < 1e-3 * adapter.norm(), name


def test_pre_flight_knows_rows_with_a_soft_prompt_and_catches_one_outside_of_its_rows(world):
    breaker, batch, plain = checked(world, CONFIG)
    check_run_start(breaker.student, CONFIG, batch, plain)
    findings = [*twin_findings(breaker, batch), *gradient_findings(breaker, batch)]
    assert {f.verdict for f in findings} == {"pass"}, [f.text for f in findings]
    own = breaker.soft_reroute
    breaker.soft_reroute = lambda twins, soft: own([{"rejected": batch["twin"]["injected"]}], soft)
    assert [f.severity for f in gradient_findings(breaker, batch)].count("fail") == 1


def test_fsdp_is_refused_before_anything_is_loaded():
    for name in ("rr_twin_adv", "dpo_adv"):
        config = get_config("tinyagent", objective=name)
        with pytest.raises(ConfigError, match=f"{name} puts vectors .*leave fsdp off, or give an objective"):
            check_processes(config, True, 2)
        check_processes(config, False, 2)


def test_curves_and_plan_know_the_terms():
    panels = panels_of(run_terms("rr_twin_adv"))
    keys = [key for _, _, lines, _ in panels for key in lines]
    assert {"loss_soft_twin", "weighted_soft_reroute", "grad_norm_soft_reroute"} <= set(keys)
    assert {"loss_reroute", "loss_soft_reroute"} == set(panels[0][2])
    assert all(len(title) <= 52 for title, *_ in panels) and panels[4][0].startswith("KL and twin KL, nats")
    config = get_config("tinyagent", objective="rr_twin_adv")
    assert "8 twins of three rows" in next(plan_lines(config))
    # a search, and the two terms, cost their passes
    alone = plan_step(replace(config, objective="rr_twin"))
    assert plan_step(config).products > 1.5 * alone.products and VECTORS == 8


def test_a_long_row_that_is_cut_keeps_the_place_of_its_soft_prompt(world):
    ids, mask = np.arange(300, dtype=np.int32) % 50, np.arange(300) >= 290
    row = Sample(ids, mask, "long", soft_place=250)
    twin = Twin(row, Sample(ids[20:], mask[20:], "long"), row)
    ((_, _, short),) = some_pairs([row], [row], [twin])
    for side in (short.injected, short.rejected):
        assert len(side.input_ids) < 300 and side.input_ids[side.soft_place] == ids[250]
    # of a place that is cut off with the rest nothing is left
    early = Twin(replace(row, soft_place=10), twin.clean, row)
    assert some_pairs([row], [row], [early])[0][2].injected.soft_place == 0


def test_a_row_is_no_longer_than_max_length_with_its_soft_prompt(world):
    masker = world[0]
    drafts, report = draft_twins(make_transcripts("injection", 2), [])
    for name, spare in (("rr_twin_adv", VECTORS), ("rr_twin", 0)):
        config = replace(CONFIG, objective=name, max_length=120, lost_context="keep")
        twins = encode_twins(drafts, masker, config, report)
        assert max(len(row.input_ids) for twin in twins for row in twin.rows.values()) == 120 - spare


def test_settings_of_other_objectives_are_refused_and_a_path_is_a_name():
    for settings in (
        {"objective": "rr_twin_adv", "objective_options": "margin=3"},
        {"objective": "dpo", "objective_options": "margin=3"},
        {"objective": "rmu", "dpo_beta": 0.5},
        {"objective": "triplet", "dpo_logprob": "mean"},
    ):
        with pytest.raises(ConfigError, match="would do nothing"):
            run_settings({"preset": "tinyagent"} | settings)
    for path, name in (("objectives:rr_twin_adv", "rr_twin_adv"), ("zoo:rr_official", "rr_official")):
        assert get_config("tinyagent", objective=f"cbnb.step.{path}").objective == name


@pytest.mark.slow
def test_dpo_adv_has_both_halves_of_the_preference_in_its_log_and_resumes_its_search(tmp_path):
    config = replace(CONFIG, objective="dpo_adv")
    pairs = twin_world(config)
    stop = [StopAt(tmp_path / "run", 2)]
    _, rows, adapter = trained(tmp_path / "whole", pairs, config)
    done, first, _ = trained(tmp_path / "run", pairs, config, callbacks=stop)
    assert not done and len(first) == 2
    done, again, resumed = trained(tmp_path / "run", pairs, config)
    assert done and again == rows and torch.equal(resumed, adapter)
    for row in rows:
        weights = dpo_adv.weights(config, row["c_s"], row["c_r"])
        assert row["loss"] == pytest.approx(sum(w * row[f"loss_{name}"] for name, w in weights.items()))
        assert row["loss_preference"] > 0 and row["loss_soft_preference"] > 0 and row["preference_pairs"] == 4
    made, batch, plain = checked(pairs, config)
    check_run_start(made.student, config, batch, plain)
    findings = [*preference_findings(made, batch), *gradient_findings(made, batch)]
    assert {f.verdict for f in findings} == {"pass"}, [f.text for f in findings]
    drawn = [key for _, _, lines, _ in panels_of(run_terms("dpo_adv")) for key in lines]
    assert "loss_soft_preference" in drawn and "grad_norm_soft_preference" in drawn


def test_both_halves_of_reroute_pull():
    row = {"grad_norm_reroute": 3.0, "grad_norm_soft_reroute": 4.0, "grad_norm_retain": 1.0}
    assert forces(row)[0] == pytest.approx(5) and forces(row)[1:] == (1.0, "retain")
    assert forces(row | {"grad_cos_reroute_soft_reroute": 1.0})[0] == pytest.approx(7)
    assert aside_words(run_terms("rr_twin_adv")).count("twin KL") == 2


def test_an_untouched_student_has_no_floor_of_the_soft_preference():
    """The reference reads rows without the vectors, so that its start is no constant."""
    assert run_terms("dpo_adv")["soft_preference"].start is None
    assert run_terms("dpo_adv")["preference"].start == pytest.approx(math.log(2))


def test_an_objective_of_ones_own_may_have_every_term(tmp_path, monkeypatch):
    whole = Objective(
        "whole", (*rr_twin_adv.terms, *dpo_adv.terms[-2:]), lambda c, c_s, c_r: dict.fromkeys(ALL_NAMES, c_r)
    )
    monkeypatch.setitem(OBJECTIVES, "whole", whole)
    config = get_config("tinyagent", objective="whole", beta_twin=0.3, dpo_beta=0.5)
    run = Run(tmp_path)
    write_json(tmp_path / "status.json", {"state": "running", "terms": term_words(config)})
    assert len(read_status(tmp_path)["terms"]) == len(ALL_NAMES)
    assert set(run_terms("whole", read_status(run.path)["terms"])) == set(ALL_NAMES)


@pytest.mark.parametrize("name, groups", [("rr_twin_adv", ["clean"]), ("dpo_adv", ["injected", "rejected"])])
def test_the_teacher_passes_the_rows_once_that_two_terms_read(name, groups, monkeypatch):
    config = replace(CONFIG, objective=name)
    made, batch, _ = checked(twin_world(config), config)
    passed, once = [], breaker.teacher_pass
    monkeypatch.setattr(breaker, "teacher_pass", lambda *given: passed.append(given[2]) or once(*given))
    counts = torch.full((len(COUNTS),), 4)
    made(batch["harmful"], batch["benign"], counts, twin=batch["twin"])
    assert len(passed) == len(groups)
    assert all(rows is batch["twin"][side] for rows, side in zip(passed, groups, strict=True))
    assert not any("teacher" in rows for rows in batch["twin"].values())
