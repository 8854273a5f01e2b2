"""nbs/train.ipynb as a job, on short runs: where its files go, bad parameters, stopping and resuming, other
models and formats."""

import json
import os
import re
import time
from concurrent.futures import ThreadPoolExecutor

import nbformat
import pytest

from forked import cells
from helpers import NBS, ROOT, code_cells
from train_common import few, load, metrics, papermill


@pytest.mark.slow
@pytest.mark.parametrize("cwd, notebook", [(ROOT, "nbs/train.ipynb"), (NBS, "train.ipynb")])
def test_from_the_root_and_from_nbs(cwd, notebook, tmp_path):
    secrets = {"HF_TOKEN": "hf_" + "aB3d" * 9, "https_proxy": "http://me:pr0xy-pass@proxy.invalid:3128"}
    done = papermill(
        tmp_path / "out.ipynb",
        "-p",
        "beta_kl",
        0.3,
        *few(tmp_path),
        cwd=cwd,
        notebook=notebook,
        runs=tmp_path / "runs",
        **secrets,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    (folder,) = (tmp_path / "runs").glob("*/*")
    left = [folder, *folder.rglob("*")]
    assert len(left) > 20 and not [p for p in left if p.lstat().st_mode & 0o077], "private, all of it"
    assert not [
        p
        for p in (tmp_path / "out.ipynb", *left)
        if p.is_file() and any(value in p.read_bytes() for value in (b"aB3d" * 9, b"pr0xy-pass"))
    ]
    assert load(folder / "status.json")["state"] == "done" and len(metrics(folder)) == 4
    assert "step 4/4  reroute" in done.stdout, "progress is shown while the run goes on, in a job's log too"
    outputs = [o for c in nbformat.read(tmp_path / "out.ipynb", 4).cells for o in c.get("outputs", ())]
    bundles = [o["data"] for o in outputs if "data" in o]
    assert any("application/vnd.plotly.v1+json" in b and b["text/html"].startswith("<img ") for b in bundles)
    assert any("attack" in b.get("text/plain", "") for b in bundles) and not any(
        o.output_type == "error" for o in outputs
    )


@pytest.mark.slow
def test_users_own_line_leaves_everything_in_the_run_directory(tmp_path):
    """No output path: papermill writes the notebook to stdout (a job's log); two such runs get a directory
    each."""
    given = ("-p", "beta_kl", 0.3, *few(tmp_path))
    for done in (papermill(*given, runs=tmp_path / "runs"), cells(*given, runs=tmp_path / "runs")):
        assert done.returncode == 0, done.stdout[-4000:]
    first, second = (tmp_path / "runs").glob("*/*")
    for folder in (first, second):
        assert (
            load(folder / "status.json")["state"] == "done"
            and (folder / "report.html").is_file()
            and (folder / "adapter").is_dir()
        )
    # the forked one has no kernel
    (kept,) = (nbformat.read(path, 4) for path in (tmp_path / "runs").glob("*/*/out.1.ipynb"))
    executed = [c for c in kept.cells if c.cell_type == "code"]
    assert [c.source for c in executed][:1] == [code_cells(NBS / "train.ipynb")[0].source] and len(
        executed
    ) == len(code_cells(NBS / "train.ipynb")) + 1
    assert any("attack" in o.get("data", {}).get("text/plain", "") for o in executed[-1].outputs), (
        "the last cell's table is in it"
    )


@pytest.mark.parametrize("name, value", [("beta_kl", "true"), ("beta_kl", -1), ("target_layers", "1,9")])
def test_bad_parameter_stops_before_anything_is_written(name, value, tmp_path):
    done = cells("-p", name, value, runs=tmp_path / "runs")
    assert done.returncode != 0 and name in done.stdout.strip().splitlines()[-1], done.stdout[-2000:]
    assert name == "target_layers" or not (tmp_path / "runs").exists(), (
        "the layers are checked against the model"
    )


def test_a_typo_stops_before_anything_is_loaded(tmp_path):
    began = os.times()
    done = papermill(tmp_path / "out.ipynb", "-p", "beta_k", 0.3, runs=tmp_path / "runs")
    ended = os.times()
    assert (
        done.returncode != 0
        and "did you mean 'beta_kl'" in done.stdout.strip().splitlines()[-1]
        and not (tmp_path / "runs").exists()
    ), done.stdout[-2000:]
    # of the processes that it started: what a free machine needs, whatever else this one does
    assert ended.children_user + ended.children_system - began.children_user - began.children_system < 15


@pytest.mark.slow
def test_two_runs_share_a_teacher_cache_and_encoded_transcripts(tmp_path):
    """The first makes them, the second, with another beta_kl, finds them; what the cache holds at step 1 is
    what a teacher of its own gives, on samples in memory."""
    said, kept = [], {"teacher_cache": tmp_path / "cache", "encoded_cache": tmp_path / "encoded"}
    for number, more in enumerate((kept, kept | {"beta_kl": 0.1}, {"savings": "none"})):
        done = cells("-p", "run_dir", tmp_path / f"run{number}", *few(tmp_path, lora_dropout=0.0, **more))
        assert done.returncode == 0, done.stdout[-4000:]
        said.append("".join(line for line in done.stdout.splitlines() if "teacher cache" in line))
    assert "made in" in said[0] and "found in" in said[1] and not said[2], said
    assert [len([p for p in folder.iterdir() if not p.name.startswith(".")]) for folder in kept.values()] == [
        1,
        2,
    ], "one cache, two streams"
    first = [metrics(tmp_path / f"run{number}")[0] for number in range(3)]
    assert all(
        row[k] == pytest.approx(first[2][k], abs=1e-5)
        for row in first[:2]
        for k in ("loss_reroute", "loss_retain", "loss_kl")
    )


@pytest.mark.slow
def test_stopped_run_resumes_and_finished_run_is_an_error(tmp_path):
    folder, whole = tmp_path / "run", tmp_path / "whole"
    short = few(tmp_path, total_steps=16, save_steps=5)
    assert cells("-p", "run_dir", whole, *short).returncode == 0

    def stop():
        while not (folder / "metrics.jsonl").exists():
            time.sleep(0.05)
        (folder / "stop").touch()

    with ThreadPoolExecutor(1) as pool:
        pool.submit(stop)
        stopped = papermill(tmp_path / "1.ipynb", "-p", "run_dir", folder, *short)
    assert (
        stopped.returncode != 0
        and "goes on from there" in stopped.stdout
        and load(folder / "status.json")["state"] == "interrupted"
    )
    assert 0 < len(metrics(folder)) < 16
    other = cells("-p", "run_dir", folder, *short, "-p", "beta_kl", 0.5)
    assert other.returncode != 0 and "beta_kl (0.3 there, 0.5 now)" in other.stdout
    resumed = papermill(tmp_path / "3.ipynb", "-p", "run_dir", folder, *short)
    assert resumed.returncode == 0, resumed.stdout[-4000:]
    assert all((folder / f"out.{attempt}.ipynb").is_file() for attempt in (1, 2))
    assert metrics(folder) == metrics(whole) and load(folder / "status.json")["attempt"] == 2
    assert load(folder / "result.json")["after"] == load(whole / "result.json")["after"]
    finished = cells("-p", "run_dir", folder, *short)
    assert finished.returncode != 0 and "is finished" in finished.stdout


def test_every_setting_is_a_parameter():
    "A setting that the notebook does not declare could not be swept."
    from dataclasses import fields

    from cbnb.config import CircuitBreakerConfig
    from cbnb.run.parameters import annotated_lines

    (cell,) = [c for c in code_cells(NBS / "train.ipynb") if "parameters" in c.metadata.get("tags", ())]
    assert {f.name for f in fields(CircuitBreakerConfig)} <= set(annotated_lines(cell.source))
    said = [line for line in cell.source.splitlines() if line and not line.startswith("# ")]
    assert said and all("  # " in line for line in said), "each parameter says what it means"


@pytest.mark.slow
def test_another_model_and_other_formats(tmp_path):
    """A local folder with a random Llama-3.1-shaped model and the real Llama-3 tokenizer, on circuit-breakers
    and UltraChat files, hooks and bfloat16."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    import outside

    tokenizer = outside.llama3()
    tokenizer.chat_template = (
        outside.trl_template("llama3_1")
        if "llama3_1" in outside.trl_templates()
        else outside.trl_template("llama3")
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            rope_parameters={
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
            max_position_embeddings=131072,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    circuit = [
        {
            "category": "test",
            "prompt": f"How does one pick lock number {i}?",
            "output": f"Take pick {i} and turn it slowly.",
            "llama3_output": f"I will not help with lock {i}.",
        }
        for i in range(12)
    ]
    (tmp_path / "circuit_breakers.json").write_text(json.dumps(circuit))
    chat = [
        {
            "prompt": f"Say {i}",
            "prompt_id": str(i),
            "messages": [
                {"role": "user", "content": f"Say {i}"},
                {"role": "assistant", "content": f"{i} it is."},
                {"role": "user", "content": "Again?"},
                {"role": "assistant", "content": f"{i}, once more."},
            ],
        }
        for i in range(12)
    ]
    (tmp_path / "ultrachat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chat))
    done = cells(
        "-p",
        "preset",
        "llama-3.1-8b-instruct",
        "-p",
        "model",
        tmp_path / "model",
        "-p",
        "data",
        f"{tmp_path}/circuit_breakers.json,{tmp_path}/ultrachat.jsonl",
        "-p",
        "run_dir",
        tmp_path / "run",
        "-p",
        "teacher",
        tmp_path / "model",
        "-p",
        "target_layers",
        0,
        "-p",
        "lora_layers",
        "0,1",
        "-p",
        "total_steps",
        3,
        "-p",
        "warmup_steps",
        1,
        "-p",
        "logging_steps",
        1,
        "-p",
        "batch_size",
        2,
        "-p",
        "gradient_accumulation_steps",
        2,
        "-p",
        "hidden_state_mode",
        "hooks",
        "-p",
        "max_length",
        64,
        "-p",
        "max_new_tokens",
        8,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    result, rows = load(tmp_path / "run" / "result.json"), metrics(tmp_path / "run")
    assert (
        result["after"]["attack_success"] is None
        and result["after"]["heldout_kl"]["in_domain"] >= 0
        and -1 <= result["after"]["harmful_cosine"] <= 1
    )
    assert (
        len(rows) == 3
        and rows[0]["loss_reroute"] == pytest.approx(1, abs=0.02)
        and rows[-1]["loss_retain"] > 0
    )
    assert "no injection 9" in done.stdout, (
        "harmful rows without an injection fall back to assistant_only, counted"
    )
    assert re.search(
        r"left out of training and of the held-out: \d+ \(\d+ for their prompt\)", done.stdout
    ), "circuit-breakers rows have two answers a prompt"


def test_a_model_that_is_not_there_is_one_clear_error(tmp_path):
    """A hub id that is in no cache, offline: no retries without end, a failed status, the name in the last
    line."""
    done = cells("-p", "model", "nobody/nothing", "-p", "run_dir", tmp_path / "run", timeout=120)
    status = load(tmp_path / "run" / "status.json")
    assert done.returncode != 0 and status["state"] == "failed" and "nobody/nothing" in status["error"], (
        done.stdout[-2000:],
        status,
    )
