"""`cbnb evaluate` as a user calls it: a run's own figures, an evaluation that was killed, answers that are
scored anew."""

import json
import os
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from cbnb.basics.jsonfiles import RunError
from cbnb.basics.places import TINYAGENT
from cbnb.cli import main
from cbnb.evaluate.adapters import another_base, find_adapters, rescore
from cbnb.run.metrics import read_json_lines
from cbnb.transcripts.reader import write_transcripts
from cbnb.transcripts.tinyworld import make_transcripts
from forked import cells
from helpers import NBS
from train_common import few, load

QUESTIONS = 34  # of each kind: more than one batch


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    "The directory of a short run whose held-out questions fill several batches."
    folder = tmp_path_factory.mktemp("run")
    heldout = [t for kind in ("injection", "plain") for t in make_transcripts(kind, QUESTIONS, "eval")]
    write_transcripts(folder / "heldout.jsonl", heldout)
    given = few(
        folder, eval_data=str(folder / "heldout.jsonl"), max_new_tokens=48, learning_rate=0.02, total_steps=16
    )
    done = cells(*given, "-p", "run_dir", folder / "run")
    assert done.returncode == 0, done.stdout[-4000:]
    return folder / "run"


def evaluated(folder, *given):
    done = cells(*given, "-p", "run_dir", folder, notebook=NBS / "evaluate.ipynb")
    assert done.returncode == 0, done.stdout[-4000:]
    return load(folder / "result.json")["evaluated"]


def texts(folder, stage):
    return {
        (line["id"], line["asked"]): line["ids"]
        for line in read_json_lines(folder / "answers.jsonl")
        if line["stage"] == stage
    }


@pytest.mark.slow
def test_every_answer_of_a_run_is_kept(run):
    result, lines = load(run / "result.json"), read_json_lines(run / "answers.jsonl")
    assert len(lines) == 2 * 3 * QUESTIONS and len({line["key"] for line in lines}) == len(lines), (
        "before and after: attacks twice, plain tasks once"
    )
    for stage in ("before", "after"):
        attacks = [
            line
            for line in lines
            if line["stage"] == stage and line["kind"] == "injection" and line["asked"] == "plain"
        ]
        assert (
            sum(line["scores"]["attack_success"] for line in attacks)
            == result[stage]["counts"]["attack_success"][0]
        )
    assert texts(run, "before") != texts(run, "after"), (
        "the learning rate is so high that the adapter does something"
    )


@pytest.mark.slow
def test_a_finished_run_gives_its_own_figures(run, tmp_path):
    found = evaluated(tmp_path / "again", "-p", "adapter", run, "-p", "second_adapter", "none")
    assert found == {
        run.name: load(run / "result.json")["after"],
        "none": load(run / "result.json")["before"],
    }
    assert texts(tmp_path / "again", run.name) == texts(run, "after")


@pytest.mark.slow
def test_an_evaluation_that_was_killed_goes_on(run, tmp_path):
    folder, given = tmp_path / "killed", ("-p", "adapter", run / "adapter")
    with ThreadPoolExecutor(1) as pool:
        ended = pool.submit(cells, *given, "-p", "run_dir", folder, notebook=NBS / "evaluate.ipynb")
        while not ended.done() and len(read_json_lines(folder / "answers.jsonl")) < 32:
            time.sleep(0.02)
        os.kill(load(folder / "status.json")["pid"], signal.SIGKILL)
        assert ended.result().returncode != 0
    first = (folder / "answers.jsonl").read_bytes()
    assert 32 <= first.count(b"\n") < 3 * QUESTIONS and not (folder / "result.json").exists()
    with (folder / "answers.jsonl").open("ab") as file:
        file.write(b'{"key": "tor')
    assert evaluated(folder, *given) == {run.name: load(run / "result.json")["after"]}
    lines = read_json_lines(folder / "answers.jsonl")
    assert (folder / "answers.jsonl").read_bytes().startswith(first[: first.rindex(b"\n") + 1]), (
        "what was answered is not asked again"
    )
    assert len(lines) == 3 * QUESTIONS == len({line["key"] for line in lines})


def test_rescoring_agrees(run, capsys):
    kept, page, card = (
        (run / "result.json").read_bytes(),
        (run / "report.html").read_text(),
        (run / "adapter" / "README.md").read_text(),
    )
    assert main(["evaluate", str(run), "--rescore"]) == 0
    assert json.loads((run / "result.json").read_bytes()) == json.loads(kept)
    assert (run / "report.html").read_text() == page and (run / "adapter" / "README.md").read_text() == card
    said = capsys.readouterr().out
    assert "attack success" in said and f"of {QUESTIONS}, " in said, said
    wrong = json.loads(kept)
    wrong["after"]["attack_success"], wrong["after"]["counts"]["attack_success"] = 0.123, [1, 1]
    (run / "result.json").write_text(json.dumps(wrong))
    assert main(["evaluate", str(run), "--rescore"]) == 0 and load(run / "result.json") == json.loads(kept)


