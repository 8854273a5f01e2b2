"""One bad run never hides the others: a finished run of the tiny agent (tests/finished), one of whose files
is damaged, beside two whole ones, read by all that reads runs: the rows of `cbnb status` and `cbnb ablate`,
the report, the page of a sweep, dashboards, explorers, evaluation."""

import contextlib
import json
import os
import random
import shutil
import tempfile
import time
from functools import partial
from pathlib import Path

import pandas as pd
import pytest

from cbnb.basics.jsonfiles import RunError, write_json
from cbnb.basics.lease import identity, process_start
from cbnb.cli import main
from cbnb.config import ConfigError
from cbnb.evaluate.adapters import run_parameters
from cbnb.evaluate.answers import kept_lines
from cbnb.report.figures import describe_run, newest_notebook
from cbnb.report.sweep import link_to, sweep_page, write_sweep
from cbnb.report.verdicts import read_sweep, specimen_run
from cbnb.run.directory import close_run
from cbnb.run.metrics import log_rows, read_metrics
from cbnb.run.records import RECORDS, fault, read_record
from cbnb.run.settings import kept_template
from cbnb.run.stages import read_status
from cbnb.run.status import run_folders, run_rows, run_table
from cbnb.sweep.jobs import action, sweep_rows
from cbnb.sweep.keys import SweepPlan
from cbnb.train.same import made_from
from cbnb.widgets.dashboard import summary_bundle, take_snapshot
from cbnb.widgets.kl import newest_run, run_config
from cbnb.widgets.sweep import explorer_html, run_views, verdict_text
from forked import forked

FINISHED = Path(__file__).parent / "finished"
NAMES = ("bad", "good", "other")
BAD = "bad"
KEYS = {name: f"{i}" * 64 for i, name in enumerate(NAMES)}
PLANNED = [{"dir": name, "parameters": {"seed": i}, "key": KEYS[name]} for i, name in enumerate(NAMES)]
FILES = (
    "status.json",
    "params.json",
    "config.json",
    "result.json",
    "metrics.jsonl",
    "preflight.json",
    "key.json",
    "code.json",
    "answers.jsonl",
    "chat_template.json",
    "made_from.json",
    "../sweep.json",
    "../jobs/0001.json",
)
HUGE = 10**400
DATES = ("2026-01-31T12:00:00", "9999-12-31T23:59:59+00:00", "2026-13-45T00:00:00+00:00", "now")
VALUES = (
    None,
    True,
    -1,
    0,
    0.5,
    HUGE,
    -1e999,
    float("nan"),
    "",
    "x" * 30_000,
    "\x1b[31m\u202e\ud800",
    *DATES,
    [],
    [1],
    {},
    {"a": {"b": [None]}},
    [[[[[]]]]],
)


@pytest.fixture
def sweep(tmp_path):
    "Three finished runs of one sweep, with its plan and the record of a submission."
    folder = tmp_path / "runs" / "sweep"
    for name in NAMES:
        shutil.copytree(FINISHED, folder / name)
        write_json(folder / name / "key.json", {"key": KEYS[name]})
        parameters = json.loads((FINISHED / "params.json").read_text())
        write_json(folder / name / "params.json", parameters | {"seed": NAMES.index(name)})
    plan = {"name": "sweep", "notebook": "train.ipynb", "spec": {}, "runs": PLANNED}
    write_json(folder / "sweep.json", plan)
    (folder / "jobs").mkdir()
    arrays = [{"name": "cbnb-sweep-1-0", "job": "17", "offset": 0, "runs": list(NAMES)}]
    submitted = {"submitted": "2026-11-29T04:00:00+00:00", "arrays": arrays, "report": None}
    write_json(folder / "jobs" / "0001.json", submitted)
    return folder


def running(folder):
    "Makes the run in `folder` one that this very moment trains, in the parent of this process."
    pid = os.getppid()
    status = json.loads((folder / "status.json").read_text())
    mine = {**identity(), "pid": pid, "pid_started": process_start(pid)}
    write_json(folder / "status.json", status | {"state": "running", "stage": "training"} | mine)


# --- damage ---


def places(value, at=()):
    "The places of all values in a JSON `value`."
    yield at
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in inside:
        yield from places(inner, (*at, key))


def changed(value, at, how):
    "A copy of `value` with another entry at the place `at` (`how`: a function of the old), or none (None)."
    if not at:
        return how(value)
    copy = value.copy()
    if how is None and len(at) == 1:
        del copy[at[0]]
    else:
        copy[at[0]] = changed(value[at[0]], at[1:], how)
    return copy


