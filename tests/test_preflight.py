"""The pre-flight page, executed as it stands, on set-ups that were sabotaged one by one; and what refuses a
run for it: papermill, the command, the batch script."""

import json
import os
import re
import shutil
import subprocess
from dataclasses import replace
from functools import partial

import pytest

from helpers import BIN, NBS, ROOT, code_cells, quick_bfloat16
from train_common import few, load

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' ~ m.role ~ '\n' ~ (m.content or '') }}{% for c in "
    "m.tool_calls or () %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# a control token of this tokenizer, and not where the model stops
WRONG = CHATML.replace("<|im_end|>", "<|end_header_id|>")
# as published for slurm/tests/train_kl, with the retain weight of the larger presets
DEAD = {"total_steps": 50, "warmup_steps": 20, "retain_weight": 1.0}


@pytest.fixture(autouse=True, scope="module")
def quick():
    with quick_bfloat16():
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    "Transcripts to train on and held-out ones, a few of each kind: parameters of the page."
    from cbnb.transcripts.reader import write_transcripts
    from cbnb.transcripts.tinyworld import TASK_KINDS, make_transcripts

    folder = tmp_path_factory.mktemp("data")
    write_transcripts(
        folder / "train.jsonl",
        [
            t
            for kind in TASK_KINDS
            if kind != "general"
            for t in make_transcripts(kind, 48 if kind == "injection" else 16)
        ],
    )
    write_transcripts(
        folder / "plain.jsonl", make_transcripts("injection", 48) + make_transcripts("plain", 48)
    )
    write_transcripts(
        folder / "eval.jsonl", [t for kind in TASK_KINDS for t in make_transcripts(kind, 4, "eval")]
    )
    return folder


def other_model(folder, template=None, **settings):
    """A copy of the tiny agent in `folder` with other settings in its config.json, or another chat template;
    returns its path."""
    from cbnb.basics.places import TINYAGENT

    shutil.copytree(TINYAGENT, folder)
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | settings))
    if template:
        (folder / "chat_template.jinja").write_text(template)
    return str(folder)


def review(folder, world, only=None, **parameters):
    """Executes the cells of preflight.ipynb here, by default with the preset of the published method and with
    `parameters`; returns preflight.json and the message of the refusal, if any. With `only`, that check alone
    is made, and of the cells behind it the last is executed, which refuses."""
    from cbnb.preflight.checks import Page, PreflightFailed

    def alone(page, name, *arguments):
        return Page.check(page, name, *arguments) if name == only else None

    given = {
        "preset": "tinyagent",
        "data": str(world / "train.jsonl"),
        "eval_data": str(world / "eval.jsonl"),
        "batch_size": 4,
        "run_dir": str(folder),
    } | parameters
    namespace, refused = {"__name__": "preflight"}, ""
    try:
        *cells, last = code_cells(NBS / "preflight.ipynb")
        # the last cell: an earlier one makes the check where something else has failed
        made = re.compile(rf'page\.check\(\s*"{only}"')
        stop = max((i for i, c in enumerate(cells) if made.search(c.source)), default=len(cells))
        for cell in [*cells[: stop + 1], last]:
            exec(compile(cell.source, "preflight.ipynb", "exec"), namespace)
            if only and "page" in namespace:
                namespace["page"].check = partial(alone, namespace["page"])
            if "parameters" in cell.metadata.get("tags", ()):
                namespace |= given
    except PreflightFailed as e:
        refused = str(e)
    return load(folder / "preflight.json"), refused


# --- what is done to a set-up: (the check that must fail, words of its point, what is patched or given) ---


def kl_reversed(patch, **_):
    import cbnb.train.breaker
    from cbnb.step.fused_kl import token_linear_kl

    patch.setattr(
        cbnb.train.breaker,
        "head_kl",
        lambda ours, theirs, head, teacher_logits, temperature, fused: token_linear_kl(
            ours, theirs, head.layer.weight, temperature, reverse=True
        ),
    )


def teacher_in_training_mode(patch, folder, **_):
    from torch import nn

    from cbnb.train.breaker import CircuitBreaker

    patch.setattr(CircuitBreaker, "train", nn.Module.train)  # without the guard that keeps it in eval mode
    return {"teacher": other_model(folder / "teacher", attention_dropout=0.1)}


