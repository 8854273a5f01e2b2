"""What `data` may name, in every command: globs, labels, formats and shares, records that are skipped, tools
that files do not carry, truncation."""

import json
import re
import sys

import pytest

from cbnb.cli import main
from cbnb.data import sources as S
from cbnb.transcripts.reader import read_transcripts, write_transcripts
from cbnb.transcripts.record import Transcript, TranscriptError
from cbnb.transcripts.tinyworld import make_transcripts
from forked import cells
from helpers import NBS, ROOT
from test_holdout import write_runs
from train_common import few, load

FIXTURES = ROOT / "tests" / "fixtures"
TINY = ("--model", "tinyagent", "--show", "0")


def plain_chats(path, n, **more):
    "A file of `n` chats without a label, each with `more`."
    chat = [
        {"role": "user", "content": "What is the weather?"},
        {"role": "assistant", "content": "Cold and wet."},
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        "".join(json.dumps({"id": f"{path.stem}-{i}", "messages": chat, **more}) + "\n" for i in range(n))
    )
    return path


# --- what an entry says ---


def test_folders_globs_and_links_that_are_named(tmp_path):
    """Links are followed where they are named, by themselves or by a glob, and not inside a folder; the order
    is that of the names."""
    store = plain_chats(tmp_path / "store" / "c.jsonl", 2, label="benign")
    for name in ("b", "a"):
        plain_chats(tmp_path / "logs" / f"{name}.jsonl", 2, label="benign")
    (tmp_path / "logs" / "c.jsonl").symlink_to(store)
    (tmp_path / "all").symlink_to(tmp_path / "logs")

    def ids(text):
        return [t.id for t in S.open_source(text)]

    inside = ["a-0", "a-1", "b-0", "b-1"]
    assert ids(tmp_path / "logs") == ids(tmp_path / "all") == inside
    assert ids(f"{tmp_path}/logs/*.jsonl") == ids(f"{tmp_path}/log[s]/?.jsonl") == [
        *inside,
        "c-0",
        "c-1",
    ] and ids(tmp_path / "logs" / "c.jsonl") == ["c-0", "c-1"]
    assert ids(f"{tmp_path}/a*") == inside, "a folder that a glob names"
    assert [t.source for t in S.open_source(f"{tmp_path}/*/b.jsonl")][0] == "all/b.jsonl"
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "x.jsonl").symlink_to(store)
    with pytest.raises(TranscriptError, match="1 links, which are followed where a glob names them"):
        ids(tmp_path / "linked")


@pytest.mark.parametrize(
    "text, words",
    [
        ("chat.jsonl:benig", "did you mean 'benign'"),
        ("chat.jsonl@0", "draws a share of '0'"),
        ("chat.jsonl@1.01", "draws a share of '1.01'"),
        ("chat.jsonl@nan", "'nan'"),
        ("chat.jsonl@half", "'half'"),
        ("chat.jsonl@0.5@0.5", "says its share twice"),
        ("*.json", "matches no file"),
        ("gone.jsonl:harmful", "gone.jsonl: no such file"),
        ("chat.jsonl:openai:harmful:sharegpt", "says its format twice"),
    ],
)
def test_what_cannot_be_meant_is_refused(text, words, tmp_path):
    plain_chats(tmp_path / "chat.jsonl", 2)
    with pytest.raises(TranscriptError, match=words):
        S.read_entry(f"{tmp_path}/{text}")


def test_names_with_signs_are_names(tmp_path):
    """A colon, an @ or a bracket in a name that is there; of two readings the one that is there as written
    counts."""
    for name in ("a:benign", "b@0.5.jsonl", "c[1].jsonl", "d.jsonl@0.5", "d.jsonl"):
        plain_chats(tmp_path / name, 10)
    for name in ("a:benign", "b@0.5.jsonl", "c[1].jsonl", "d.jsonl@0.5"):
        assert S.read_entry(tmp_path / name) == S.Entry(str(tmp_path / name))
        assert S.absolute_entry(f"{tmp_path}/{name}:harmful@0.2") == f"{tmp_path}/{name}:harmful@0.2"
        assert len(list(S.open_source(f"{tmp_path}/{name}:harmful@0.2"))) == 2