def damaged(data, rng, path):
    "Damages the file `path`, whose bytes are `data`; returns what was done, in words."
    how = rng.choice(
        (
            "cut",
            "bytes",
            "binary",
            "empty",
            "foreign",
            "nested",
            "endless",
            "pipe",
            "folder",
            "twice",
            *["value"] * 8,
            *["gone"] * 3,
        )
    )
    path.unlink()
    if how == "endless":
        with open(path, "wb") as f:
            f.truncate(1 << 40)
    elif how == "pipe":
        os.mkfifo(path)
    elif how == "folder":
        path.mkdir()
    elif how in ("value", "gone"):
        lines = data.splitlines() if path.suffix == ".jsonl" else [data]
        number = rng.randrange(len(lines))
        value = json.loads(lines[number])
        at = rng.choice([place for place in places(value) if place or how == "value"])
        new = rng.choice(VALUES)
        lines[number] = json.dumps(changed(value, at, None if how == "gone" else lambda old: new)).encode()
        path.write_bytes(b"\n".join(lines) + b"\n")
        return f"{how} {at} {new!r:.40}"
    else:
        at = rng.randrange(len(data))
        path.write_bytes(
            {
                "cut": data[:at] + b"\n",
                "binary": rng.randbytes(3000),
                "empty": b"",
                "bytes": data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :],
                "foreign": b'{"run": {"id": 7}, "state": "FINISHED", "runs": 3}\n',
                "nested": b"[" * 50_000 + b"\n",
                "twice": data.replace(b"{", b'{"state": "x", "state": "x", ', 1),
            }[how]
        )
    return how


def whole(path):
    "Whether the file `path` is in order, by the schema and Python's own JSON reader."
    kind = "jobs" if path.parent.name == "jobs" else path.name
    if not path.is_file() or path.stat().st_size > 1 << 30:
        return False
    data = path.read_bytes()
    lines = data.splitlines() if path.suffix == ".jsonl" else [data]

    def pairs(found):
        return dict(found) if len(dict(found)) == len(found) else 1 / 0

    try:
        values = [json.loads(line.decode(), object_pairs_hook=pairs) for line in lines]
    except (ValueError, RecursionError, ZeroDivisionError):
        return False
    return all(isinstance(value, dict) and not fault(kind, value) for value in values)


# --- everything that reads runs ---


def told_by(sweep):
    """What each reader says: `{reader: (rows of the whole runs, words on the bad one)}`. None may raise,
    but those that are asked for the bad run alone may refuse it, in one sentence."""
    runs, said = [{"dir": run["dir"], "key": {"key": run["key"]}} for run in PLANNED], {}
    plan = SweepPlan(sweep, {}, Path("train.ipynb"), runs, 0, [])
    for name, rows in (("status", run_rows(run_folders(sweep.parent))), ("ablate", sweep_rows(plan))):
        assert sorted(row["run"] for row in rows) == list(NAMES)
        assert all(action(row) in ("skip", "leave", "start", "resume") for row in rows)
        json.dumps(rows)
        notes = "".join(row["note"] for row in rows if row["run"] == BAD)
        said[name] = [row for row in rows if row["run"] != BAD], notes
    found = read_sweep([sweep])
    frame = found.frame.set_index("run").drop(columns=[c for c in found.parameters if c != "seed"])
    assert sorted(frame.index) == list(NAMES)

    def measured(row):
        return {k: v for k, v in row.items() if v == v and v is not None}

    rows = {run: measured(row) for run, row in frame.to_dict("index").items()}
    said["report"] = {run: rows[run] for run in NAMES if run != BAD}, "\n".join(found.notes)
    for name in NAMES:
        views = summary_bundle(take_snapshot(sweep / name))["text/plain"]
        if name == BAD:
            said["dashboard"] = None, views
    for ask in (
        describe_run,
        read_metrics,
        kept_lines,
        kept_template,
        run_config,
        run_parameters,
        made_from,
        lambda path: newest_run(path.parent),
    ):
        with contextlib.suppress(RunError, FileNotFoundError, ConfigError):
            ask(sweep / BAD)
    return said, found


# which reader reads which file of a finished run; of one that is running, `cbnb status` reads how far it is
READ_BY = {
    "status.json": ("status", "ablate", "report", "dashboard"),
    "key.json": ("ablate", "report"),
    "params.json": ("report",),
    "config.json": ("report", "dashboard"),
    "result.json": ("report",),
    "metrics.jsonl": ("report", "dashboard"),
    "sweep.json": ("report",),
    "code.json": ("report",),
}


