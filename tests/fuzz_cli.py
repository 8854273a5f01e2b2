"""Command lines made from the parsers of `cbnb` and `python -m cbnb.report` themselves, and what must
hold for each of them.

usage: fuzz_cli.py [LINES] [SEED] [FIRST]     runs LINES (2000) of SEED (0) from number FIRST (0) on and
                                              prints what does not hold

A line is known by seed and number alone. It is carried out by `main(argv)` in a forked process that sits in a
world of its own (files, folders, devices, run directories, specs, each also broken), may write nowhere else,
and is watched by an audit hook and an alarm. What would train, download, submit or plan is the only thing
that is not carried out: what papermill would run leaves some files and ends, a plan is one line, the hub is
offline.
"""

import argparse
import contextlib
import ctypes
import io
import json
import os
import random
import re
import resource
import shutil
import signal
import socket
import struct
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported

LONG = 240  # characters of an argument from which on it must not be echoed whole
SECONDS = 20  # of a processor that a line may take
WAIT = 120  # seconds that it may take in all, on a machine that has other things to do
SENTENCE = 2_000  # characters that what is said of a refused line may have
UNSEEN = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef]"
)
COLOUR = re.compile("\x1b\\[(?:0|2|3[1-6](?:;1;4)?)m")  # what `cbnb masks --color always` itself writes
EVIL = "\x1b]0;owned\a\x1b[2J\x9b1m\u202eright\u2066\u200b\r\x08\x7f\u2028\ud800\ufe0f"
# a token of the environment, and a word of some lines
SECRET = "Zq7-secret-9931-Zq7x"
NAME = "\x1b[31m\u202eevil\u200b\n\x9b"  # as a file's name


# --- the world ---


def write(path, text):
    "Writes text, bytes or, of anything else, JSON; returns the path."
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(text, bytes):
        path.write_bytes(text)
    else:
        path.write_text(
            text if isinstance(text, str) else json.dumps(text), encoding="utf-8", errors="surrogatepass"
        )
    return path


def conversations(name, label="harmful", **more):
    "Two records in OpenAI's form."
    said = [{"role": "user", "content": f"Read {name}."}, {"role": "assistant", "content": "Done."}]
    return "".join(
        json.dumps({"id": f"{name}{i}", "messages": said, "label": label} | more) + "\n" for i in range(2)
    )


FIGURES = {"attack_success": 0.5, "exact_match": {"plain": 1.0}, "n": {"attack": 2, "plain": 2}}
DONE = {
    "state": "done",
    "node": "n",
    "pid": 1,
    "updated": "2026-01-01T00:00:00+00:00",
    "attempt": 1,
    "alarms": [{"alarm": "dead", "step": 1, "text": "x"}],
}
ODD = [
    None,
    True,
    -1,
    10**400,
    1e308,
    "",
    "x",
    EVIL,
    [],
    [1],
    {},
    {"a": {"b": []}},
    [[[]]],
    {EVIL: EVIL},
    "NaN",
    [None],
    [{}],
    [EVIL],
]