def test_a_share_is_exact_the_same_each_time_and_of_every_file(tmp_path):
    for name in "ab":
        plain_chats(tmp_path / f"{name}.jsonl", 50)
    reading = S.Reading()
    drawn = reading.read([f"{tmp_path}/*.jsonl:benign@0.3"])
    assert (
        len(drawn) == 30 and {t.label for t in drawn} == {"benign"} and {t.id[0] for t in drawn} == {"a", "b"}
    )
    assert S.Reading().read([f"{tmp_path}/*.jsonl:benign@0.3"]) == drawn
    assert [*reading.shares.values()] == [
        {"of": 100, "taken": 30}
    ] and "30 of 100 transcripts" in reading.lines()[0]
    with pytest.raises(TranscriptError, match="draws nothing"):
        S.Reading().read([f"{tmp_path}/a.jsonl:benign@0.001"])


# --- records that are skipped ---


def broken_file(folder):
    "12 good transcripts, and three records with two faults."
    path = folder / "some.jsonl"
    write_transcripts(path, make_transcripts("injection", 24) + make_transcripts("plain", 24))
    with open(path, "a") as f:
        f.write('{"messages": 3}\n{"messages": 4}\n{broken\n')
    return path


@pytest.mark.slow
def test_skipping_is_told_in_the_run_its_report_and_its_card(tmp_path):
    "By cause, with the share above which it is refused; without on_error the first bad record ends the run."
    data, run = broken_file(tmp_path), tmp_path / "run"
    given = few(tmp_path, data=data, eval_data="", total_steps=2)
    done = cells(*given, "-p", "on_error", "skip", "-p", "run_dir", run)
    assert done.returncode == 0, done.stdout[-3000:]
    note = "3 of 51 records skipped: 2 × messages: is missing or empty"
    result = load(run / "result.json")
    assert (
        result["data"]["skipped"]
        and sum(result["data"]["skipped"].values()) == 3
        and result["data"]["records"] == 48
    )
    for text in (done.stdout, (run / "report.html").read_text(), (run / "adapter" / "README.md").read_text()):
        assert note in text
    refused = cells(
        *given, "-p", "on_error", "skip", "-p", "max_skipped", 0.05, "-p", "run_dir", tmp_path / "two"
    )
    assert refused.returncode and "3 of 51 records are skipped, above max_skipped 0.05" in refused.stdout
    stopped = cells(*given, "-p", "run_dir", tmp_path / "three")
    assert stopped.returncode and "some.jsonl, line 49, messages: is missing or empty" in stopped.stdout
    wrong = cells(*given, "-p", "on_error", "ignore", "-p", "run_dir", tmp_path / "four")
    assert wrong.returncode and "on_error is 'ignore'" in wrong.stdout and not (tmp_path / "four").exists()


def test_an_evaluation_reads_as_its_run_did(tmp_path):
    "Unless it is told otherwise; a setting that cannot be is refused before anything is loaded."
    from cbnb.basics.jsonfiles import RunError
    from cbnb.evaluate.adapters import Adapter, check_evaluation, questions_for, reading_for

    run = Adapter("r", None, tmp_path, {"data": str(broken_file(tmp_path)), "on_error": "skip", "tools": ""})
    assert len(questions_for([run], f"{tmp_path}/*.jsonl:openai@0.5")) == 24
    with pytest.raises(TranscriptError):
        questions_for([run], f"{tmp_path}/some.jsonl", reading_for([run], on_error="raise"))
    assert reading_for([Adapter("none")]) == S.Reading()
    given = {
        "adapter": "none",
        "second_adapter": "",
        "eval_data": f"{tmp_path}/some.jsonl",
        "model": "tinyagent",
    }
    for more, words in (
        ({"on_error": "drop"}, "on_error is 'drop'"),
        ({"eval_data": f"{tmp_path}/*.json"}, "eval_data names .*matches no file"),
    ):
        with pytest.raises(RunError, match=words):
            check_evaluation(given | more)


