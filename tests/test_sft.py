"""The agent stage, whole: `cbnb sft` and papermill on nbs/agent.ipynb as a user calls them, stopped and
resumed, with what it refuses; and a few steps on a pretrained model."""

import json
import re
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from dataclasses import replace

import pytest
import torch

from cbnb.basics.jsonfiles import RunError
from cbnb.cli import main
from cbnb.config import NOTEBOOK_PARAMETERS, ConfigError
from cbnb.data.streams import encode_stream, load_streams
from cbnb.masking.masker import ChatMasker
from cbnb.run.directory import open_run
from cbnb.run.metrics import read_metrics
from cbnb.run.sealed import damage
from cbnb.run.settings import preset_for, settings_of
from cbnb.sft.folder import agent_record, keep_agent, write_merged
from cbnb.sft.settings import agent_config, check_agent, model_place, trained_on
from cbnb.sft.train import train_agent
from cbnb.step.models import add_adapter, load_model, load_tokenizer
from cbnb.transcripts.reader import write_transcripts
from cbnb.transcripts.tinyworld import make_transcripts
from forked import cells
from helpers import NBS
from outside import smollm2_cache
from train_common import load, papermill

DEFAULTS = {name: p.default for name, p in NOTEBOOK_PARAMETERS["agent"].items()}
TINY = {
    "model": "tinyagent",
    "total_steps": 6,
    "batch_size": 2,
    "save_steps": 2,
    "lora_dropout": 0.1,
    "max_new_tokens": 24,
    "eval_questions": 2,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    "A few transcripts of both labels, and held-out ones of a suite that no other is of."
    folder = tmp_path_factory.mktemp("data")
    kinds = ("injection", "plain", "general")
    for name, split in (("train", "train"), ("heldout", "eval")):
        suite = {"suite": {"train": "mail", "heldout": "travel"}[name]}
        rows = [replace(t, meta=t.meta | suite) for kind in kinds for t in make_transcripts(kind, 8, split)]
        write_transcripts(folder / f"{name}.jsonl", rows)
    return {"data": str(folder / "train.jsonl"), "eval_data": str(folder / "heldout.jsonl")}


def words(values):
    return [word for name, value in values.items() for word in (f"--{name.replace('_', '-')}", str(value))]


def sft(tmp_path, monkeypatch, **values):
    "The exit status of `cbnb sft` with these parameters."
    monkeypatch.setenv("CBNB_RUNS", str(tmp_path / "runs"))
    return main(["sft", *words(values)])


def weights(folder):
    return (folder / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    "The run directory of one run that nobody has stopped."
    folder = tmp_path_factory.mktemp("whole") / "agent-run"
    done = papermill(*papermill_words(TINY | data | {"run_dir": folder}), notebook=NBS / "agent.ipynb")
    assert not done.returncode, done.stdout[-4000:]
    return folder


def papermill_words(values):
    return [word for name, value in values.items() for word in ("-p", name, str(value))]


def test_a_run_leaves_a_model_that_stands_where_a_model_can(whole, capsys, monkeypatch):
    model, result = whole / "model", load(whole / "result.json")
    assert not damage(model) and not (whole / "merged").exists()
    assert {"agent.json", "README.md", "config.json", "generation_config.json", "tokenizer.json"} <= {
        path.name for path in model.iterdir()
    }
    assert [row["step"] for row in read_metrics(whole)] == [1, 2, 3, 4, 5, 6]
    for name in ("before", "after"):
        figures = result[name]
        assert set(figures["heldout_ce"]) == {"attack", "plain", "general"} == set(figures["n"])
        assert figures["counts"]["well_formed"].keys() == {"attack", "plain"}
        assert figures["intervals"]["heldout_ce plain"]["transcripts"] == 8
        assert figures["suites"].keys() == {"travel"} and figures["suites"]["travel"]["held_out"]
        assert figures["suites"]["travel"]["attack_success"] == figures["counts"]["attack_success"]
    assert "heldout_kl" not in result["before"] and result["after"]["heldout_kl"]["general"] > 0
    kinds = result["after"]["heldout_tokens"]
    assert kinds["in_domain"]["call_value"]["transcripts"] == 8 and "text" in kinds["off_domain"]
    own = result["after"]["intervals"]["heldout_kl general"]
    assert own["interval"] == kinds["off_domain"]["all"]["interval"]
    record = load(model / "agent.json")
    assert (
        record["base"] == "tinyagent" and record["after"] == result["after"] and record["run"] == whole.name
    )
    assert set(record["data"]) >= {"harmful", "benign"} and record["data"]["harmful"]["samples"] == 8
    card = (model / "README.md").read_text()
    assert "unsafe by intent" in card and "held-out cross-entropy, general" in card and str(whole) not in card
    assert main(["status", str(whole)]) == 0 and "done" in capsys.readouterr().out
    assert preset_for("tinyagent", str(model)) == "tinyagent"
    monkeypatch.setattr(sys, "stdin", open("/dev/null"))
    rows = str(whole.parent / "x.jsonl")
    write_transcripts(rows, make_transcripts("plain", 2))
    assert main(["masks", rows, "--model", str(model), "--show", "0"]) == 0


def test_a_run_leaves_a_report(whole):
    """Figures with counts and intervals, the curve, settings, KL by kind of token, suites and answers: all
    texts of the page, with nothing that a table could not show."""
    page = (whole / "report.html").read_text()
    ET.fromstring(page.replace("<!DOCTYPE html>", ""))
    texts = [text.strip() for text in re.sub("<[^>]*>", "\n", page).split("\n")]
    assert {"KL by kind of token, after, off domain", "argument values", "travel, held out"} <= {*texts}
    assert {"Some answers", "Training curves", "cross-entropy, nats per token", "lora_layers"} <= {*texts}
    assert {"well-formed calls, attack", "attack success, before"} <= {*texts} and "[0, 3]" in texts
    assert not {"None", "null", "nan", "[]"} & {*texts} and "reroute" not in page
    assert "The fine-tuned model: model/ in this run directory. Its card is README.md there." in texts
    assert 'href="answers.html"' in page and "injection-eval" in (whole / "answers.html").read_text()
    card = (whole / "model" / "README.md").read_text()
    assert "| travel, held out |" in card and "| argument values |" in card


def test_a_run_that_is_stopped_goes_on_to_the_same_bits(data, whole, tmp_path):
    "SIGTERM to papermill's kernel by the file stop; then the same command again."
    folder, given = tmp_path / "agent-run", TINY | data
    command = [sys.executable, "-m", "papermill", str(NBS / "agent.ipynb")]
    command += papermill_words(given | {"run_dir": folder})
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    end = time.monotonic() + 300
    while not (folder / "metrics.jsonl").exists() or not read_metrics(folder):
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.02)
    (folder / "stop").touch()
    assert process.wait(300)
    status = load(folder / "status.json")
    assert status["state"] == "interrupted" and not (folder / "model").exists()
    (folder / "merged").mkdir()  # as a killed attempt leaves it
    (folder / "merged" / "x").write_text("half")
    done = cells(*papermill_words(given | {"run_dir": folder}), notebook=NBS / "agent.ipynb")
    assert not done.returncode, done.stdout[-4000:]
    assert load(folder / "status.json")["attempt"] == 2
    assert read_metrics(folder) == read_metrics(whole)
    assert weights(folder / "model") == weights(whole / "model")
    assert load(folder / "result.json")["after"] == load(whole / "result.json")["after"]


def test_benign_alone_and_a_place_of_its_own(data, whole, tmp_path, monkeypatch, capsys):
    out, folder = tmp_path / "made" / "agent", tmp_path / "r"
    given = TINY | data | {"labels": "benign", "out": out, "total_steps": 2, "run_dir": folder}
    assert sft(tmp_path, monkeypatch, **given) == 0
    said = capsys.readouterr()
    assert f"the model: {out}" in said.out and "well-formed calls, plain" in said.out
    assert said.out.rstrip().split("\n")[-1] == f"report: {folder / 'report.html'}"
    assert f"The fine-tuned model: {out}." in (folder / "report.html").read_text()
    record = load(out / "agent.json")
    assert "harmful" not in record["data"] and record["labels"] == "benign"
    assert "unsafe by intent" not in (out / "README.md").read_text()
    assert record["after"]["n"]["attack"] == 2, "attacks are asked all the same"
    assert weights(out) != weights(whole / "model")
    assert sft(tmp_path, monkeypatch, **TINY | data | {"out": out}) == 2
    assert "is there already, and is not replaced" in capsys.readouterr().err
    before = weights(out)
    status = load(folder / "status.json")  # as after a crash behind the model's folder
    (folder / "status.json").write_text(json.dumps(status | {"state": "failed"}))
    (folder / "result.json").unlink()
    assert sft(tmp_path, monkeypatch, **given) == 0 and weights(out) == before, "it goes on to its own"
    capsys.readouterr()
    shutil.rmtree(folder)
    assert sft(tmp_path, monkeypatch, **given | {"total_steps": 3}) == 2, "another run of the same name"
    assert "is there already, and is not replaced" in capsys.readouterr().err and weights(out) == before


def test_benign_transcripts_alone_are_enough_where_they_alone_are_trained_on(tmp_path, monkeypatch):
    rows = str(tmp_path / "benign.jsonl")
    write_transcripts(rows, [t for kind in ("plain", "general") for t in make_transcripts(kind, 10)])
    given = {"data": rows, "labels": "benign", "out": tmp_path / "agent", "total_steps": 2}
    assert sft(tmp_path, monkeypatch, **TINY | given) == 0
    after = load(tmp_path / "agent" / "agent.json")["after"]
    assert set(after["heldout_ce"]) <= {"plain", "general"} and after["heldout_ce"]


@pytest.mark.parametrize(
    "wrong, said",
    [
        ({"data": "nowhere.jsonl"}, "nowhere.jsonl"),
        ({"total_steps": 3, "warmup_steps": 3}, "warmup_steps must be below total_steps"),
        ({"labels": "bad"}, "labels"),
        ({"eval_questions": 0}, "eval_questions must be at least 1"),
        ({"lora_layers": "0,9"}, "lora_layers"),
        ({"learning_rate": 0}, "learning_rate must be above 0"),
        ({"model": "/no/such/folder"}, "/no/such/folder"),
    ],
)
def test_what_cannot_be_is_one_sentence_before_anything_is_started(
    wrong, said, tmp_path, monkeypatch, capsys
):
    assert sft(tmp_path, monkeypatch, **{"model": "tinyagent"} | wrong) == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1 and not (tmp_path / "runs").exists(), err


def test_several_processes_are_refused():
    with pytest.raises(ConfigError, match="the work of one process"):
        check_agent(DEFAULTS | {"model": "tinyagent"}, 2)


def test_data_of_which_nothing_can_be_learnt(data, tmp_path):
    write_transcripts(tmp_path / "h.jsonl", make_transcripts("injection", 4))
    harmful, benign, *_ = load_streams([str(tmp_path / "h.jsonl")], [data["eval_data"]], labels=("benign",))
    with pytest.raises(ConfigError, match="its transcripts are all harmful, and labels is benign"):
        trained_on(harmful, benign, "benign")


def test_a_place_that_cannot_be_made(tmp_path):
    with pytest.raises(RunError, match="cannot be made"):
        model_place("/proc/x/y", open_run({}, run_dir=tmp_path / "run"))


def test_a_template_that_writes_no_calls(data, tmp_path):
    "A run that begins and cannot go on says why in its status, and makes no model."
    turn = "<|start_header_id|>{}<|end_header_id|>\n\n"
    template = (
        f"{{% for m in messages %}}{turn.format('{{ m.role }}')}{{{{ m.content }}}}<|eot_id|>{{% endfor %}}"
    )
    template += f"{{% if add_generation_prompt %}}{turn.format('assistant')}{{% endif %}}"
    (tmp_path / "t.jinja").write_text(template)
    folder = tmp_path / "run"
    given = TINY | data | {"chat_template": tmp_path / "t.jinja", "run_dir": folder}
    done = cells(*papermill_words(given), notebook=NBS / "agent.ipynb")
    assert done.returncode and not (folder / "model").exists()
    assert "tool call" in load(folder / "status.json")["error"]


def test_a_folder_of_a_presets_shape_has_that_preset(tmp_path):
    for name, preset in (("smollm2", "smollm2"), ("tinyagent", "tinyagent-adv")):
        shape = {"smollm2": ("llama", 30, 576), "tinyagent": ("llama", 4, 128)}[name]
        folder = tmp_path / name
        folder.mkdir()
        keys = ("model_type", "num_hidden_layers", "hidden_size")
        (folder / "config.json").write_text(json.dumps(dict(zip(keys, shape))))
        assert preset_for("tinyagent-adv", str(folder)) == preset
        config, notes = settings_of("tinyagent-adv", {"model": str(folder)})
        assert config.model == str(folder) and not any("no preset is for" in note for note in notes)
    assert settings_of("tinyagent-adv", {"model": str(tmp_path / "smollm2")})[0].retain_weight == 5e-4


@pytest.mark.slow
def test_a_few_steps_on_a_pretrained_model(monkeypatch, tmp_path):
    "They lower the loss of the rows that they are taken on, and the folder answers as the adapter does."
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(smollm2_cache()))
    short = {"total_steps": 4, "warmup_steps": 1, "batch_size": 2, "gradient_accumulation_steps": 1}
    config = agent_config(DEFAULTS | short | {"model": "smollm2", "save_steps": 0})
    assert config.lora_layers == (0, 29) and config.dtype == "float32"
    masker = ChatMasker(load_tokenizer("smollm2"))
    some = [replace(t, tools=t.tools[:1]) for t in make_transcripts("plain", 2)]
    samples, _ = encode_stream(some, masker, "assistant_only")
    student, run = add_adapter(load_model("smollm2"), config), open_run({}, run_dir=tmp_path / "run")
    assert train_agent(student, samples, config, run, masker.tokenizer.pad_token_id)
    rows = read_metrics(run.path)
    assert len(rows) == 4 and rows[-1]["loss_ce"] < rows[0]["loss_ce"] / 2
    merged, kl = write_merged(student, masker, config, False, samples, tmp_path / "merged")
    assert 0 <= kl < 0.02
    counts = {"benign": {"samples": 2, "targets": 9}, "notes": []}
    result = {"before": {}, "after": {}, "merge_kl": kl, "data": counts}
    record = agent_record(config, DEFAULTS, result, "00", run)
    folder = keep_agent(tmp_path / "merged", tmp_path / "agent", record)
    again = load_model(str(folder), "bfloat16")
    assert again.dtype == torch.bfloat16 and load(folder / "config.json")["dtype"] == "bfloat16"
    assert (folder / "chat_template_original.jinja").exists() and preset_for(
        "tinyagent", str(folder)
    ) == "smollm2"
    tools = some[0].tools
    own, base = (
        load_tokenizer(name).apply_chat_template(some[0].messages, tools=tools, tokenize=False)
        for name in (str(folder), "smollm2")
    )
    assert own == base