def runs(folder, rng):
    "Run directories, whole and broken."
    good = {
        "status": DONE,
        "result": {"before": FIGURES, "after": FIGURES, "alarms": DONE["alarms"]},
        "params": {"beta_kl": 0.3, "seed": 0, "total_steps": 2},
        "config": {"model": "tinyagent", "total_steps": 2},
    }
    rows = "".join(json.dumps({"step": s, "loss_kl": 0.1, "loss_reroute": 1.0}) + "\n" for s in (1, 2))

    def run(name, metrics=rows, **files):
        for key, value in (good | files).items():
            if value is not None:
                write(folder / name / f"{key}.json", value)
        if metrics is not None:
            write(folder / name / "metrics.jsonl", metrics)

    run("good")
    run("only-status", None, result=None, params=None, config=None)
    run("only-params", None, result=None, status=None, config=None)
    run(
        "half",
        rows[:-9],
        status={"state": "running", "pid": 1, "node": socket.gethostname(), "training_started": "yesterday"},
        result=None,
    )
    run("torn", rows, status='{"state": "do')
    run("list", rows, status=[1], result=[1], params=[1], config=[1])
    run("binary", b"\x00\xff\xfe", status=b"\x00\xff", result=b"\xff", params=b"\x80")
    run("deep", rows, status="[" * 100_000)
    run("evil", json.dumps({"step": EVIL, EVIL: EVIL}) + "\n", status={"state": EVIL}, params={EVIL: EVIL})
    run(NAME, rows, status=DONE | {"state": "failed", "error": EVIL}, params={"beta_kl": EVIL, "seed": EVIL})
    for n in range(6):  # hand-edited: a value of another type in some place
        made = {k: dict(v) for k, v in good.items()}
        made["status"]["state"] = rng.choice(["running", "done", "failed", "interrupted", "queued"])
        for _ in range(3):
            file = made[rng.choice(list(made))]
            file[
                rng.choice(
                    [
                        *file,
                        "error",
                        "stage",
                        "job",
                        "training_started",
                        "resumed_step",
                        "total_steps",
                        "data",
                        "floor",
                        "counts",
                        "evaluated",
                    ]
                )
            ] = rng.choice(ODD)
        row = {"step": rng.choice([1, *ODD]), "loss_kl": rng.choice([1, *ODD])}
        run(
            f"edited{n}",
            json.dumps(row) + "\n" + rng.choice(["", rows, "null\n", "{}\n"]),
            **{k: v for k, v in made.items()},
        )
    (folder / "status-is-a-folder" / "status.json").mkdir(parents=True)
    os.mkfifo(write(folder / "fifo" / "params.json", "{}").with_name("status.json"))
    write(folder / "link" / "params.json", "{}").with_name("status.json").symlink_to("nowhere")
    os.chmod(write(folder / "shut" / "status.json", good["status"]), 0)
    shut = write(folder / "shut-folder" / "status.json", good["status"]).parent
    os.chmod(shut, 0)
    # leases that no process of this machine has written, or no process at all
    for name in ("edited0", "edited1", "half", "only-params"):
        lease = {
            "token": EVIL,
            "node": EVIL,
            "pid": 1,
            "beat": 0,
            "boot": EVIL,
            "namespace": EVIL,
            "job": EVIL,
        }
        write(
            folder / name / ".lease",
            rng.choice([lease, lease | {rng.choice([*lease]): rng.choice(ODD)}, *ODD, "{", b"\xff"]),
        )
    (folder / "edited2" / ".lease").mkdir()
    (folder / "edited3" / ".lease").symlink_to("nowhere")
    os.mkfifo(folder / "edited4" / ".lease")
    for name in ("good", "half", "edited0"):
        for file in ("key", "code", "made_from", "preflight"):
            if rng.random() < 0.5:
                write(
                    folder / name / f"{file}.json",
                    rng.choice([*ODD, {"key": EVIL}, {"verdict": "fail", "checks": [EVIL]}]),
                )
    write(
        folder / "report" / "report.json",
        rng.choice([*ODD, {"files": rng.choice([[EVIL], ["../../good.jsonl"], *ODD])}]),
    )
    sweep = folder.parent / "submitted"
    for name in ("good", "half"):
        shutil.copytree(folder / name, sweep / name)
    write(
        sweep / "jobs" / "0001.json",
        rng.choice(
            [
                {"arrays": rng.choice(ODD)},
                {
                    "arrays": [
                        {
                            "name": rng.choice(ODD),
                            "job": rng.choice(ODD),
                            "offset": 0,
                            "runs": rng.choice([["good"], *ODD]),
                        }
                    ]
                },
                rng.choice(ODD),
            ]
        ),
    )
    write(
        folder / "sweep.json",
        {"name": EVIL, "runs": rng.choice([[{"dir": "good"}, {"dir": "../.."}, {"dir": EVIL}, 3], *ODD])},
    )
    write(folder / "file", "x")


SPECS = {
    "good": "name: some\nparameters: {preset: tinyagent}\ngrid: {beta_kl: [0.0, 0.3]}\n",
    "empty": "",
    "list": "- 1\n",
    "text": "hello",
    "torn": "name: [",
    "twice": "name: a\nname: b\n",
    "unknown": "name: a\ngird: {}\n",
    "tag": "name: !!python/object/apply:os.system ['true']\n",
    "tab": "\tname: a\n",
    "bomb": "a: &a [x, x, x, x, x, x, x, x, x]\n"
    + "".join(
        f"{c}: &{c} [" + ", ".join(f"*{p}" for _ in range(9)) + "]\n" for p, c in zip("abcdefgh", "bcdefghi")
    ),
    "recursive": "name: a\nparameters: &x {y: *x}\n",
    "types": "name: 3\nparameters: [1]\ngrid: {beta_kl: 3}\nruns: {a: 1}\nseeds: x\nnotebook: [1]\n",
    "nulls": "name: a\nparameters:\ngrid:\nruns:\nseeds:\none_at_a_time:\n",
    "huge": "name: a\ngrid: {seed: [" + ",".join(map(str, range(3000))) + "], beta_kl: [0.1, 0.2]}\n",
    "numbers": "name: a\nparameters: {beta_kl: .nan, seed: 1e400, lora_r: 99999999999999999999999999}\n",
    "dates": "name: 2026-01-01\nparameters: {model: 2026-01-01}\n",
    "evil": 'name: "\\e[31m\\u202e"\n',
    "evil-value": 'name: a\nparameters: {data: "\\e[31m\\u202e", "\\e[2J": 1}\n',
    "notebook": "name: a\nnotebook: junk.ipynb\n",
    "keys": "name: a\nparameters: {1: 2, null: 3, [1]: 2}\n",
    "control": "name: a\x01\n",
    "binary": b"\xff\xfe\x00n",
    "items": "name: a\nruns: [1, x, [], null]\ngrid: {beta_kl: [], seed: [[1]]}\n",
    "dir": "name: a\nnotebook: folder\n",
    "odd": "name: a\nnotebook: odd.ipynb\n",
    "items2": "name: a\nruns: [{beta_kl: x}]\nseeds: [a, 1.5, true, null]\n",
    "deep": "name: " + "[" * 5000,
}


def odd_notebook(rng):
    "A notebook whose parameters cannot be read, or are a stranger's."
    cell = {
        "cell_type": "code",
        "source": rng.choice(
            [
                "seed: int = 0  # \x1b[2J\u202e",
                f"x: str = {EVIL!r}",
                "x: list = []",
                "x: int = f()",
                "x = 1",
                "(",
                "x: int",
                3,
                [3],
                ["a: int = 1\n", "b: 'Optional[str]' = None"],
                None,
            ]
        ),
        "metadata": rng.choice([{"tags": ["parameters"]}, {"tags": rng.choice(ODD)}, rng.choice(ODD)]),
    }
    return rng.choice(
        [
            {"cells": [cell]},
            {"cells": [cell, cell]},
            {"cells": rng.choice(ODD)},
            {"cells": [rng.choice(ODD)]},
            "{",
            "[]",
            "null",
        ]
    )