# --- AgentDojo's log folder ---


def log_folder(folder):
    """A log folder as AgentDojo's benchmark writes it: runs, injection tasks given as the user's request, an
    attack that denies service, a run that broke off."""
    write_runs(folder, 8, 5)
    task = json.loads((folder / "office" / "user_task_0" / "none" / "none.json").read_text())
    attacked = json.loads(
        (folder / "office" / "user_task_0" / "direct" / "injection_task_0.json").read_text()
    )
    made = {
        f"injection_task_{j}/none/none.json": task | {"user_task_id": f"injection_task_{j}"} for j in range(5)
    }
    made |= {
        f"user_task_{i}/dos/injection_task_0.json": attacked
        | {"user_task_id": f"user_task_{i}", "attack_type": "dos"}
        for i in range(2)
    }
    made |= {
        "user_task_3/other/injection_task_1.json": attacked
        | {"attack_type": "other", "error": "context_length_exceeded", "utility": False},
        "user_task_4/other/injection_task_1.json": attacked
        | {"attack_type": "other", "security": None, "utility": None},
    }
    for name, run in made.items():
        (folder / "office" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "office" / name).write_text(json.dumps(run))
    return folder


LEFT = (
    "5 injection tasks given as the user's request left out",
    "2 attacks that deny service left out",
    "2 attacked runs that broke off left out",
)


@pytest.mark.slow
def test_a_log_folder_trains_and_preflights_as_it_is(tmp_path):
    "What measured nothing is left out and counted, in the run's result and by pre-flight."
    from forked import cells
    from test_preflight import review
    from train_common import few, load

    logs = log_folder(tmp_path / "logs")
    done = cells(*few(tmp_path, data=logs, eval_data="", total_steps=2), "-p", "run_dir", tmp_path / "run")
    assert done.returncode == 0, done.stdout[-3000:]
    kept = load(tmp_path / "run" / "result.json")["data"]
    assert kept["left_out"] == {
        "injection tasks given as the user's request": 5,
        "attacks that deny service": 2,
        "attacked runs that broke off": 2,
    }
    assert kept["records"] == 48 and all(any(words in note for note in kept["notes"]) for words in LEFT)
    made, _ = review(tmp_path / "page", tmp_path, only="masks", data=str(logs), eval_data="")
    [masks] = [c for c in made["checks"] if c["name"] == "masks"]
    told = [p["text"] for p in masks["points"]]
    assert all(any(words in text for text in told) for words in LEFT) and masks["verdict"] != "fail", masks[
        "points"
    ]


def test_the_files_of_a_log_folder_by_a_glob_are_the_folder(tmp_path):
    logs = log_folder(tmp_path / "logs")
    by_folder, by_glob = (S.open_source(text) for text in (logs, f"{logs}/*/*/*/*.json"))
    assert {t.id for t in by_folder} == {t.id for t in by_glob} and by_folder.left_out == by_glob.left_out
    alone = logs / "office" / "injection_task_0" / "none" / "none.json"
    with pytest.raises(TranscriptError, match="label='benign' or label='harmful'"):
        list(S.open_source(alone))
    assert [t.label for t in S.open_source(f"{alone}:harmful")] == ["harmful"]


# --- tools ---


def package(folder, files):
    "Writes Python `files` (name: source) into `folder`, with the packages they stand in."
    for name, source in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(source)
        for parent in (folder / name).relative_to(folder).parents:
            if parent.parts:
                (folder / parent / "__init__.py").touch()


