"""Settings that follow from the model and the length of a run, and settings that would do nothing: by
papermill, the command, a sweep and the pre-flight."""

import json
import re
import sys
from dataclasses import fields

import pytest

from cbnb.basics.jsonfiles import RunError
from cbnb.config import ConfigError, get_config
from cbnb.run.settings import run_settings
from forked import cells
from forked import command as cbnb
from helpers import NBS
from train_common import few, little_data, load


def random_model(folder, **shape):
    "A Llama of random weights with the tiny agent's tokenizer, in `folder`; returns its path."
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from cbnb.basics.places import TINYAGENT
    from cbnb.step.models import load_tokenizer

    torch.manual_seed(0)
    given = (
        dict(hidden_size=64, intermediate_size=96, num_attention_heads=2, num_key_value_heads=2, head_dim=32)
        | shape
    )
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(TINYAGENT, **given)).save_pretrained(folder)
    load_tokenizer("tinyagent").save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    return random_model(tmp_path_factory.mktemp("deep") / "my model", num_hidden_layers=9)


def test_every_declared_limit_is_checked():
    """A setting outside of its limits is refused in the words of its help; what a run has beside its settings
    is known by one list, that of the declarations."""
    from cbnb.config import RUN_ONLY, CircuitBreakerConfig, limits_in_words
    from cbnb.data.sources import READING
    from cbnb.run.directory import HOW_STARTED
    from cbnb.sweep.spec import check_settings, notebook_parameters

    limited = [f for f in fields(CircuitBreakerConfig) if f.metadata["limits"]]
    assert len(limited) > 30
    for f in limited:
        limits = f.metadata["limits"]
        bad = {"at_least": -1, "above": 0, "one_of": "no such name", "policy": "no_such_name"}
        (wrong,) = [bad[kind] for kind in limits if kind in bad]
        value = (wrong, 30) if f.name == "lora_layers" else wrong
        with pytest.raises(
            ConfigError, match=f"{f.name} must be (one of )?{re.escape(limits_in_words(limits))}"
        ):
            CircuitBreakerConfig(**{f.name: value})
    assert {*READING, *HOW_STARTED} <= set(RUN_ONLY)
    given = {
        n: p.default for n, p in notebook_parameters(NBS / "preflight.ipynb").items() if n not in HOW_STARTED
    }
    check_settings(given)
    wrong = {
        "max_skipped": 1.1,
        "on_error": "keep",
        "max_new_tokens": 0,
        "temperature": -1.0,
        "samples": 0,
        "probe_steps": 9,
    }
    for name, value in wrong.items():
        with pytest.raises((ConfigError, RunError), match=name):
            check_settings(given | {name: value})


@pytest.mark.slow
def test_five_steps_need_no_warm_up(tmp_path):
    """`-p total_steps 5` alone: the intervals that nobody gave follow, and what was used stands in
    config.json."""
    given = {k: v for k, v in little_data(tmp_path).items() if k != "diagnose_steps"}
    done = cells(
        "-p",
        "total_steps",
        5,
        "-p",
        "run_dir",
        tmp_path / "run",
        "-p",
        "batch_size",
        2,
        *(w for k, v in given.items() for w in ("-p", k, v)),
    )
    assert done.returncode == 0, done.stdout[-3000:]
    kept = load(tmp_path / "run" / "config.json")
    assert [kept[k] for k in ("warmup_steps", "logging_steps", "save_steps", "diagnose_steps")] == [
        1,
        1,
        1,
        1,
    ]
    refused = cells("-p", "total_steps", 5, "-p", "warmup_steps", 5, runs=tmp_path / "runs")
    assert (
        refused.returncode != 0
        and "warmup_steps must be below total_steps, 5, but 5 was given" in refused.stdout
    )


@pytest.mark.slow
def test_a_model_without_a_preset_gets_settings_of_its_own(tmp_path, deep):
    """Block 3 and 6 of 9 and not block 2, the width's learning rate, and a line that says so; the folder is
    not called tinyagent."""
    done = cells("-p", "model", deep, *few(tmp_path, total_steps=2, dtype="float32"), runs=tmp_path / "runs")
    assert done.returncode == 0, done.stdout[-3000:]
    (run,) = (tmp_path / "runs").glob("*/my_model-*")
    kept = load(run / "config.json")
    assert (kept["target_layers"], kept["lora_layers"], kept["lora_r"], kept["learning_rate"]) == (
        [3, 6],
        [0, 6],
        4,
        1e-3,
    )
    assert "note: no preset is for" in done.stdout
    assert load(run / "adapter" / "adapter_config.json")["layers_to_transform"] == list(range(7))