def teacher_trainable(patch, folder, **_):
    from cbnb.train.breaker import CircuitBreaker

    made = CircuitBreaker.__init__

    def init(self, student, config, teacher=None, **more):
        made(self, student, config, teacher, **more)
        if teacher is not None:
            teacher.requires_grad_(True)

    patch.setattr(CircuitBreaker, "__init__", init)
    return {"teacher": other_model(folder / "teacher")}


def base_trainable(patch, **_):
    import cbnb.step.models

    made = cbnb.step.models.add_adapter

    def add_adapter(model, config):
        student = made(model, config)
        student.get_base_model().lm_head.weight.requires_grad_(True)
        return student

    patch.setattr(cbnb.step.models, "add_adapter", add_adapter)


def masks_by(change):
    def sabotage(patch, **_):
        import cbnb.masking.targets

        right = cbnb.masking.targets.training_mask
        patch.setattr(
            cbnb.masking.targets,
            "training_mask",
            lambda encoding, transcript, policy: change(encoding, right(encoding, transcript, policy)),
        )

    return sabotage


def first_header(encoding, mask):
    from cbnb.masking.policies import loss_mask

    return loss_mask(encoding, "first_header")


def mask_on_padding(patch, **_):
    import cbnb.data.streams

    right = cbnb.data.streams.pad_rows

    def pad_rows(samples, pad_id, side="right"):
        rows = right(samples, pad_id, side)
        return rows | {"loss_mask": rows["loss_mask"] | (rows["attention_mask"] == 0)}

    patch.setattr(cbnb.data.streams, "pad_rows", pad_rows)


def harmful_rows_in_the_kl(patch, **_):
    from cbnb.train.breaker import CircuitBreaker

    right = CircuitBreaker.forward

    def forward(self, harmful, benign, denominators):
        terms = right(self, harmful, benign, denominators)
        return terms | {
            "loss_kl": (terms["loss_kl"] + right(self, benign, harmful, denominators)["loss_kl"]) / 2
        }

    patch.setattr(CircuitBreaker, "forward", forward)


def unshifted_mask(patch, **_):
    import cbnb.data.streams

    patch.setattr(cbnb.data.streams, "predicting_positions", lambda loss_mask: loss_mask)


def double_bos(patch, folder, **_):
    from cbnb.step.models import load_tokenizer

    return {
        "model": other_model(folder / "model", "{{ bos_token }}" + load_tokenizer("tinyagent").chat_template)
    }


def wrong_template(source):
    def sabotage(folder, **_):
        return {"model": other_model(folder / "model", source)}

    return sabotage


def adapter_not_applied(patch, **_):
    import cbnb.step.models

    made = cbnb.step.models.add_adapter

    def add_adapter(model, config):
        student = made(model, config)
        student.base_model.disable_adapter_layers()
        for name, p in student.named_parameters():
            p.requires_grad_("lora_" in name)
        return student

    patch.setattr(cbnb.step.models, "add_adapter", add_adapter)


def samples_shuffled(patch, **_):
    "Each mask on another sample's ids: both are right by themselves."
    import cbnb.train.store

    right = cbnb.train.store.encode_stream

    def encode_stream(*arguments, **more):
        samples, report = right(*arguments, **more)
        pairs = zip(samples, samples[1:] + samples[:1])
        return [
            replace(s, loss_mask=t.loss_mask) for s, t in pairs if len(s.loss_mask) == len(t.loss_mask)
        ] or samples, report

    patch.setattr(cbnb.train.store, "encode_stream", encode_stream)


def given(**parameters):
    return lambda data, **_: {k: str(data / v) if k == "data" else v for k, v in parameters.items()}