def make_world(folder, rng):
    "Fills the empty `folder`."
    for name in ("train", "preflight", "evaluate", "agent"):
        write(folder / "project" / "nbs" / f"{name}.ipynb", odd_notebook(rng))
    write(folder / "odd.ipynb", odd_notebook(rng))
    from cbnb.transcripts.reader import write_transcripts
    from cbnb.transcripts.tinyworld import make_transcripts

    write_transcripts(
        folder / "good.jsonl", [*make_transcripts("injection", 2), *make_transcripts("plain", 2)]
    )
    write(folder / "chat.jsonl", conversations("a"))
    write(folder / "evil.jsonl", conversations(EVIL, source=EVIL, meta={EVIL: EVIL}))
    write(folder / "evil-label.jsonl", conversations("a", EVIL))
    write(
        folder / "evil-role.jsonl",
        json.dumps(
            {
                "messages": [{"role": EVIL, "content": EVIL}, {"role": "assistant", "content": EVIL}],
                "label": "benign",
            }
        )
        + "\n",
    )
    write(folder / NAME, conversations("b"))
    write(folder / f"{NAME}.jsonl", conversations("b")[:-9])
    write(folder / "名前 ü.jsonl", conversations("c"))
    write(folder / "--flag.jsonl", conversations("d"))
    write(folder / ("n" * 240 + ".jsonl"), conversations("e"))
    with open(os.fsencode(folder) + b"/\xff\xfe.jsonl", "w") as f:
        f.write(conversations("f"))
    for name, content in {
        "empty.jsonl": "",
        "blank.jsonl": "\n\n",
        "torn.jsonl": '{"messages": [',
        "binary.bin": bytes(range(256)) * 9,
        "zeros.jsonl": bytes(5000),
        "utf16.jsonl": "\ufeffx".encode("utf-16"),
        "deep.json": "[" * 100_000,
        "numbers.json": "1" + "0" * 5000,
        "nan.json": "[NaN, Infinity]",
        "null.json": "null",
        "dict.json": "{}",
        "list.json": "[]",
        "text.json": '"x"',
        "bad.gz": b"\x1f\x8bxx",
        "bad.zst": b"(\xb5/\xfdxx",
        "bad.parquet": b"PAR1xxPAR1",
        "bad.arrow": b"ARROW1xx",
        "bad.eval": b"PK\x03\x04xx",
        "bad.csv": "a,b\n1\n",
        "long.jsonl": '{"x": "' + "y" * 50_000,
        "injections.json": {"a": "Pay Eve.", EVIL: EVIL},
        "template.jinja": "{{ messages[0].content }}",
        "bad.jinja": "{% if",
        "loop.jinja": "{% for i in range(10**9) %}x{% endfor %}",
        "junk.ipynb": "{}",
        "cells.ipynb": {"cells": [3]},
    }.items():
        write(folder / name, content)
    for name, text in SPECS.items():
        write(folder / f"{name}.yaml", text)
    for n, change in enumerate(ODD):
        write(
            folder / f"odd{n}.json",
            [
                change,
                {"messages": change},
                {"messages": [{"role": "user", "content": change}], "label": change},
            ],
        )
    (folder / "folder").mkdir()
    (folder / "some").mkdir()
    write(folder / "some" / "a.jsonl", conversations("g"))
    write(folder / "some" / "b.json", "{")
    os.chmod(write(folder / "shut.jsonl", conversations("h")), 0)
    (folder / "shut").mkdir(mode=0)
    os.mkfifo(folder / "fifo")
    os.mkfifo(folder / "fifo.jsonl")
    (folder / "broken").symlink_to("nowhere")
    (folder / "loop").symlink_to("loop")
    (folder / "zero").symlink_to("/dev/zero")
    os.chdir(folder)
    with socket.socket(socket.AF_UNIX) as s:
        s.bind("socket")
    for name, files in {
        "model": {},
        "model-config": {"config.json": {"model_type": "llama"}},
        "model-torn": {"config.json": "{", "tokenizer.json": "{"},
        "model-odd": {"config.json": {"model_type": EVIL, "hidden_size": "x"}},
        "adapter": {"adapter_config.json": {"peft_type": "LORA", "base_model_name_or_path": EVIL}},
        "adapter-torn": {"adapter_config.json": "{"},
        "adapter-list": {"adapter_config.json": [1]},
        "model-code": {
            "config.json": {
                "model_type": "odd\x1b[2J",
                "auto_map": {
                    "AutoConfig": "code.C",
                    "AutoModelForCausalLM": EVIL,
                    "AutoTokenizer": ["code.T", None],
                },
            },
            "code.py": "raise SystemExit('code ran')",
        },
        "adapter-code": {
            "adapter_config.json": {
                "peft_type": "LORA",
                "auto_mapping": {"base_model_class": EVIL, "parent_library": "code"},
            },
            "adapter_model.safetensors": "x",
        },
        "model-llama": {
            "config.json": {
                "model_type": "llama",
                "hidden_size": -1,
                "num_hidden_layers": 1e9,
                "vocab_size": None,
            }
        },
    }.items():
        (folder / name).mkdir()
        for file, content in files.items():
            write(folder / name / file, content)
    runs(folder / "runs", rng)