@pytest.mark.slow
def test_a_preset_of_another_model_is_told(tmp_path, deep):
    "By plan, by the sweep before it is submitted, and by the pre-flight."
    planned = cbnb("plan", "--model", deep, runs=tmp_path)
    assert (
        planned.returncode == 0
        and "target_layers 3,6" in planned.stdout
        and "no preset is for" in planned.stdout
    ), planned.stdout
    spec = tmp_path / "two.yaml"
    spec.write_text(
        json.dumps(
            {
                "parameters": {
                    "model": deep,
                    "preset": "llama-3-8b",
                    "target_layers": "3",
                    "lora_layers": "0,6",
                },
                "grid": {"beta_kl": [0, 0.3]},
            }
        )
    )
    said = cbnb("ablate", spec, "--dry-run", "--local", 1, runs=tmp_path)
    assert (
        said.returncode == 0 and said.stdout.count("is another model (llama, 9 blocks of width 64)") == 1
    ), said.stdout
    unfit = cbnb("plan", "--model", deep, "--preset", "llama-3-8b", runs=tmp_path)
    assert (
        unfit.returncode == 2
        and "target_layers must be at least 0 and at most 8, but 10 was given" in unfit.stdout
    )
    nowhere = cbnb("plan", "--model", tmp_path / "nothing", runs=tmp_path)
    assert (
        nowhere.returncode == 2
        and "no such model folder" in nowhere.stdout
        and "Traceback" not in nowhere.stdout
    )


@pytest.mark.slow
def test_the_preflight_tells_and_loads_what_the_run_loads(tmp_path, deep):
    from cbnb.transcripts.reader import write_transcripts
    from cbnb.transcripts.tinyworld import TASK_KINDS, make_transcripts
    from test_preflight import review

    write_transcripts(
        tmp_path / "train.jsonl",
        [t for kind in TASK_KINDS if kind != "general" for t in make_transcripts(kind, 24)],
    )
    write_transcripts(
        tmp_path / "eval.jsonl", [t for kind in TASK_KINDS for t in make_transcripts(kind, 2, "eval")]
    )
    made, _ = review(
        tmp_path / "run",
        tmp_path,
        only="weights",
        model=deep,
        dtype="float32",
        fsdp=True,
        beta_kl=0.0,
        kl_temperature=2.0,
        probe_steps=10,
    )
    (weights,) = [c for c in made["checks"] if c["name"] == "weights"]
    told = " · ".join(p["text"] for p in weights["points"] if p["verdict"] == "warn")
    assert all(
        words in told
        for words in (
            "no preset is for",
            "fsdp is not looked at",
            "kl_temperature 2 changes the measured KL only",
        )
    ), told
    # there is no GPU that could: the run could not start, either
    _, refused = review(tmp_path / "bits", tmp_path, only="direction", quantize="4bit")
    assert "detachment" in refused and ("bitsandbytes" in refused or "4-bit" in refused), refused


@pytest.mark.parametrize(
    "given, words",
    [
        ({"objective": "rr_kl", "retain_weight": 0.5}, "retain_weight 0.5 would do nothing"),
        ({"objective": "rr_kl", "retain_layers": "all"}, "retain_layers all would do nothing"),
        ({"objective": "rr_kl", "retain_relative": True}, "retain_relative True would do nothing"),
        ({"diagnose_steps": 0, "saturated_below": 1e-5}, "saturated_below 1e-05 would do nothing"),
        ({"dead_level": 1.0, "dead_after": 0.1}, "dead_after 0.1 would do nothing"),
        ({"collapse_stops": True, "collapse_for": 1.0}, "collapse_stops True would do nothing"),
        ({"savings": "none,fused_kl"}, "none stands beside others"),
        ({"report_to": "none,wandb"}, "none stands beside others"),
    ],
)
def test_a_setting_that_would_do_nothing_is_refused(given, words):
    with pytest.raises(ConfigError, match=words):
        get_config("tinyagent", **given)
    others = {k: v for k, v in given.items() if k not in words}  # without the idle one the rest is a run
    if "none" not in words:
        get_config("tinyagent", **others)


MINE = """
import torch
from dataclasses import replace
from cbnb.step.objectives import COSINE_TERM, KL, Objective, Term, reroute_cosine
def cosine(harmful, benign, config): return 1 - torch.cosine_similarity(*benign, dim=-1)
def detached(harmful, benign, config): return reroute_cosine(harmful, benign, config).detach()
def weights(config, c_s, c_r): return {"reroute": c_s, "retain": c_r, "kl": 0.0}
stay = Term("retain", "stay", "mean 1 - cosine", 0.0, 2.0, 0.0, cosine)
held = Objective("held", (COSINE_TERM, stay, KL), weights)
loose = Objective("loose", (replace(COSINE_TERM, per_token=detached), stay, KL), weights)
"""