SABOTAGE = {
    "KL reversed": ("direction", "it is the reverse KL", kl_reversed),
    "teacher in training mode with dropout": (
        "detachment",
        "it is not in eval mode",
        teacher_in_training_mode,
    ),
    "teacher parameters trainable": (
        "detachment",
        "parameters beside the adapter would be trained",
        teacher_trainable,
    ),
    "base parameters trainable": (
        "detachment",
        "parameters beside the adapter would be trained, the first is "
        "student.base_model.model.lm_head.weight",
        base_trainable,
    ),
    "mask from the first header": ("masks", "trains_header", masks_by(first_header)),
    "mask all zero": ("masks", "could not be made", masks_by(lambda encoding, mask: mask & False)),
    "mask on padding": ("masks", "padding is in the loss mask", mask_on_padding),
    "masks of other samples": ("masks", "masks are not what assistant_only says", samples_shuffled),
    "harmful rows in the KL": (
        "masks",
        "the gradient of the KL reaches harmful rows",
        harmful_rows_in_the_kl,
    ),
    "double BOS": ("masks", "begin with two BOS tokens", double_bos),
    "unshifted mask": ("masks", "is the mask shifted by one", unshifted_mask),
    "wrong chat template": (
        "masks",
        "this is not the chat template that the model was trained on",
        wrong_template(WRONG),
    ),
    "template of another tokenizer": (
        "masks",
        "'<|im_end|>', which is no control token of this tokenizer",
        wrong_template(CHATML),
    ),
    "adapter not applied": ("detachment", "it is not applied there", adapter_not_applied),
    "retain weight 1": ("alive", "a dead run", given(retain_weight=1.0)),
    "learning rate 100 times too high": ("alive", "lower learning_rate", given(learning_rate=0.1)),
    "benign set of one kind only": ("coverage", "no hard_negative, no sensitive", given(data="plain.jsonl")),
}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
@pytest.mark.parametrize("name", SABOTAGE)
def test_sabotage_is_caught_by_its_check(name, dtype, data, tmp_path, monkeypatch, capsys):
    check, words, sabotage = SABOTAGE[name]
    few_rows = {"batch_size": 2} if dtype == "bfloat16" else {}  # which a CPU is slow in
    parameters = sabotage(patch=monkeypatch, folder=tmp_path, data=data) or {}
    record, refused = review(tmp_path / "run", data, only=check, dtype=dtype, **few_rows, **parameters)
    found = next(c for c in record["checks"] if c["name"] == check)
    failed = " · ".join(p["text"] for p in found["points"] if p["verdict"] == "fail")
    assert record["verdict"] == found["verdict"] == "fail" and words in failed, failed
    assert check in refused


@pytest.mark.slow
def test_masks_that_are_wrong_are_told_beside_what_becomes_of_twins(data, tmp_path, monkeypatch):
    masks_by(first_header)(patch=monkeypatch)
    record, refused = review(tmp_path / "run", data, preset="tinyagent-adv")
    (masks,) = record["checks"]
    failed = " · ".join(p["text"] for p in masks["points"] if p["verdict"] == "fail")
    assert masks["name"] == "masks" and "masks (" in refused
    assert "trains_header" in failed and "not one of 48 harmful transcripts" in failed


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
@pytest.mark.parametrize("preset", ("tinyagent", "tinyagent-adv"))
def test_the_untouched_setup_has_no_fail(preset, dtype, data, tmp_path, capsys):
    record, refused = review(tmp_path / "run", data, preset=preset, dtype=dtype)
    assert not refused and [c["name"] for c in record["checks"]] == [
        "direction",
        "detachment",
        "masks",
        "weights",
        "alive",
        "coverage",
        "means",
    ]
    assert {c["name"]: c["verdict"] for c in record["checks"]} == dict.fromkeys(
        ("direction", "detachment", "masks", "weights", "alive", "means"), "pass"
    ) | {"coverage": "warn"}
    assert "pre-flight: warn" in capsys.readouterr().out
    detachment = next(c for c in record["checks"] if c["name"] == "detachment")
    floor = detachment["figures"]["floor"]
    assert (
        floor["dtype"] == dtype
        and (floor["reroute"] > 1e-6) == (dtype == "bfloat16")
        and "the floor of " + dtype in detachment["points"][-1]["text"]
    )