# --- the lines ---

PATHS = [
    "good.jsonl",
    "chat.jsonl",
    "evil.jsonl",
    "evil-label.jsonl",
    "evil-role.jsonl",
    NAME,
    f"{NAME}.jsonl",
    "名前 ü.jsonl",
    "--flag.jsonl",
    "n" * 240 + ".jsonl",
    "\udcff\udcfe.jsonl",
    "empty.jsonl",
    "blank.jsonl",
    "torn.jsonl",
    "binary.bin",
    "zeros.jsonl",
    "utf16.jsonl",
    "deep.json",
    "numbers.json",
    "nan.json",
    "null.json",
    "dict.json",
    "list.json",
    "text.json",
    "bad.gz",
    "bad.zst",
    "bad.parquet",
    "bad.arrow",
    "bad.eval",
    "bad.csv",
    "long.jsonl",
    "injections.json",
    "template.jinja",
    "bad.jinja",
    "loop.jinja",
    "junk.ipynb",
    "cells.ipynb",
    "folder",
    "some",
    "shut.jsonl",
    "shut",
    "fifo",
    "fifo.jsonl",
    "broken",
    "loop",
    "zero",
    "socket",
    "/dev/null",
    "/dev/zero",
    "/dev/full",
    "/dev/urandom",
    "/dev/stdin",
    "/dev/tty",
    "/proc/self/mem",
    "/proc/self/environ",
    "/nowhere/x",
    "/",
    ".",
    "..",
    "",
    " ",
    "~",
    "~nobody/x",
    "no.jsonl",
    "\0",
    "a\0b",
    "x/" * 3000,
    "y" * 300,
    "model",
    "model-config",
    "model-torn",
    "model-odd",
    "model-llama",
    "model-code",
    "adapter",
    "adapter-torn",
    "adapter-list",
    "adapter-code",
    *(f"odd{n}.json" for n in range(len(ODD))),
]
RUNS = [
    "runs",
    "runs",
    "runs",
    "runs/good",
    "runs/half",
    "submitted",
    ".",
    "runs/nowhere",
    "runs/file",
    *(
        f"runs/{name}"
        for name in (
            "good",
            "only-status",
            "only-params",
            "half",
            "torn",
            "list",
            "binary",
            "deep",
            "evil",
            NAME,
            *(f"edited{n}" for n in range(6)),
            "status-is-a-folder",
            "fifo",
            "link",
            "shut",
            "shut-folder",
            "jobs",
        )
    ),
]
WORDS = [
    "",
    " ",
    "\n",
    "\0",
    EVIL,
    NAME,
    "x" * 300,
    "word " * 80,
    "z" * 100_000,
    "é" * 500,
    "名" * 300,
    "0",
    "1",
    "-1",
    "2",
    "10",
    "0.3",
    "1e-4",
    "nan",
    "inf",
    "-inf",
    "1e999",
    "9" * 30,
    "9" * 5000,
    "٣",
    "²",
    "1_000",
    "0x10",
    "True",
    "None",
    "true",
    "[]",
    "{}",
    "1,2",
    "0,20",
    ",,,",
    "1,x",
    "1,-1",
    "a=1",
    "a=",
    "=",
    "a=1,a=2",
    '"',
    "'",
    "\\",
    "$(true)",
    "; true",
    "%s",
    "%(default)s",
    "{x}",
    "{{ 7*7 }}",
    "*.jsonl",
    "**",
    "[",
    "[!",
    "some/*",
    "good.jsonl:harmful",
    "good.jsonl:benign@0.3",
    "good.jsonl@nan",
    "good.jsonl@",
    ":",
    "@",
    "x:y:z",
    "hf:",
    "hf:a/b",
    "hf:a/b[",
    "hf:x[y]",
    "installed",
    "tinyagent",
    "none",
    "auto",
    "-",
    "--",
    "-p",
    "--help-me",
    "\ud800",
    "\u202e",
    SECRET,
]
# a policy or an objective is code that the user names: it may do what it likes
NOT_MODULES = ("this", "antigravity")


def world_paths(folder):
    return [str(folder / p) for p in PATHS if p and p[0] not in "/~" and "\0" not in p]


SAID = {
    "preset": ["tinyagent", "tinyagent-adv", "base", "llama-3-8b", "llama-4-scout"],
    "model": ["tinyagent"],
    "on_error": ["raise", "skip"],
    "relabel": ["source"],
    "objective": ["rr", "rr_kl", "rmu", "cbnb.step.objectives:RR", "os:path", "nowhere:x"],
    "objective_options": ["none", "steering=2", "steering=nan", "=", "none,steering=2"],
    "retain_layers": ["targets", "all"],
    "schedule": ["dual", "dual_cosine", "single_alpha"],
    "target_layers": ["1,2", "2", "0,9"],
    "lora_layers": ["0,3", "1,2", "3,1"],
    "lora_modules": ["q_proj", "all", "q_proj,x_proj"],
    "lr_schedule": ["linear", "cosine"],
    "truncation": ["targets", "left", "right"],
    "lost_context": ["drop", "keep"],
    "benign_policy": ["assistant_only", "completion_only"],
    "harmful_policy": ["full_sequence", "assistant_only"],
    "control": ["error", "allow", "text"],
    "tool_call_format": ["template", "hermes"],
    "adapt": ["drop_empty", "hermes,split_calls", "x"],
    "template_variables": ["enable_thinking=true", "a=1"],
    "dtype": ["float32", "bfloat16"],
    "quantize": ["none", "4bit"],
    "hidden_state_mode": ["hidden_states", "hooks"],
    "savings": ["none", "buckets", "early_exit,x"],
    "report_to": ["none", "tensorboard", "nothing"],
    "heldout_by": ["auto", "task", "prompt,suite", "x"],
    "policy": [
        "assistant_only",
        "full_sequence",
        "cbnb.masking.policies:full_sequence",
        "json:loads",
        "os:getpid",
        "x",
    ],
    "seed": ["0", "3"],
    "transcripts": ["20", "3"],
    "held_out": ["1", "2"],
    "run_dir": ["new", "runs/good", "runs/half", "runs/edited0"],
}