@pytest.mark.slow
def test_answers_that_do_not_belong_are_told(run, tmp_path):
    """Held-out records that were cut, lines that were added, and an adapter of NaNs: no figure is made of
    them."""
    import torch
    from safetensors.torch import load_file, save_file

    copy = shutil.copytree(run, tmp_path / "run")
    lines = (copy / "answers.jsonl").read_text().splitlines()
    (copy / "answers.jsonl").write_text(
        "\n".join([*lines, json.dumps(json.loads(lines[0]) | {"key": "more", "attempt": 1})]) + "\n"
    )
    with pytest.raises(RunError, match="some are missing, or were added"):
        rescore(copy)
    (copy / "answers.jsonl").write_text(
        "\n".join([*lines, json.dumps(json.loads(lines[0]) | {"key": "more", "id": "another"})]) + "\n"
    )
    with pytest.raises(RunError, match="holds 1 answers to questions that are no longer asked"):
        rescore(copy)
    altered = [
        json.dumps(
            json.loads(line) | {"text": "ok", "finish": "length", "past_stop": True, "read": {}, "scores": {}}
        )
        for line in lines[:3]
    ]
    (copy / "answers.jsonl").write_text("\n".join([*altered, *lines[3:]]) + "\n")
    with pytest.warns(
        UserWarning, match=r"of 3 of \d+ answers the text or the end was not that of their token ids"
    ):
        again = rescore(copy)
    assert again == load(run / "result.json") and read_json_lines(copy / "answers.jsonl") == read_json_lines(
        run / "answers.jsonl"
    )
    (copy / "answers.jsonl").write_text(
        "\n".join([json.dumps(json.loads(lines[0]) | {"begun": [5]}), *lines[1:]]) + "\n"
    )
    with pytest.raises(RunError, match="was asked by another prompt"):
        rescore(copy)
    stale = json.loads(lines[0]) | {"key": "before the adapter changed", "ids": []}
    (copy / "answers.jsonl").write_text("\n".join([json.dumps(stale), *lines]) + "\n")
    assert rescore(copy) == load(run / "result.json"), "of two answers to one attempt the last counts"
    (copy / "answers.jsonl").write_text(lines[0])  # no newline: it was being written
    with pytest.raises(RunError, match="an answers.jsonl without a whole line"):
        rescore(copy)
    (copy / "answers.jsonl").write_text("\n".join(lines) + "\n")
    (copy / "config.json").rename(copy / "config.away")
    with pytest.raises(RunError, match="config.json is missing or names no model"):
        rescore(copy)
    (copy / "config.away").rename(copy / "config.json")
    weights = load_file(copy / "adapter" / "adapter_model.safetensors")
    save_file(
        {k: torch.full_like(w, float("nan")) for k, w in weights.items()},
        copy / "adapter" / "adapter_model.safetensors",
    )
    done = cells(
        "-p",
        "adapter",
        copy / "adapter",
        "-p",
        "eval_data",
        run.parent / "heldout.jsonl",
        "-p",
        "run_dir",
        tmp_path / "out",
        notebook=NBS / "evaluate.ipynb",
    )
    assert done.returncode != 0 and "NaN or infinite weights" in done.stdout, done.stdout[-2000:]


def test_an_adapter_of_another_base_is_told(run, tmp_path):
    "The same shapes fit, so nothing but its own word tells that an adapter is of another model."
    other = shutil.copytree(TINYAGENT, tmp_path / "other")
    (found,) = find_adapters(str(run))
    assert another_base(found, "tinyagent") == {} and another_base(found, str(other)) == {
        "made_for": "tinyagent",
        "model": str(other),
    }
    heldout = tmp_path / "few.jsonl"
    write_transcripts(heldout, make_transcripts("injection", 1, "eval"))
    given = (
        "-p",
        "adapter",
        run / "adapter",
        "-p",
        "model",
        other,
        "-p",
        "eval_data",
        heldout,
        "-p",
        "max_new_tokens",
        2,
    )
    done = cells(*given, "-p", "run_dir", tmp_path / "out", notebook=NBS / "evaluate.ipynb")
    assert (
        done.returncode == 0
        and "the adapter says that it was made for tinyagent, and was evaluated on" in done.stdout
    ), done.stdout[-2000:]


@pytest.mark.slow
def test_sampled_answers_are_recorded_and_repeat(run, tmp_path):
    given = ("-p", "adapter", run, "-p", "temperature", 1.5, "-p", "samples", 2, "-p", "max_new_tokens", 8)
    one, two = (evaluated(tmp_path / name, *given) for name in ("one", "two"))
    assert (
        one == two
        and one[run.name]["decoding"]["samples"] == 2
        and one[run.name]["n"]["attack"] == 2 * QUESTIONS
    )
    assert len(read_json_lines(tmp_path / "one" / "answers.jsonl")) == 2 * 3 * QUESTIONS


def test_what_cannot_be_evaluated_is_told_at_once(run, capsys, tmp_path):
    for given, words in (
        (["none"], "there are no held-out transcripts"),
        ([str(tmp_path)], "has no adapter_config.json"),
        (["none", "--eval-data", str(run.parent / "heldout.jsonl")], "no model is known"),
        (["a/b/c"], "neither a run directory"),
        (["none", "--model", "tinyagent", "--eval-data", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
        ([str(run), "--samples", "3"], "all alike"),
        ([str(run), "--seed", "3"], "seed 3 would do nothing"),
        (["a", "b", "c"], "two can be set"),
    ):
        assert main(["evaluate", *given]) == 2
        said = capsys.readouterr().err
        assert words in said and said.count("\n") == 1, said