def told_in_its_own_words(status):
    "The run's report, dashboard and card, read where its module cannot be imported."
    from cbnb.widgets.dashboard import summary_bundle, take_snapshot

    run = status.parent
    assert "my_losses" not in sys.modules
    texts = {
        "report": re.sub("<[^>]*>", " ", (run / "report.html").read_text()),
        "dashboard": summary_bundle(take_snapshot(run))["text/html"],
        "card": (run / "adapter" / "README.md").read_text(),
    }
    for where, text in texts.items():
        assert "stay" in text and "mean 1 - cosine" in text and "L2" not in text, where
    terms = {term["name"]: term["factors"] for term in json.loads(status.read_text())["terms"]}
    assert terms == {"reroute": ["c_s"], "retain": ["c_r"], "kl": []}, terms
    assert "measured only" in texts["dashboard"]


@pytest.mark.slow
def test_a_setting_that_ones_own_objective_ignores(tmp_path, monkeypatch):
    """By a run, before it has a directory, and by a sweep before it starts; beta_kl, which every run has, is
    told."""
    (tmp_path / "my_losses.py").write_text(MINE)
    monkeypatch.syspath_prepend(tmp_path)
    given = few(tmp_path, total_steps=2, objective="my_losses:held")
    refused = cells(*given, "-p", "retain_weight", 0.5, runs=tmp_path / "runs")
    assert (
        refused.returncode != 0
        and "retain_weight 0.5 would do nothing: the objective my_losses:held" in refused.stdout
        and not (tmp_path / "runs").exists()
    ), refused.stdout
    done = cells(*given, runs=tmp_path / "runs")
    assert (
        done.returncode == 0
        and "note: objective my_losses:held has no KL term: beta_kl 0.3 changes nothing" in done.stdout
    ), done.stdout[-2000:]
    told_in_its_own_words(*(tmp_path / "runs").glob("**/status.json"))
    loose = [v if v != "my_losses:held" else "my_losses:loose" for v in given]
    early = cells(*loose, "-p", "run_dir", tmp_path / "loose")
    assert (
        early.returncode != 0 and "reroute does not depend on the student's hidden states" in early.stdout
    ), early.stdout[-2000:]
    assert not (tmp_path / "loose" / "answers.jsonl").exists(), (
        "it is told before the evaluation of the untouched model"
    )
    spec = tmp_path / "s.yaml"
    spec.write_text(
        json.dumps(
            {
                "parameters": little_data(tmp_path) | {"objective": "my_losses:held"},
                "grid": {"retain_weight": [0.1, 1]},
            }
        )
    )
    said = cbnb("ablate", spec, "--dry-run", "--local", 1, runs=tmp_path)
    assert said.returncode == 2 and "would do nothing" in said.stdout, said.stdout


def test_fsdp_alone_is_refused(tmp_path):
    refused = cells("-p", "fsdp", "True", "-p", "run_dir", tmp_path / "run")
    assert (
        refused.returncode != 0
        and "there is one: start more by torchrun" in refused.stdout
        and not (tmp_path / "run").exists()
    )
    planned = cbnb("plan", "--fsdp", runs=tmp_path)
    assert planned.returncode == 2 and "fsdp shares the weights" in planned.stdout


TEMPLATE = "{% if date_string is defined %}{{ 'Today: ' ~ date_string ~ '\n' }}{% endif %}"


@pytest.fixture
def template(tmp_path):
    "A file with the tiny agent's template behind a line with a date that is given to it."
    from cbnb.step.models import load_tokenizer

    path = tmp_path / "mine.jinja"
    path.write_text(TEMPLATE + load_tokenizer("tinyagent").chat_template)
    return path