def value(action, rng, folder, mild):
    "A value for an option or a positional: mostly one of its kind, if `mild` always."
    name, roll = f"{action.dest} {action.metavar or ''}".lower(), rng.uniform(0.2 if mild else 0, 1)
    if (said := SAID.get(action.dest.removeprefix("parameter "))) and roll > 0.3:
        return rng.choice(said)
    if roll < 0.15:
        return rng.choice(WORDS)
    if roll < 0.2:
        return "".join(
            rng.choice(
                [
                    "a",
                    "é",
                    "\x1b",
                    "\u202e",
                    "/",
                    ".",
                    "-",
                    " ",
                    ",",
                    "=",
                    "@",
                    ":",
                    "[",
                    "*",
                    "\ud800",
                    "9",
                    "\n",
                    "'",
                ]
            )
            for _ in range(rng.choice([1, 3, 10, 400]))
        )
    if action.choices and roll < 0.9:
        return rng.choice(list(action.choices))
    if action.type is not None or re.search(r"\b(int|float|n|x)\b|steps|length", name):
        return rng.choice(["1", "2", "16", "0.5", "0.1", *([] if mild else WORDS)])
    if "spec" in name:
        return rng.choice([f"{n}.yaml" for n in SPECS] + PATHS)
    if re.search("sweep|folder|run_dir|adapter", name):
        return rng.choice(RUNS if mild else RUNS * 2 + PATHS + world_paths(folder))
    if re.search("out|html|page|cache", name):
        return rng.choice(
            ["out.jsonl", "new.jsonl", "out"] if mild else ["out.jsonl", "new/out.jsonl", "out", *PATHS]
        )
    if re.search("file|data|text|injections|tools|model|teacher|template", name):
        return rng.choice(["good.jsonl"] * 20 + ["tinyagent"] * 20 + PATHS + world_paths(folder))
    return rng.choice(["x", "a,b", "1"] if mild else WORDS)


def options(action, rng, folder, mild):
    "The words of one use of an option."
    if mild:
        return (
            [action.option_strings[0]]
            if action.nargs == 0
            else [action.option_strings[0], value(action, rng, folder, True)]
        )
    flag = rng.choice(action.option_strings)
    if rng.random() < 0.05:
        flag = flag[: max(3, len(flag) - rng.randint(1, 4))]
    if action.nargs == 0:
        return [flag] if rng.random() > 0.05 else [f"{flag}={rng.choice(WORDS)}"]
    if rng.random() < 0.04:
        return [flag]
    given = value(action, rng, folder, False)
    return [f"{flag}={given}"] if rng.random() < 0.4 else [flag, given]


REPORT = "cbnb.report"  # stands for `python -m cbnb.report`
NEEDED = {
    "masks": ["good.jsonl", "--model", "tinyagent"],
    "spans": ["good.jsonl", "--wrappers"],
    "convert": ["good.jsonl", "new.jsonl"],
    "office": ["new", "--transcripts", "20", "--held-out", "1"],
    "plan": ["--preset", "tinyagent"],
    "sft": [],
    "merge": ["none", "new", "--model", "tinyagent"],
    "preflight": [],
    "train": [],
    "evaluate": ["none", "--eval-data", "good.jsonl", "--model", "tinyagent"],
    "chat": ["none", "--model", "tinyagent", "--from", "good.jsonl"],
    "inspect-log": ["runs"],
    "attack": ["runs/good"],
    "tamper": ["runs/good"],
    "ablate": ["good.yaml", "--dry-run"],
    "status": ["runs"],
    "report": ["runs"],
    "fetch": ["a/b"],
}