@pytest.mark.slow
def test_damage_of_any_file_is_told_and_hides_nothing(sweep, capsys):
    rng, cases, unsound = random.Random(20), 0, 0
    for live in (False, True):
        if live:
            running(sweep / BAD)
        before, _ = told_by(sweep)
        for file in FILES:
            path = (sweep / BAD / file).resolve()
            data = path.read_bytes()
            for _ in range(10):
                what = f"{file}: {damaged(data, rng, path)}"
                sound = whole(path)
                said, found = told_by(sweep)
                for reader, (others, words) in said.items():
                    assert file == "../jobs/0001.json" or others == before[reader][0], (what, reader)
                    told = sound or reader not in READ_BY.get(path.name, ())
                    assert told or path.name in words, (what, reader, words)
                if not sound and cases % 40 == 0:
                    page, text = sweep_page(found, sweep, {}), verdict_text(found)
                    assert all(name in page and name in text for name in NAMES)
                    assert run_views(found, BAD) and explorer_html(found) and len(run_table(sweep)) == 3
                    assert main(["status", str(sweep)]) == 0
                    assert len(capsys.readouterr().out.splitlines()) == 4
                shutil.rmtree(path) if path.is_dir() else path.unlink()
                path.write_bytes(data)
                cases, unsound = cases + 1, unsound + (not sound)
    assert cases == 2 * 10 * len(FILES) and unsound > cases // 2
    after, _ = told_by(sweep)
    assert all(after[reader] == before[reader] for reader in ("status", "ablate", "report"))


# what each file must not say: changed by hand, in the finished run, at the place of its field
WRONG = {
    "status.json": [
        ({"state": "finished"}, "state"),
        ({"pid": True}, "pid"),
        ({"pid": 0}, "pid"),
        ({"pid_started": 17}, "pid_started"),
        ({"attempt": -1}, "attempt"),
        ({"started": DATES[0]}, "started"),
        ({"updated": DATES[2]}, "updated"),
        ({"training_started": DATES[1]}, "training_started"),
        ({"resumed_step": -3}, "resumed_step"),
        ({"training_seconds": 1e999}, "training_seconds"),
        ({"error": ["x"]}, "error"),
        ({"later": HUGE}, "later"),
        ({"alarms": "dead"}, "alarms"),
        ({"alarms": [{"alarm": "dead", "step": "7"}]}, "alarms[0].step"),
        ({"floor": {"dtype": "float32", "kl": "0"}}, "floor.kl"),
        ({"node": "x" * 30_000}, "node"),
    ],
    "params.json": [
        ({"beta_kl": float("nan")}, "beta_kl"),
        ({"seed": HUGE}, "seed"),
        ({"data": {"x": [-1e999]}}, "data"),
        ({"total_steps": 10**15}, None),
    ],
    "config.json": [
        ({"total_steps": 0}, "total_steps"),
        ({"beta_kl": "0.3"}, "beta_kl"),
        ({"target_layers": []}, "target_layers"),
        ({"total_steps": 10**15}, "total_steps"),
    ],
    "result.json": [
        ({"after": []}, "after"),
        ({"after": {"attack_success": 1.5}}, "attack_success"),
        ({"after": {"counts": {"unparseable": [3, 2]}}}, "unparseable"),
        ({"alarms": [7]}, "alarms[0]"),
        ({"after": {"n": {"attack": True}}}, "attack"),
        ({"after": {"decoding": {"temperature": 1.0}}}, "samples"),
        ({"data": {"notes": "x"}}, "notes"),
        ({"before": {"exact_match": None}}, "exact_match"),
    ],
    "preflight.json": [
        ({"verdict": "maybe"}, "verdict"),
        ({"checks": [{"name": "masks", "verdict": "fail"}]}, "points"),
        ({"checks": None}, "checks"),
    ],
    "made_from.json": [({"same": {"data": {"x": 1}}}, "data"), ({"told": None}, "told")],
    "key.json": [({"key": "x"}, "key"), ({"data": 3}, "data")],
    "code.json": [({"source": [1]}, "source")],
    "chat_template.json": [({"sha256": "x"}, "sha256"), ({"template_variables": []}, "template_variables")],
}
LINES = (
    ("metrics.jsonl", {"step": 2.5}, "step"),
    ("metrics.jsonl", {"step": -1}, "step"),
    ("metrics.jsonl", {"step": 7, "loss_kl": float("nan")}, "loss_kl"),
    ("metrics.jsonl", {"step": True}, "step"),
    ("answers.jsonl", {"ids": [1, True]}, "ids[1]"),
    ("answers.jsonl", {"attempt": -1}, "attempt"),
    ("episodes.jsonl", {"meta": {"task": "a", "kind": "plain"}}, "group"),
    ("episodes.jsonl", {"messages": "none"}, "messages"),
)
META = {
    "task": "a",
    "kind": "plain",
    "group": "benign",
    "outcome": "over",
    "checks": {"utility": True},
    "turns": 2,
}
EPISODE = {"key": "k", "stage": "before", "id": "before/a", "messages": [], "meta": META}
READS = {"metrics.jsonl": read_metrics, "answers.jsonl": kept_lines}