@pytest.fixture
def installed(tmp_path, monkeypatch):
    "Packages with the modules and names by which AgentDojo and tau-bench give their tools."
    package(
        tmp_path / "site",
        {
            "agentdojo/task_suite/load_suites.py": "from types import SimpleNamespace as N\n"
            "schema = N(model_json_schema=lambda: {'type': 'object', 'properties': {'n': {'type': "
            "'integer'}}})\n"
            "suites = {'v1': {'office': N(tools=[N(name='read_mail', description='Reads a mail.', "
            "parameters=schema)])}}\n"
            "def get_suite(version, name): return suites[version][name]\n",
            **{
                f"tau_bench/envs/{domain}/tools/__init__.py": "class Tool:\n    @staticmethod\n    def "
                "get_info(): return {'type': 'function', "
                "'function': {'name': '%s', 'parameters': "
                "{}}}\nALL_TOOLS = [Tool]\n" % tool
                for domain, tool in (("airline", "get_flight"), ("retail", "get_order"))
            },
            **{
                f"tau_bench/envs/{domain}/wiki.py": f"WIKI = '# Rules of {domain}'\n"
                for domain in ("airline", "retail")
            },
        },
    )
    (tmp_path / "site" / "agentdojo-0.0.dist-info").mkdir()
    about = "Metadata-Version: 2.1\nName: agentdojo\nVersion: 0.0\n"
    (tmp_path / "site" / "agentdojo-0.0.dist-info" / "METADATA").write_text(about)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    real = forget_packages()  # the real AgentDojo, which another test may have imported
    yield
    forget_packages()
    sys.modules.update(real)


def forget_packages():
    "Take AgentDojo and tau-bench out of what is imported; returns them."
    names = [name for name in sys.modules if name.partition(".")[0] in ("agentdojo", "tau_bench")]
    return {name: sys.modules.pop(name) for name in names}


def test_tools_of_installed_packages(tmp_path, installed):
    """Of a run's own suite and version, or by the policy or the calls of tau-bench's domain; what is not
    known is told."""
    write_runs(tmp_path / "logs", 2, 2)
    reading = S.Reading(tools="installed")
    found = reading.read([tmp_path / "logs"])
    assert {t.tools[0]["function"]["name"] for t in found} == {"read_mail"} and reading.given_tools == {
        "agentdojo 0.0": 6
    }
    assert all(
        t.tools[0]["function"]["parameters"]["properties"] == {"n": {"type": "integer"}} for t in found
    )
    assert (
        "6 transcripts without tools got those of agentdojo 0.0" in reading.lines() and not reading.warned()
    )
    (run,) = json.loads((FIXTURES / "tau_bench.json").read_text())[:1]

    def trial(n, *messages):
        return run | {"task_id": n, "traj": list(messages)}

    call = {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": "a", "type": "function", "function": {"name": "get_order", "arguments": "{}"}}],
    }
    wiki, ask = (
        {"role": "system", "content": "# Rules of airline\nBe kind."},
        {"role": "user", "content": "Hi"},
    )
    (tmp_path / "tau.json").write_text(json.dumps([trial(0, wiki, ask), trial(1, ask, call), trial(2, ask)]))
    reading = S.Reading(tools="installed")
    names = [t.tools and t.tools[0]["function"]["name"] for t in reading.read([tmp_path / "tau.json"])]
    assert (
        names == ["get_flight", "get_order", None]
        and reading.given_tools == {"tau_bench": 2, "": 1}
        and "1 transcripts use tools" in reading.warned()[0]
    )


def test_tools_of_a_package_that_is_not_there(tmp_path, monkeypatch):
    "Asked for, it is an error that says what to do; not asked for, its lack is told."
    # its modules too, where an earlier test of this process has imported them
    for name in ["agentdojo", *(name for name in sys.modules if name.startswith("agentdojo."))]:
        monkeypatch.setitem(sys.modules, name, None)
    write_runs(tmp_path / "logs", 2, 2)
    with pytest.raises(TranscriptError, match="agentdojo is not installed here"):
        S.Reading(tools="installed").read([tmp_path / "logs"])
    (reading := S.Reading()).read([tmp_path / "logs"])
    assert "6 transcripts use tools whose schemas they do not carry" in reading.warned()[0]