def command_line(commands, rng, folder):
    """The words of one line: a command with what it needs or with positionals of any kind, and some options.
    `commands`: the parsers by name."""
    if rng.random() < 0.02:
        return [rng.choice([*WORDS, "mask", "--version", "--help", "-x"]) for _ in range(rng.randint(0, 3))]
    if rng.random() < 0.03:
        return [REPORT, *(rng.choice(RUNS * 4 + WORDS + PATHS) for _ in range(rng.choice([0, 1, 1, 1, 2])))]
    name = rng.choice([*commands])
    actions = [a for a in commands[name]._actions if a.dest != "help"]
    optional, positional = (
        [a for a in actions if a.option_strings],
        [a for a in actions if not a.option_strings],
    )
    words, mild = [], rng.random() < 0.5
    if rng.random() < 0.5:
        words += NEEDED[name]
    else:
        for action in positional:
            words += [
                value(action, rng, folder, mild)
                for _ in range(
                    rng.choice([1, 1, 1, 1, 0, 2, 3])
                    if action.nargs in ("*", "+") or rng.random() < 0.1
                    else 1
                )
            ]
        for action in optional:
            if action.required and rng.random() < 0.9:
                words += options(action, rng, folder, mild)
    for _ in range(rng.choice([0, 1, 1, 1, 2, 2, 3, 6])):
        words += options(rng.choice(optional), rng, folder, mild) if optional else []
    if mild:
        return [name, *words]
    if rng.random() < 0.04:
        words.insert(
            rng.randint(0, len(words)),
            rng.choice([*WORDS, "--no-such-flag", f"--{EVIL}", "-Z", "--" + "f" * 500]),
        )
    if rng.random() < 0.02:
        rng.shuffle(words)
    return [name, *words]


def environment(rng, folder):
    "What of the environment a line may meet: mostly nothing odd."
    if rng.random() < 0.8:
        return {}
    return rng.choice(
        [
            {"CBNB_RUNS": "runs"},
            {"CBNB_RUNS": "empty.jsonl"},
            {"CBNB_RUNS": "shut"},
            {"CBNB_RUNS": NAME + "/x"},
            {"CBNB_RUNS": "/dev/null/x"},
            {"CBNB_RUNS": "~nobody-there"},
            {"COLUMNS": "1"},
            {"COLUMNS": EVIL[:5]},
            {"HF_HUB_CACHE": str(folder / "shut")},
            {"WORLD_SIZE": "x"},
            {"WORLD_SIZE": "2", "RANK": "0"},
            {"CBNB_STATIC": EVIL[:4]},
            {"SLURM_JOB_ID": EVIL[:9]},
            {"HOME": "/nowhere"},
            {"TZ": "\x1b[31m"},
            {"WANDB_API_KEY": SECRET},
            {"WANDB_API_KEY": SECRET},
        ]
    )


# --- what must hold ---


class TooLong(BaseException):
    "A line takes longer than it may."


def bare(text):
    return COLOUR.sub("", text)


def unseen(text):
    "The first character of a printed text that a terminal obeys or that the eye misses, or None."
    return next(
        (c for line in text.split("\n") for c in line if not c.isprintable() or UNSEEN.match(c)), None
    )


def faults(argv, status, out, err):
    """What does not hold of a line that ended with `status` (an int, or an exception's text), having written
    `out` and `err`."""
    found = []
    if not isinstance(status, int):
        found.append(status)
    elif status not in (0, 1, 2):
        found.append(f"exit status {status}")
    said = out + err
    if "Traceback" in said:
        found.append("a traceback")
    if (c := unseen(bare(said) if "--color" in " ".join(argv) else said)) is not None:
        found.append(f"the character {c!r} is printed: {said[max(0, said.index(c) - 60) :][:120]!r}")
    lines = [line for line in err.splitlines() if not line.startswith(("note: ", "[transformers] "))]
    most = max(1, len(argv) - 1) if argv[:1] == [REPORT] else 1  # it goes on with the next folder
    if status == 2 and (not 0 < len(lines) <= most or not all(line.startswith("cbnb") for line in lines)):
        found.append(f"{len(lines)} lines are said of what is refused: {err[:600]!r}")
    if status == 2 and len(err) > SENTENCE + 20 * (err.count("\n") - 1):
        found.append(f"{len(err)} characters are said of what is refused")
    for word in argv:
        for part in {word, word.partition("=")[2], repr(word)[1:-1]}:
            if len(part) > LONG and part in (err if "--json" in argv else said):
                found.append(f"an argument of {len(part)} characters is echoed whole")
    return found


def stub(line):
    """Takes the place of what would train, submit or plan for seconds to minutes, when all that was given has
    been looked at. What papermill would run leaves a review or a result, or nothing, by the random numbers of
    `line["rng"]`, and ends."""
    import subprocess

    import cbnb.agent.office_files
    import cbnb.preflight.plan
    import cbnb.sweep.jobs
    import cbnb.sweep.launch

    def start(command, log, threads):
        folder, status = Path(command[4]).parent, line["rng"].choice([0, 1, 1])  # of the executed notebook
        verdict = "fail" if status else "warn"
        review = {
            "verdict": verdict,
            "checks": [
                {
                    "name": "alive",
                    "verdict": verdict,
                    "points": [{"verdict": verdict, "text": EVIL}],
                    "figures": {},
                }
            ],
        }
        result = {
            "before": FIGURES,
            "after": FIGURES,
            "alarms": [{"alarm": EVIL, "step": 1, "text": EVIL}],
            "data": {"notes": [EVIL]},
        }
        if "preflight" in command[4]:
            left = {"preflight": review}
        else:
            left = {
                "status": DONE | ({"state": "failed", "error": EVIL} if status else {}),
                "result": {"evaluated": {EVIL: FIGURES}} if "evaluate" in command[3] else result,
            }
        for name, value in left.items() if line["rng"].random() < 0.7 else ():
            write(folder / f"{name}.json", value)
        return subprocess.Popen(["/bin/sh", "-c", f"exit {status}"])

    cbnb.sweep.jobs.start = cbnb.sweep.launch.start = start
    cbnb.preflight.plan.plan_lines = lambda config, *more: [f"a plan of {config.model}"]
    for name in ("truth_transcripts", "general_transcripts"):
        setattr(cbnb.agent.office_files, name, lambda *args, **options: ([], Counter()))