@pytest.mark.slow
def test_a_run_keeps_its_template(tmp_path, template):
    """Masks, prompts and card go by the given template and variables, and so does the run that goes on after
    the file has changed."""
    from cbnb.step.models import load_tokenizer

    given = few(
        tmp_path,
        total_steps=2,
        chat_template=template,
        template_variables="date_string=26 Jul 2024",
        run_dir=tmp_path / "run",
    )
    done = cells(*given)
    assert done.returncode == 0, done.stdout[-3000:]
    source, kept = template.read_text(), load(tmp_path / "run" / "chat_template.json")
    assert (
        (tmp_path / "run" / "chat_template.jinja").read_text()
        == source
        == (tmp_path / "run" / "adapter" / "chat_template.jinja").read_text()
    )
    assert kept["template_variables"] == {"date_string": "26 Jul 2024"}
    assert '`date_string="26 Jul 2024"`' in (tmp_path / "run" / "adapter" / "README.md").read_text()
    assert "Jul" in done.stdout, "the mask table of the first transcript"
    status = tmp_path / "run" / "status.json"
    status.write_text(json.dumps(load(status) | {"state": "interrupted"}))
    template.write_text(load_tokenizer("tinyagent").chat_template)
    again = cells(*given)
    assert again.returncode == 0 and "mine.jinja has changed since the run began" in again.stdout, (
        again.stdout[-3000:]
    )
    other = cells(*given, "-p", "template_variables", "date_string=27 Jul 2024")
    assert other.returncode != 0 and "was started with other parameters" in other.stdout


def test_every_command_makes_the_same_masks(tmp_path, template):
    """cbnb masks, train's parameters and the explorer give one text; a variable that the template never reads
    and a broken one are refused, each in a sentence."""
    from cbnb.run.settings import make_masker
    from cbnb.transcripts.reader import write_transcripts
    from cbnb.transcripts.tinyworld import make_transcripts
    from cbnb.widgets.masks import mask_explorer

    write_transcripts(tmp_path / "data.jsonl", transcripts := make_transcripts("plain", 2))
    variables = 'date_string="26 Jul, 2024"'
    masker, _ = make_masker("tinyagent", chat_template=str(template), template_variables=variables)
    (encoding,) = masker.encode_batch(transcripts[:1])
    assert encoding.text.startswith("Today: 26 Jul, 2024\n")
    shown = mask_explorer(transcripts, chat_template=str(template), template_variables=variables)
    assert shown.exploration.encoding.text == encoding.text
    flags = ("masks", tmp_path / "data.jsonl", "--model", "tinyagent", "--chat-template", template)
    said = cbnb(*flags, "--template-variables", variables, runs=tmp_path)
    assert said.returncode == 0 and "26 Jul, 2024" in said.stdout.replace("·", " ").replace("␣", " "), (
        said.stdout[:2000]
    )
    for wrong, words in (
        ("today=1", "the chat template never reads 'today'"),
        ("date_string", "wants name=value"),
        ("date_string=", "has no value"),
    ):
        refused = cbnb(*flags, "--template-variables", wrong, runs=tmp_path)
        assert refused.returncode == 2 and words in refused.stdout and "Traceback" not in refused.stdout, (
            refused.stdout
        )
    assert "would do nothing" in cbnb(*flags, "--truncation", "left", runs=tmp_path).stdout


def test_a_sweep_keys_the_template_by_its_content(tmp_path, template):
    spec = tmp_path / "s.yaml"
    spec.write_text(
        json.dumps(
            {
                "parameters": little_data(tmp_path)
                | {"chat_template": str(template), "template_variables": "date_string=now"}
            }
        )
    )
    first = cbnb("ablate", spec, "--dry-run", "--local", 1, runs=tmp_path).stdout
    template.write_text(template.read_text() + " ")
    second = cbnb("ablate", spec, "--dry-run", "--local", 1, runs=tmp_path).stdout
    assert "1 to start" in first and first.splitlines()[0] != second.splitlines()[0]
    spec.write_text(json.dumps({"parameters": {"chat_template": "/no/such.jinja"}}))
    assert "cannot be read" in cbnb("ablate", spec, "--dry-run", "--local", 1, runs=tmp_path).stdout


@pytest.mark.parametrize("notebook", ["train", "preflight"])
def test_what_a_teacher_cache_cannot_hold_is_refused_before_anything_is_loaded(tmp_path, notebook):
    for name, value, words in (
        ("retain_layers", "all", "would put every block's output into the teacher_cache"),
        ("fsdp", True, "with fsdp none has all the weights"),
    ):
        # one process has nobody to share with: refused for that
        if (notebook, name) == ("train", "fsdp"):
            continue
        done = cells(
            "-p",
            "teacher_cache",
            tmp_path / "cache",
            "-p",
            name,
            value,
            runs=tmp_path / "runs",
            notebook=NBS / f"{notebook}.ipynb",
        )
        assert done.returncode == 1 and words in done.stdout.strip().splitlines()[-1], done.stdout[-2000:]
        assert not (tmp_path / "runs").exists() and not (tmp_path / "cache").exists()


def test_an_unknown_preset_is_told_whatever_the_model():
    for more in ({}, {"model": "smollm2"}):
        with pytest.raises(ConfigError, match="unknown preset 'tinyagnt' .did you mean 'tinyagent'"):
            run_settings({"preset": "tinyagnt", **more})
