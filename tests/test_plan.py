"""`cbnb plan` against the memory of real steps."""

import json

import pytest

from cbnb.preflight.plan import plan_step
from cbnb.step.models import load_model
from families import FAMILIES, tiny_config, tiny_model
from forked import command
from plan_peak import CASES, given, measured
from test_families import settings

# tokens a row, for time: nbs/bench/plan.ipynb has these cases at their own length
SHORTER = {"large vocabulary": (128,), "bfloat16 from block 4": (128,)}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_the_planned_memory_is_that_of_a_real_step(case):
    config, shape = given(case, *SHORTER.get(case, ()))
    planned, peak = plan_step(config, shape=shape, device="cpu").total, measured(case, *SHORTER.get(case, ()))
    assert abs(planned / peak - 1) < 0.1, f"{planned / 1e6:.0f} MB planned, {peak / 1e6:.0f} MB held"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ("gpt-oss", "Gemma 3n", "Qwen3-Next", "DeepSeek V4"))
def test_other_families_are_planned(name):
    "Fused experts, several residual streams, linear attention, hyper-connections."
    kind, more, _ = FAMILIES[name]
    planned, weights = (
        plan_step(settings(name, max_length=32), shape=tiny_config(kind, **more), device="cpu"),
        sum(p.numel() for p in tiny_model(name).parameters()),
    )
    assert planned.weights == 4 * weights and planned.activations > 0 and planned.products > 0


@pytest.mark.filterwarnings("ignore")
def test_what_a_multimodal_model_has_beside_its_text_part_is_counted(tmp_path):
    tiny_model("Gemma 3 (multimodal)").save_pretrained(tmp_path)
    config = settings("Gemma 3 (multimodal)", max_length=32, model=str(tmp_path))
    assert plan_step(config, device="cpu").weights == sum(
        p.numel() * p.element_size() for p in load_model(str(tmp_path)).parameters()
    )


def test_no_code_of_a_models_folder_runs_and_none_is_asked_for(tmp_path):
    (tmp_path / "x.py").write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w')\nfrom transformers import PretrainedConfig\nclass "
        "Y(PretrainedConfig): model_type = 'theirs'\n"
    )
    for name, words in (
        ("theirs", "runs only where you say so"),
        (None, "runs only where you say so"),
        ("t5", "no causal language model"),
    ):
        (tmp_path / "config.json").write_text(
            json.dumps(
                {"model_type": name, "auto_map": {"AutoConfig": "x.Y"}}
                if name != "t5"
                else {"model_type": "t5"}
            )
        )
        said = command("plan", "--model", tmp_path, "--batch-size", 1, "--max-length", 16, runs=tmp_path)
        assert (
            said.returncode == 2
            and words in said.stdout
            and "Traceback" not in said.stdout
            and "[y/N]" not in said.stdout
            and not (tmp_path / "ran").exists()
        ), said.stdout


@pytest.mark.slow
def test_a_plan_says_which_flags_it_does_not_look_at(tmp_path):
    said = command(
        "plan",
        "--batch-size",
        1,
        "--max-length",
        16,
        "--chat-template",
        "nowhere.jinja",
        "--seed",
        3,
        runs=tmp_path,
    )
    assert said.returncode == 0 and "chat_template, seed changes nothing in a plan" in said.stdout, (
        said.stdout
    )
    assert said.stdout.startswith("planning a step"), "what it does stands before what takes its time"
    said = command("plan", "--batch-size", 1, "--max-length", 16, "--on-error", "skip", runs=tmp_path)
    assert said.returncode == 0 and "on_error changes nothing in a plan" in said.stdout, said.stdout