def drop_power():
    "Takes from root what reads files in spite of their mode, so that a shut file is shut; Linux."
    if os.geteuid() == 0:
        header, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
        ctypes.CDLL(None, use_errno=True).capget(header, none)
        for i in (0, 1):
            none[i] &= ~0b110  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH: effective and permitted
        assert ctypes.CDLL(None).capset(header, none) == 0


def shut_in(folder):
    """Lets this process, and what it starts, write nowhere but in `folder` and to /dev/null, whatever its
    user may: Landlock, where the kernel has it (Linux 5.13)."""
    libc = ctypes.CDLL(None, use_errno=True)
    if (version := libc.syscall(444, None, 0, 1)) < 1:
        return
    # all rights but to execute, to read a file, to list a folder
    writing = 0b1_1111_1111_0010 | (1 << 13 if version > 1 else 0) | (1 << 14 if version > 2 else 0)
    ruleset = libc.syscall(444, ctypes.byref(ctypes.c_uint64(writing)), 8, 0)
    for path, rights in ((folder, writing), ("/dev/null", 0b10)):
        handle = os.open(path, os.O_PATH)
        assert libc.syscall(445, ruleset, 1, struct.pack("=Qi", rights, handle), 0) == 0, os.strerror(
            ctypes.get_errno()
        )
    assert libc.prctl(38, 1, 0, 0, 0) == 0 and libc.syscall(446, ruleset, 0) == 0, os.strerror(
        ctypes.get_errno()
    )


WRITING = {
    "os.mkdir": 0,
    "os.rename": 1,
    "os.remove": 0,
    "os.rmdir": 0,
    "os.link": 1,
    "os.symlink": 1,
    "os.chmod": 0,
    "os.chown": 0,
    "os.truncate": 0,
    "os.utime": 0,
    "shutil.rmtree": 0,
}


def watch(folder, wrote):
    """Refuses this process whatever it opens for writing, makes, moves or removes outside of `folder`, and
    notes it in `wrote` as `outside`, unless it is one of `asked`, paths that the line itself names; a write
    in the folder is noted as `inside`."""

    def hook(event, args):
        if event == "open":
            path, _, flags = args
            if not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND):
                return
        elif event in WRITING:
            path = args[WRITING[event]]
        else:
            return
        if not isinstance(path, (str, bytes, os.PathLike)) or "\0" in (path := os.fsdecode(os.fspath(path))):
            return
        at = (
            args[-1]
            if event not in ("open", "os.truncate") and isinstance(args[-1], int) and args[-1] >= 0
            else None
        )
        base = os.getcwd() if at is None else os.readlink(f"/proc/self/fd/{at}")
        path = os.path.join(
            os.path.realpath(os.path.join(base, os.path.dirname(path))), os.path.basename(path)
        )
        if path.startswith(f"{folder}/"):
            wrote["inside"] = True
        elif path != "/dev/null" and "__pycache__" not in path:
            if not any(
                os.path.dirname(path).startswith(os.path.dirname(name)) for name in wrote.get("asked", ())
            ):
                wrote.setdefault("outside", path)
            raise PermissionError(13, "a line of the fuzz may not write here", path)

    sys.addaudithook(hook)


def asked(argv, more):
    "The absolute paths outside of the world that a line names itself."
    words = [
        part for word in (*argv, *more.values()) for part in (word, word.partition("=")[2], *word.split(","))
    ]
    return [
        os.path.abspath(os.path.expanduser(word)).replace("/proc/self", f"/proc/{os.getpid()}")
        for word in words
        if "\0" not in word and word.startswith(("/", "~", ".."))
    ]


def carried_out(argv):
    """`(status, stdout, stderr)` of `main(argv)`; the status of one that raises is the exception with its
    last frames."""
    import cbnb.cli
    import cbnb.report.figures

    program, words = (cbnb.report.figures.main, argv[1:]) if argv[:1] == [REPORT] else (cbnb.cli.main, argv)
    streams = {n: tempfile.TemporaryFile("w+b") for n in (1, 2)}
    kept = {n: os.dup(n) for n in (1, 2)}
    for n, file in streams.items():
        os.dup2(file.fileno(), n)
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (
        io.TextIOWrapper(open(n, "wb", buffering=0, closefd=False), encoding="utf-8", write_through=True)
        for n in (1, 2)
    )
    try:
        status = program(words) or 0
    except SystemExit as e:
        status = (
            e.code if isinstance(e.code, int) else 0 if e.code is None else f"SystemExit with {e.code!r:.200}"
        )
    except BaseException as e:
        status = f"{type(e).__name__} leaves main: {e!r:.300}\n" + "".join(
            traceback.format_tb(e.__traceback__)[-4:]
        )
    finally:
        signal.alarm(0)
        signal.setitimer(signal.ITIMER_PROF, 0)
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        sys.stdout, sys.stderr = before
        for n, copy in kept.items():
            os.dup2(copy, n)
            os.close(copy)
    said = []
    for file in streams.values():
        file.seek(0)
        said.append(file.read().decode("utf-8", "surrogateescape"))
    return status, *said


def parsers():
    "The parsers of the commands by name."
    from cbnb.cli import parser

    return next(a for a in parser()._actions if isinstance(a, argparse._SubParsersAction)).choices