def test_what_no_run_writes_is_refused_by_its_reader(sweep):
    for name, changes in WRONG.items():
        path = sweep / BAD / name
        good = json.loads(path.read_text())
        assert read_record(path) == good
        for change, field in changes:
            path.write_text(json.dumps(good | change))
            if field is None:
                assert read_record(path), "a notebook of one's own may have such a parameter"
            else:
                with pytest.raises(RunError, match=f"{name} is not in order") as e:
                    read_record(path)
                assert field in str(e.value) and str(e.value).count("\n") == 0 and len(str(e.value)) < 600
        path.write_text(json.dumps(good))
    (sweep / BAD / "episodes.jsonl").write_text(json.dumps(EPISODE) + "\n")
    assert kept_lines(sweep / BAD, "episodes") == {"k": EPISODE}
    for file, line, field in LINES:
        path, read = sweep / BAD / file, READS.get(file, partial(kept_lines, name="episodes"))
        data = path.read_text()
        lines = data.splitlines()
        path.write_text(data + json.dumps(json.loads(lines[-1]) | line) + "\n")
        words = f"{file} line {len(lines) + 1} is not in order"
        with pytest.raises(RunError, match=words) as e:
            read(path.parent)
        assert field in str(e.value)
        path.write_text(data)
    (sweep / BAD / "episodes.jsonl").unlink()
    # the last ones in test_attacks.py and test_tamper.py
    elsewhere = {"sweep.json", "jobs", "evaluated", "attacks.json", "tamper.json", "points.jsonl"}
    assert set(WRONG) | {file for file, *_ in LINES} | elsewhere >= set(RECORDS)


def test_a_submission_that_cannot_be_read_starts_nothing(sweep):
    "Whether SLURM has a run is not known then, and a second start is worse than a wait."
    write_json(sweep / "good" / "status.json", {"state": "queued"})
    (sweep / "jobs" / "0001.json").write_text('{"arrays": [{"name": 7}]}')
    rows = {row["run"]: row for row in run_rows(run_folders(sweep))}
    states = {name: row["state"] for name, row in rows.items()}
    assert states == {"bad": "done", "other": "done", "good": "unreadable"}
    assert not rows["good"]["free"]
    assert "0001.json is not in order" in rows["good"]["note"] and action(rows["good"], retry=True) == "leave"


def test_folders_of_others_are_listed(sweep):
    "What nobody else may look into, as a user who is not root: a run, a run's file, and a folder of runs."
    with tempfile.TemporaryDirectory() as folder:  # pytest's own is root's alone
        os.chmod(folder, 0o755)
        look_from_outside(Path(shutil.copytree(sweep, Path(folder) / "runs" / "sweep")))