@pytest.mark.slow
def test_a_separate_teacher_and_a_control_and_encoded_transcripts_have_no_fail(data, tmp_path, capsys):
    record, refused = review(
        tmp_path / "run",
        data,
        teacher=other_model(tmp_path / "teacher"),
        beta_kl=0.0,
        hidden_state_mode="hooks",
        encoded_cache=str(tmp_path / "encoded"),
    )
    assert not refused and record["verdict"] == "warn", refused


def test_the_page_takes_every_parameter_of_a_run():
    from cbnb.sweep.spec import notebook_parameters

    train, page = (notebook_parameters(NBS / f"{name}.ipynb") for name in ("train", "preflight"))
    assert {k: v for k, v in page.items() if k not in ("probe_steps", "run_dir")} == {
        k: v for k, v in train.items() if k != "run_dir"
    }


# --- what refuses ---


def called(*command, **env):
    "A command of a user in the project's folder, without a SLURM; returns the finished process."
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "SBATCH"))} | {
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "MODEL": "tinyagent",
    }
    return subprocess.run(
        [*map(str, command)],
        cwd=ROOT,
        env=clean | {k: str(v) for k, v in env.items()},
        text=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


@pytest.mark.slow
def test_the_batch_script_refuses_a_dead_run_and_its_alarm_goes_off_all_the_same(tmp_path):
    """The dead published setting: refused with a proposal; with SKIP_PREFLIGHT=1 it is made, ends with the
    alarm, and claims nothing."""
    run, given = tmp_path / "run", few(tmp_path, **DEAD, diagnose_steps=10, max_new_tokens=40)
    done = called("bash", "slurm/05_train.sbatch", *given, RUN_DIR=run)
    status = load(run / "status.json")
    assert (
        done.returncode != 0 and "refused by the pre-flight" in done.stdout and status["state"] == "failed"
    ), done.stdout[-3000:]
    assert (
        "a dead run" in status["error"]
        and "change retain_weight" in status["error"]
        and (run / "preflight.ipynb").exists()
        and not (run / "params.json").exists()
    )
    done = called("bash", "slurm/05_train.sbatch", *given, RUN_DIR=run, SKIP_PREFLIGHT=1)
    assert done.returncode == 0, done.stdout[-3000:]
    result, status = load(run / "result.json"), load(run / "status.json")
    (alarm,) = result["alarms"]
    assert (
        (alarm["alarm"], alarm["step"], alarm["last_step"]) == ("dead", 25, 50)
        and status["alarms"] == result["alarms"]
        and "ALARM dead" in done.stdout
    )
    assert result["before"]["attack_success"] == result["after"]["attack_success"] == 1.0
    for told in (
        (run / "report.html").read_text(),
        (run / "out.1.ipynb").read_text(),
        called(BIN / "cbnb", "status", run).stdout,
    ):
        assert "dead" in told


@pytest.mark.slow
def test_the_command_passes_a_run_that_the_batch_script_then_makes(tmp_path):
    "`cbnb preflight` in the folder of the run: what has passed there is not looked at again."
    run, given = (
        tmp_path / "run",
        few(tmp_path, total_steps=16, warmup_steps=2, batch_size=4, retain_weight=1e-4),
    )
    flags = [
        f"--{word.replace('_', '-')}" if given[i - 1] == "-p" else word
        for i, word in enumerate(given)
        if word != "-p"
    ]
    done = called(BIN / "cbnb", "preflight", *flags, "--run-dir", run)
    assert done.returncode == 0 and "✓ pass  alive" in done.stdout and "pre-flight: warn" in done.stdout, (
        done.stdout[-3000:]
    )
    record = load(run / "preflight.json")
    assert (
        record["verdict"] == "warn"
        and record["parameters"]["retain_weight"] == 1e-4
        and record["settings"]["total_steps"] == 16
    )
    done = called("bash", "slurm/05_train.sbatch", *given, RUN_DIR=run)
    assert (
        done.returncode == 0
        and load(run / "status.json")["state"] == "done"
        and "pre-flight" not in done.stdout
    ), done.stdout[-3000:]
    assert load(run / "result.json")["parameters"]["retain_weight"] == 1e-4
    assert called(BIN / "cbnb", "preflight", "--retain-weight", "much").returncode == 2