def child(seed, numbers, folder, report):
    """Carries out the lines `numbers`, in a forked process; writes a JSON line of each to the file object
    `report`."""
    os.environ |= {"HOME": str(folder / "home"), "TMPDIR": str(folder / "tmp"), "PATH": str(folder / "bin")}
    tempfile.tempdir = None
    stub(line := {})
    drop_power()
    resource.setrlimit(resource.RLIMIT_AS, (resource.getrlimit(resource.RLIMIT_AS)[0],) * 2)
    shut_in(folder)
    wrote, clean, environ = {}, None, dict(os.environ)
    watch(folder, wrote)
    commands = parsers()

    def alarm(*_):
        raise TooLong

    for number in (signal.SIGALRM, signal.SIGPROF):
        signal.signal(number, alarm)
    for number in numbers:
        line["rng"] = rng = random.Random(f"{seed}:{number}")
        world = folder / "world"
        if clean != number // AT_ONCE or wrote.get("inside"):
            if world.exists():
                remove(world)
            for name in ("home", "tmp", "bin", "world"):
                (folder / name).mkdir(exist_ok=True)
            make_world(world, random.Random(f"world of {seed}:{number // AT_ONCE}"))
            clean = number // AT_ONCE
        os.chdir(world)
        wrote.clear()
        argv = command_line(commands, rng, world)
        os.environ.update(more := environment(rng, world))
        wrote["asked"] = asked(argv, more)
        if rng.random() < 0.05:
            os.chdir(world / "project")  # where the commands' own notebooks are odd, too
        began = time.monotonic()
        signal.alarm(WAIT)
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        status, out, err = carried_out(argv)
        found = faults(argv, status, out, err)
        if SECRET in more.values() and SECRET in err:
            found.append("a secret of the environment is printed")
        if "outside" in wrote:
            found.append(f"writes to {wrote['outside']}")
        os.environ.clear()
        os.environ.update(environ)
        report.write(
            json.dumps(
                {
                    "number": number,
                    "argv": argv,
                    "env": more,
                    "status": status,
                    "found": found,
                    "seconds": time.monotonic() - began,
                    "out": out[-500:],
                    "err": err[-2000:],
                }
            )
            + "\n"
        )
        report.flush()


def remove(folder):
    "Removes a world, the shut folders in it as well."
    os.chdir("/")
    for path in (folder / "shut", folder / "runs" / "shut-folder"):
        if path.exists():
            path.chmod(0o700)
    shutil.rmtree(folder)


AT_ONCE = 50


def run_lines(seed, numbers, at_once=AT_ONCE):
    """Carries out the lines `numbers` of `seed`; yields what became of each. A process of its own for every
    few: one that dies is a finding."""
    # what takes seconds, once for all forks
    import cbnb.agent.office_files
    import cbnb.evaluate.adapters
    import cbnb.preflight.plan
    import cbnb.sweep.fetch
    import cbnb.widgets.chat
    import cbnb.widgets.sweep  # noqa: F401
    from cbnb.cli import load_masker

    load_masker("tinyagent")
    numbers = list(numbers)
    for at in range(0, len(numbers), at_once):
        left = numbers[at : at + at_once]
        while left:
            folder = Path(tempfile.mkdtemp(prefix="fuzz."))
            with tempfile.TemporaryFile("w+") as report:
                if (pid := os.fork()) == 0:
                    code = 1
                    try:
                        child(seed, left, folder, report)
                        code = 0
                    except BaseException:
                        traceback.print_exc()
                    finally:
                        os._exit(code)
                code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                report.seek(0)
                done = [json.loads(line) for line in report]
            remove(folder / "world")
            shutil.rmtree(folder)
            yield from done
            left = left[len(done) :]
            if code and left:
                yield {
                    "number": left[0],
                    "argv": command_line(parsers(), random.Random(f"{seed}:{left[0]}"), folder / "world"),
                    "env": {},
                    "status": None,
                    "found": [f"the process ends with {code}"],
                    "seconds": 0,
                    "out": "",
                    "err": "",
                }
            if code:
                left = left[1:]


def told(line):
    return (
        f"line {line['number']}: cbnb {line['argv']!r:.400}"
        + (f" with {line['env']}" if line["env"] else "")
        + "".join(f"\n    {fault}" for fault in line["found"])
    )


def main(count=2000, seed=0, first=0):
    """Runs `count` lines of `seed` from number `first` on, prints each that has a fault and what became of
    all; returns whether there was one."""
    began, statuses, bad, slow = time.monotonic(), Counter(), 0, []
    for line in run_lines(seed, range(first, first + count)):
        name = line["argv"][0] if line["argv"] and line["argv"][0] in (REPORT, *NEEDED) else "other"
        statuses[name, line["status"] if isinstance(line["status"], int) else "raised"] += 1
        slow = sorted([(line["seconds"], line["number"]), *slow], reverse=True)[:5]
        bad += bool(line["found"])
        if line["found"]:
            print(told(line), flush=True)
    for (command, status), n in sorted(statuses.items(), key=str):
        print(f"{command:<12} {status!s:<7} {n}")
    print(
        f"{count} lines of seed {seed} in {time.monotonic() - began:.0f} s, the slowest {slow[0][0]:.1f} s "
        f"(line {slow[0][1]}): {bad} with faults"
    )
    return bad > 0


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
