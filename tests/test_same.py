"""A run that goes on is the same run: what it was made from is changed under it, in every part, and so is its
log. A short run of a copy of the tiny agent, finished and then taken back to its checkpoint of step 2."""

import json
import os
import shutil

import pytest

from cbnb.basics.jsonfiles import RunError, write_json
from cbnb.basics.places import TINYAGENT
from cbnb.evaluate.adapters import find_adapters, questions_for
from cbnb.report.verdicts import read_run
from cbnb.run.sealed import MANIFEST, seal
from cbnb.run.stages import Run, read_status
from cbnb.run.status import run_rows
from cbnb.train.same import MADE_FROM, made_from, transcripts_hash
from cbnb.train.trainer import resume_point
from cbnb.transcripts.reader import write_transcripts
from cbnb.transcripts.tinyworld import make_transcripts
from forked import cells
from helpers import NBS
from train_common import few, load


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with the `run` and what it was made from: `data.jsonl`, `eval_data.jsonl`, `tools.json`,
    `model`."""
    folder = tmp_path_factory.mktemp("world")
    shutil.copytree(TINYAGENT, folder / "model")
    (folder / "tools.json").write_text(json.dumps(make_transcripts("injection", 1)[0].tools))
    given = few(folder, save_steps=2, model=folder / "model", tools=folder / "tools.json")
    done = cells(*given, "-p", "run_dir", folder / "run")
    assert done.returncode == 0, done.stdout[-4000:]
    status = read_status(folder / "run")
    assert "changes" not in status and "changes" not in load(folder / "run" / "result.json")
    (folder / "given").write_text(json.dumps(given, default=str))
    return folder


@pytest.fixture
def broken_off(world, tmp_path):
    "The world with its run as it was after step 2 of 4, put back after the test."
    kept = shutil.copytree(world, tmp_path / "kept")
    run = world / "run"
    shutil.rmtree(run / "checkpoints" / "checkpoint-4")
    for name in ("result.json", "report.html"):
        (run / name).unlink()
    shutil.rmtree(run / "adapter")
    write_json(run / "status.json", read_status(run) | {"state": "interrupted", "error": "stopped"})
    yield world
    shutil.rmtree(world)
    shutil.copytree(kept, world)


def again(world, status=0):
    "Goes on with the run; returns what it printed."
    done = cells(*json.loads((world / "given").read_text()), "-p", "run_dir", world / "run")
    assert (done.returncode == 0) == (status == 0), done.stdout[-4000:]
    return done.stdout


def refused(world, part, name):
    """Going on is refused for the `part` and the file `name` in one sentence, kept in status.json, and does
    nothing."""
    files = [world / "run" / name for name in ("metrics.jsonl", MADE_FROM, "config.json")]

    def kept():
        return [file.read_bytes() for file in files]

    before = kept()
    again(world, 1)
    status = read_status(world / "run")
    assert status["state"] == "failed", status
    assert status["error"].startswith(f"RunError: {part} of the run in {world}"), status
    assert name in status["error"] and "put back what was there, or give another run_dir" in status["error"]
    assert kept() == before


def flip(path):
    "Changes the last byte of a file and nothing that `ls -l` shows."
    about, data = path.stat(), path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    os.utime(path, ns=(about.st_atime_ns, about.st_mtime_ns))


@pytest.mark.slow
def test_data_that_were_written_anew_are_refused(broken_off):
    data = broken_off / "data.jsonl"
    good = data.read_text()
    data.write_text(good.replace("the", "The", 1))
    refused(broken_off, "the data", "data.jsonl is another one")
    data.write_text(good)
    for name in ("eval_data.jsonl", "tools.json"):
        old = (broken_off / name).read_text()
        (broken_off / name).write_text(old + "\n")
        refused(broken_off, "the data", f"{name} is another one")
        (broken_off / name).write_text(old)


def test_another_model_under_the_same_path_is_refused(broken_off):
    "Before data are read and anything is loaded, whatever the file's time and size say."

    def add(path):
        path.write_text(path.read_text() + "\n")

    for name, change in (("model.safetensors", flip), ("config.json", add), ("tokenizer.json", add)):
        old = (broken_off / "model" / name).read_bytes()
        change(broken_off / "model" / name)
        refused(broken_off, "the model or its tokenizer", f"{name} is another one")
        (broken_off / "model" / name).write_bytes(old)
    assert read_status(broken_off / "run")["stage"] == "settings"


def test_what_other_code_makes_of_the_same_files_is_refused(broken_off):
    "Other samples; other terms of the same batch. The run says which versions it began with."
    run = broken_off / "run"
    record = made_from(run)
    samples = record["same"]["samples"] | {"benign": "0" * 64}
    write_json(run / MADE_FROM, record | {"same": record["same"] | {"samples": samples}})
    refused(broken_off, "what training and evaluation read of the data", "benign is another one")
    figures = record["figures"]
    names = [f"{kind}_{term}" for kind in ("loss", "grad_norm") for term in ("reroute", "retain", "kl")]
    assert sorted(figures["values"]) == sorted(names)
    values = figures["values"] | {"loss_kl": figures["values"]["loss_kl"] * 1.01}
    made_with = figures["with"] | {"peft": "0.1"}
    write_json(run / MADE_FROM, record | {"figures": {"values": values, "with": made_with}})
    again(broken_off, 1)
    error = read_status(run)["error"]
    assert "makes other figures of the same weights and rows (loss_kl was" in error, error
    assert "peft was 0.1 and is" in error and "give another run_dir" in error, error


def test_a_checkpoint_of_another_run_is_refused(broken_off):
    "Its seal is right, and its adapter fits; it was saved beside another made_from.json."
    checkpoint = broken_off / "run" / "checkpoints" / "checkpoint-2"
    record = made_from(checkpoint)
    assert record == made_from(broken_off / "run") and set(record["same"]) == {"data", "samples", "model"}
    record["same"]["samples"]["harmful"] = "0" * 64
    write_json(checkpoint / MADE_FROM, record)
    (checkpoint / MANIFEST).unlink()
    seal(checkpoint)
    with pytest.raises(RunError, match="read of the data .*harmful is another one"):
        resume_point(Run(broken_off / "run", 2, True))


def test_what_may_change_is_told_and_the_log_is_mended(broken_off):
    "Versions, code and processes are told, a log that was cut or edited is put back; all stays with the run."
    run = broken_off / "run"
    whole = (run / "metrics.jsonl").read_text().splitlines()
    edited = json.dumps(json.loads(whole[1]) | {"loss_kl": 0.25})
    (run / "metrics.jsonl").write_text("\n".join([edited, *whole[2:]]) + "\n")  # step 1 is lost
    record = made_from(run)
    told = record["told"] | {"torch": "1.0.0", "cbnb's code": "other", "processes": "2"}
    values = record["figures"]["values"]
    figures = record["figures"] | {"values": values | {"loss_retain": values["loss_retain"] * 1.0001}}
    write_json(run / MADE_FROM, record | {"told": told, "figures": figures})
    (broken_off / "model" / "README.md").write_text("read by nobody")
    # as a kill leaves it
    with open(run / "metrics.jsonl", "a") as f:
        f.write('{"step": 5}\n{"step": 6, "lo')
    said = again(broken_off)
    changes = read_status(run)["changes"]
    names = [line.split(", and the one before it had")[0].rsplit(" ", 1)[0] for line in changes[:-2]]
    assert names == [f"attempt 2 has {name}" for name in ("torch", "cbnb's code", "processes")]
    words = "attempt 2 makes other figures of the same weights and rows, within rounding (loss_retain was"
    assert changes[-2].startswith(words)
    assert changes[-1] == (
        "metrics.jsonl lacked 1 of its 2 lines (the first: step 1) and differed in 1 lines (the first: "
        "step 2): up to step 2 it was restored from checkpoint-2"
    )
    assert "3 lines of metrics.jsonl of later steps were dropped and are made again; training goes on" in said
    assert (run / "metrics.jsonl").read_text().splitlines() == whole, "to the last bit"
    assert load(run / "result.json")["changes"] == changes
    pages = [
        said,
        run_rows([run])[0]["note"],
        (run / "adapter" / "README.md").read_text(),
        "\n".join(read_run(run, {})[2]),
    ]
    assert all(line in page for line in changes for page in pages)
    assert "and the one before it had 1.0.0" in (run / "report.html").read_text()


def test_lines_that_are_lost_in_the_middle_of_a_finished_log_are_told(world, tmp_path):
    run = shutil.copytree(world / "run", tmp_path / "run")
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    assert len(lines) == 4 and not [note for note in read_run(run, {})[2] if "log lacks" in note]
    (run / "metrics.jsonl").write_text(lines[0] + "".join(lines[2:]))
    words = "its log lacks 1 of the lines that logging_steps asks for, the first at step 2"
    assert words in read_run(run, {})[2]


def evaluate(folder, *given):
    "Evaluates in `folder`; returns the exit status and what was printed."
    done = cells(*given, "-p", "run_dir", folder, notebook=NBS / "evaluate.ipynb")
    return done.returncode, done.stdout


def test_an_evaluation_of_a_run_is_of_what_it_was_made_from(world, tmp_path):
    run = world / "run"
    heldout = transcripts_hash(questions_for(find_adapters(str(run))))
    assert heldout == made_from(run)["same"]["samples"]["held out"], "train and evaluate read one set"
    files = [world / "eval_data.jsonl", world / "model" / "model.safetensors"]
    given = ("-p", "adapter", run, "-p", "eval_data", "")
    kept = {path: path.read_bytes() for path in files}
    write_transcripts(tmp_path / "other.jsonl", make_transcripts("injection", 2, "eval"))
    files[0].write_bytes((tmp_path / "other.jsonl").read_bytes())
    code, said = evaluate(tmp_path / "one", *given)
    assert code != 0 and f"the held-out transcripts of {run} changed since it was made" in said, said[-2000:]
    flip(files[1])
    given = ("-p", "adapter", run, "-p", "eval_data", files[0])
    code, said = evaluate(tmp_path / "two", *given)
    assert code != 0 and f"the model of {run} changed since it was trained on" in said, said[-2000:]
    assert "model.safetensors is another one" in said
    code, said = evaluate(
        tmp_path / "three", *given, "-p", "model", world / "model", "-p", "max_new_tokens", 2
    )
    assert code == 0, said[-2000:]
    for path, data in kept.items():
        path.write_bytes(data)


def test_an_evaluation_that_goes_on_is_the_same(world, tmp_path):
    folder, data = tmp_path / "evaluation", tmp_path / "eval.jsonl"
    shutil.copy(world / "eval_data.jsonl", data)
    shutil.copytree(world / "run" / "adapter", tmp_path / "adapter")
    model = shutil.copytree(TINYAGENT, tmp_path / "model")
    given = (
        "-p",
        "adapter",
        tmp_path / "adapter",
        "-p",
        "model",
        model,
        "-p",
        "eval_data",
        data,
        "-p",
        "max_new_tokens",
        2,
    )
    code, said = evaluate(folder, *given)
    assert code == 0, said[-2000:]
    assert set(made_from(folder)["same"]) == {"data", "samples", "template", "model", "adapter"}
    (folder / "result.json").unlink()
    write_json(folder / "status.json", read_status(folder) | {"state": "interrupted"})
    flip(tmp_path / "adapter" / "adapter_model.safetensors")
    code, said = evaluate(folder, *given)
    assert code != 0 and "the adapter of the run" in said, said[-2000:]
    assert "adapter_model.safetensors is another one" in said
    flip(tmp_path / "adapter" / "adapter_model.safetensors")
    template = (model / "chat_template.jinja").read_text()
    (model / "chat_template.jinja").write_text(template + "{# #}")
    code, said = evaluate(folder, *given)
    assert code != 0 and "the chat template of the run" in said, said[-2000:]
    (model / "chat_template.jinja").write_text(template)
    data.write_text(data.read_text() + "\n")
    code, said = evaluate(folder, *given)
    assert code != 0 and "the data of the run" in said and "eval.jsonl is another one" in said, said[-2000:]