def look_from_outside(sweep):
    "Closes a part of a folder of runs and reads it as another user."
    for path in (sweep, *sweep.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    (sweep / "bad").chmod(0)
    (sweep / "other" / "status.json").chmod(0)
    (private := sweep.parent / "private").mkdir()
    (private / "run").mkdir()
    private.chmod(0)
    (passable := sweep.parent / "passable").mkdir(0o111)

    def look():
        if os.getuid() == 0:
            os.setuid(65534)
        rows = {row["run"]: row for row in run_rows(run_folders(sweep.parent))}
        closed = dict.fromkeys(("bad", "other", "private", "passable"), "unreadable")
        assert {name: row["state"] for name, row in rows.items()} == {"good": "done"} | closed, rows
        assert all("cannot be" in row["note"] for name, row in rows.items() if name != "good")
        found = read_sweep([sweep, private, passable])
        assert set(NAMES) <= set(found.frame.run) and found.frame.set_index("run").state["good"] == "done"
        views = {name: summary_bundle(take_snapshot(sweep / name))["text/plain"] for name in NAMES}
        assert all(name in views[name] and name in verdict_text(found) for name in NAMES)
        assert main(["status", str(sweep.parent)]) == 0

    done = forked(look)
    assert done.returncode == 0 and "unreadable" in done.stdout, done.stdout[-3000:]
    for path in (sweep / "bad", private):
        path.chmod(0o700)


def test_the_end_of_a_run_whose_status_is_no_more_is_told(sweep, capsys):
    path = sweep / BAD
    write_json(path / "status.json", {"state": "running", "stage": None})
    (path / "preflight.json").write_text("{")
    assert close_run(path, 1) == "failed" and "preflight.json is not readable" in read_status(path)["error"]
    (path / "status.json").write_text("{")
    with pytest.raises(RunError, match="status.json is not readable"):
        close_run(path, 1)


@pytest.mark.parametrize("value", ["x", [1], -1e300, {}])
def test_a_parameter_of_no_kind_hides_no_other_run(tmp_path, value):
    sweep = tmp_path / "sweep"
    for seed, beta in enumerate((0.0, 0.3, 0.3)):
        specimen_run(sweep / f"run{seed}", beta, seed, kl_temperature=value if seed == 1 else 2.0)
    found = read_sweep([sweep])
    frame = found.frame.set_index("run")
    assert (
        dict(frame["state"]) == {"run0": "done", "run1": "unreadable", "run2": "done"}
        and "kl_temperature" in frame.loc["run1", "error"]
    )
    assert "kl_temperature" not in frame or frame["kl_temperature"].dropna().tolist() == [2.0, 2.0], (
        "numbers stay numbers"
    )
    write_sweep(found, tmp_path / "report")
    for text in ((tmp_path / "report" / "report.html").read_text(), verdict_text(found)):
        assert "run1" in text and "kl_temperature" in text


@pytest.mark.parametrize(
    "more", [[-1], range(60), [999_999_998]], ids=["a step again", "the log again", "beyond the end"]
)
def test_a_log_of_two_writers_has_no_figures(tmp_path, more):
    specimen_run(tmp_path / "sweep" / "run", 0.3, 0)
    log = tmp_path / "sweep" / "run" / "metrics.jsonl"
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    again = [rows[i] if i < len(rows) else {"step": i} for i in more]
    log.write_text(
        "".join(json.dumps(row) + "\n" for row in [*rows, *(row | {"loss_kl": 50.0} for row in again)])
    )
    found = read_sweep([tmp_path / "sweep"])
    assert found.frame["loss_kl"].isna().all() and any("does not count" in note for note in found.notes), (
        found.notes
    )


def test_reading_bad_lines_and_records_ends(tmp_path):
    specimen_run(tmp_path / "run", 0.3, 0)
    log, status = tmp_path / "run" / "metrics.jsonl", tmp_path / "run" / "status.json"
    log.write_bytes(b"{}\n" * 500_000)
    start = time.process_time()
    rows, words = log_rows(tmp_path / "run")
    assert not rows and "over 10,000 lines" in words[0] and time.process_time() - start < 5
    status.write_text('{"state": "done", "x": [' + "0," * 3_000_000 + "0]}")
    with pytest.raises(RunError, match="at most 4,194,304 are read"):
        read_status(tmp_path / "run")


def test_no_file_of_a_report_holds_a_secret(tmp_path, monkeypatch):
    "Nor the frame as Parquet, which is no text: a parameter that differs is a column of texts."
    monkeypatch.setenv("SOME_TOKEN", secret := "qWeRtYuIoPaSdFgHjKlZxCvBnM0")
    for seed, tools in enumerate(("/data", f"/data/{secret}/x")):
        specimen_run(run := tmp_path / "sweep" / f"run{seed}", 0.3, seed)
        parameters = json.loads((run / "params.json").read_text())
        # by hand: cbnb itself would not write it
        (run / "params.json").write_text(json.dumps(parameters | {"tools": tools}))
    found = read_sweep([tmp_path / "sweep"])
    assert found.frame["tools"].str.contains(secret).tolist() == [False, True]
    write_sweep(found, tmp_path / "report")
    tables = [
        pd.read_parquet(tmp_path / "report" / "runs.parquet").to_csv(),
        *((tmp_path / "report" / name).read_text() for name in ("runs.csv", "report.html")),
    ]
    assert all(secret not in text for text in tables) and all("[removed]" in text for text in tables[:2])


def test_the_newest_notebook_is_that_of_the_last_attempt(tmp_path):
    run = tmp_path / "sweep" / "run"
    specimen_run(run, 0.3, 0)
    assert newest_notebook(run) is None
    for name in ("out.9.ipynb", "out.10.ipynb", "out.10.rank1.ipynb", "out.x.ipynb"):
        (run / name).write_text("{}")
    assert newest_notebook(run).name == "out.10.ipynb"
    assert link_to(run, tmp_path) == "sweep/run/out.10.ipynb" and "out.10.ipynb</a>" in run_views(
        read_sweep([run.parent]), "run"
    )