def test_tools_of_a_file_reach_the_prompt(tmp_path, capsys):
    "By suite or for all; a transcript that has its own keeps them, and `cbnb convert` says whose it wrote."
    write_runs(tmp_path / "logs", 2, 2)
    schema = {
        "name": "read_mail",
        "description": "Reads one.",
        "parameters": {"type": "object", "properties": {"n": {"type": "integer"}}},
    }
    for name, value in (("list", [schema]), ("suites", {"office": [schema]}), ("other", {"bank": [schema]})):
        (tmp_path / f"{name}.json").write_text(json.dumps(value))
    for name, n in (("list", 6), ("suites", 6), ("other", 0)):
        out = tmp_path / f"{name}.jsonl"
        assert (
            main(["convert", str(tmp_path / "logs"), str(out), "--tools", str(tmp_path / f"{name}.json")])
            == 0
        )
        assert sum(bool(t.tools) for t in read_transcripts(out)) == n and (
            f"adapted: 6 × tools from {name}.json" in capsys.readouterr().out
        ) == bool(n)
    assert (
        main(["masks", str(tmp_path / "logs"), *TINY, "--tools", str(tmp_path / "list.json"), "--json"]) == 0
    )
    with_tools = json.loads(capsys.readouterr().out.splitlines()[-1])["summary"]["tokens"]
    assert main(["masks", str(tmp_path / "logs"), *TINY, "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["summary"]["tokens"] < with_tools


# --- every command ---


def test_commands_take_the_same_entries(tmp_path, capsys):
    """masks, spans, convert, the explorers: label, share and glob; a mistake is one sentence, and no output
    stands among the inputs."""
    for name in "ab":
        plain_chats(tmp_path / f"{name}.jsonl", 10)
    entry, other = f"{tmp_path}/*.jsonl:benign@0.5", plain_chats(tmp_path / "other" / "c.jsonl", 10)
    assert main(["masks", entry, *TINY, "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["summary"]["labels"] == {"benign": 10}
    assert main(["spans", entry]) == 0 and "10 transcripts (0 harmful)" in capsys.readouterr().out
    assert (
        main(["convert", entry, str(tmp_path / "out")]) == 0
        and len(list(read_transcripts(tmp_path / "out"))) == 10
    )
    assert (
        main(["convert", entry, str(tmp_path / "a.jsonl")]) == 2
        and main(["masks", f"{tmp_path}/a.jsonl:bad", *TINY]) == 2
    )
    assert "is neither a label" in capsys.readouterr().err
    from cbnb.widgets.kl import transcripts_to_show
    from cbnb.widgets.masks import as_shelf, mask_explorer

    assert len(as_shelf(entry).listing) == 10 and len(as_shelf(f"{entry},{other}:harmful@0.1").listing) == 11
    assert len(transcripts_to_show(entry, None)[0]) == 10
    assert "is neither a label" in mask_explorer(f"{tmp_path}/a.jsonl:bad").exploration.message


def test_a_sweep_knows_what_its_globs_name(tmp_path, monkeypatch):
    """Relative entries become absolute, with what they say; another content of any matched file is another
    run."""
    from cbnb.sweep.keys import data_hash
    from cbnb.sweep.spec import absolute_files

    monkeypatch.chdir(tmp_path)
    for name in "ab":
        plain_chats(tmp_path / "x[1]" / f"{name}.jsonl", 3)
    monkeypatch.chdir(tmp_path / "x[1]")
    whole = absolute_files("data", "*.jsonl:benign@0.5,a.jsonl:harmful,tinyagent")
    assert whole == f"{tmp_path}/x[[]1]/*.jsonl:benign@0.5,{tmp_path}/x[1]/a.jsonl:harmful,tinyagent"
    monkeypatch.chdir(tmp_path)
    assert len(S.entry_paths(whole.split(",")[0])) == 2
    first = data_hash({"data": whole}, {})
    plain_chats(tmp_path / "x[1]" / "b.jsonl", 4)
    assert data_hash({"data": whole}, {}) != first


def test_plan_and_ablate_take_them(tmp_path):
    from forked import command

    broken_file(tmp_path)
    spec = tmp_path / "sweep.yaml"
    spec.write_text(
        json.dumps(
            {
                "parameters": {"data": f"{tmp_path}/*.jsonl:openai@0.5", "on_error": "skip"},
                "grid": {"beta_kl": [0, 0.3]},
            }
        )
    )
    said = command("ablate", spec, "--dry-run", "--local", 1, runs=tmp_path / "runs")
    assert said.returncode == 0 and "2 to start" in said.stdout, said.stdout
    spec.write_text(json.dumps({"parameters": {"data": f"{tmp_path}/*.jsonl:openai@5"}}))
    assert (
        "draws a share of '5'"
        in command("ablate", spec, "--dry-run", "--local", 1, runs=tmp_path / "runs").stdout
    )


# --- truncation ---


def test_rows_that_lost_what_they_answer(tmp_path, capsys):
    """Dropped and counted by encoding, found by the audit, warned of by pre-flight; kept where that is asked
    for."""
    from cbnb.config import get_config
    from cbnb.data.streams import StreamReport, data_record, encode_stream
    from cbnb.masking.masker import ChatMasker
    from cbnb.preflight.data_checks import Survey, stream_findings
    from cbnb.step.models import load_tokenizer

    masker = ChatMasker(load_tokenizer("tinyagent"))
    short, [long] = make_transcripts("injection", 4), make_transcripts("injection", 5)[4:]
    order = long.injection_spans[0]
    messages = [
        {**m, "content": m["content"] + " and more" * 60} if i == order.message else m
        for i, m in enumerate(long.messages)
    ]
    chats = [*short, S.replace(long, messages=messages)]
    limit = max(len(e.input_ids) for e in masker.encode_batch(short))
    kept, report = encode_stream(chats, masker, "post_injection_only", limit)
    assert (
        len(kept),
        report.counts["lost_context"],
        report.counts["request_cut"],
        report.counts["injection_cut"],
    ) == (4, 1, 1, 1)
    assert (
        "1 of 5 dropped: truncation cuts off the user's request (1) or the injected message (1)"
        in report.losses()
    )
    assert any(
        "harmful: 1 of 5 dropped" in note
        for note in data_record(S.Reading(), report, StreamReport())["notes"]
    )
    [point] = [
        p
        for p in stream_findings("harmful", kept, Survey(), report, "post_injection_only")
        if "raise max_length" in p.text
    ]
    assert point.verdict == "warn" and "1 of 5 transcripts are dropped" in point.text
    everything, report = encode_stream(chats, masker, "post_injection_only", limit, lost_context="keep")
    assert (
        len(everything) == 5
        and report.counts["lost_context"] == 0
        and report.counts["injection_cut"] == 1
        and report.losses()
    )
    right, report = encode_stream(chats, masker, "assistant_only", limit, truncation="right")
    assert len(right) == 4 and (report.counts["request_cut"], report.counts["injection_cut"]) == (0, 1), (
        "what was trained before the attack is no attack"
    )
    assert get_config("base").lost_context == "drop"
    write_transcripts(tmp_path / "some.jsonl", chats)
    assert (
        main(
            [
                "masks",
                str(tmp_path / "some.jsonl"),
                *TINY,
                "--policy",
                "post_injection_only",
                "--max-length",
                str(limit),
            ]
        )
        == 1
    )
    assert re.search(
        r"^lost_context: some\.jsonl, transcript 5 .*the user's request and the injected message are cut "
        r"off by truncation",
        capsys.readouterr().out,
        re.M,
    )


def test_a_chat_of_many_turns_loses_early_questions_only():
    "The last answer's own question must be there; that of an earlier turn may be cut off."
    from cbnb.data.streams import encode_stream
    from cbnb.masking.masker import ChatMasker
    from cbnb.step.models import load_tokenizer
    from cbnb.transcripts.record import Transcript

    masker = ChatMasker(load_tokenizer("tinyagent"))
    turns = [
        m
        for i in range(6)
        for m in (
            {"role": "user", "content": f"Question {i}?"},
            {"role": "assistant", "content": f"Answer {i}."},
        )
    ]
    whole = len(masker.encode(turns).input_ids)
    kept, report = encode_stream([Transcript("chat", turns)], masker, "assistant_only", whole // 2)
    assert len(kept) == 1 and report.counts["truncated"] == 1 and not report.counts["request_cut"]


# --- what the chat template refuses ---

PARALLEL = (
    "{% for m in messages if m.tool_calls and m.tool_calls | length > 1 %}{{ raise_exception('one "
    "call at a time') }}{% endfor %}"
)


@pytest.fixture
def refused(tmp_path):
    """Parameters of a small run, in whose training and held-out files one transcript each has two calls in a
    message, which the template refuses."""
    from cbnb.step.models import load_tokenizer

    calls = [
        {"id": n, "type": "function", "function": {"name": "send_message", "arguments": {"to": n}}}
        for n in "ab"
    ]
    turns = [
        {"role": "assistant", "content": "", "tool_calls": calls},
        *({"role": "tool", "content": "ok", "tool_call_id": n} for n in "ab"),
        {"role": "assistant", "content": "done"},
    ]
    files = {}
    for name, part in (("data", slice(0, 20)), ("eval_data", slice(20, 26))):
        good = [t for kind in ("injection", "plain") for t in make_transcripts(kind, 26)[part]]
        files[name] = tmp_path / f"{name}.jsonl"
        write_transcripts(
            files[name],
            [
                *good,
                Transcript(
                    f"two-{name}", [{"role": "user", "content": f"both of {name}"}, *turns], label="benign"
                ),
            ],
        )
    (tmp_path / "one.jinja").write_text(PARALLEL + load_tokenizer("tinyagent").chat_template)
    given = {
        **files,
        "chat_template": tmp_path / "one.jinja",
        "max_new_tokens": 4,
        "total_steps": 2,
        "warmup_steps": 1,
        "batch_size": 2,
        "diagnose_steps": 0,
    }
    return [word for name, value in given.items() for word in ("-p", name, value)]


@pytest.mark.slow
def test_what_the_template_refuses_ends_a_run_with_the_ways_out_or_is_counted(refused, tmp_path):
    stopped = cells(*refused, "-p", "run_dir", tmp_path / "one")
    assert (
        stopped.returncode
        and "two-data" in stopped.stdout
        and "one call at a time" in stopped.stdout
        and "on_error=skip leaves them out, counted" in stopped.stdout
    )
    done = cells(*refused, "-p", "on_error", "skip", "-p", "run_dir", tmp_path / "two")
    assert done.returncode == 0, done.stdout[-3000:]
    kept = load(tmp_path / "two" / "result.json")
    ((cause, n),) = kept["data"]["skipped"].items()
    assert (
        n == 2
        and "one call at a time" in cause
        and kept["data"]["records"] == 52
        and any("2 of 54 records skipped" in note for note in kept["data"]["notes"])
    )
    assert kept["data"]["benign"]["transcripts"] == 20 and kept["after"]["n"]["attack"] == 6
    assert "one call at a time" in (tmp_path / "two" / "report.html").read_text()
    again = cells("-p", "adapter", tmp_path / "two", notebook=NBS / "evaluate.ipynb", runs=tmp_path / "runs")
    assert again.returncode == 0 and "1 of 13 records skipped" in again.stdout, again.stdout[-3000:]


@pytest.mark.slow
def test_preflight_names_the_adaptations_that_help(refused, tmp_path):
    def page(*more):
        return cells(*refused, "-p", "run_dir", tmp_path / "page", *more, notebook=NBS / "preflight.ipynb")

    for more in ((), ("-p", "on_error", "skip")):
        said = page(*more).stdout
        assert (
            "refuses, or writes in part only, 2 of the 54 transcripts" in said
            and "with adapt=split_calls it writes 54 of 54 in full" in said
        ), said[-3000:]
    adaptations = page("-p", "adapt", "split_calls").stdout
    assert (
        "adapted: split_calls in 1 of 41 transcripts" in adaptations
        and "the chat template refuses" not in adaptations
    ), adaptations[-3000:]
