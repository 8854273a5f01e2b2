"""Files as their sources make them: packed, as tables, as logs and sessions; what each format refuses;
conversion."""

import gzip
import json
import os
import time
import tracemalloc
import warnings
import zipfile
import zlib

import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest

from cbnb.basics.files import OutputError
from cbnb.data.convert import convert
from cbnb.data.sources import cause_of
from cbnb.transcripts import files
from cbnb.transcripts.files import BINARY, read_records
from cbnb.transcripts.formats import FORMATS, Format, add_format, from_openai
from cbnb.transcripts.packed import PACKED, TABLES
from cbnb.transcripts.reader import known_formats, read_transcripts
from cbnb.transcripts.record import InjectionSpan, TranscriptError
from helpers import ROOT

FIXTURES = ROOT / "tests" / "fixtures"
CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
CALL = {
    "id": "call_YAB9KXfe3T2BDBMyftZhdMJI",
    "type": "function",
    "function": {"name": "read", "arguments": {"path": "a"}},
}
TOOL = {"type": "function", "function": {"name": "read", "parameters": {"type": "dict"}}}


def read(path, **kwargs):
    "The transcripts of a file, without warnings."
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return list(read_transcripts(path, **kwargs))


def written(folder, *records, name="x.jsonl"):
    "A file of these records, one a line."
    (file := folder / name).write_text("".join(json.dumps(r) + "\n" for r in records))
    return file


# --- what real files hold
# -------------------------------------------------------------------------------------


def test_a_system_prompt_beside_the_messages_is_read(tmp_path):
    """In the record's own key, in Anthropic's blocks, and with spans and labels that count the record's
    messages."""
    record = {
        "system": "Be brief.",
        "messages": CHAT,
        "label": "benign",
        "message_labels": {"1": "none"},
        "injection_spans": [[0, 0, 2]],
    }
    [t] = read(written(tmp_path, record))
    assert t.messages == [{"role": "system", "content": "Be brief."}, *CHAT]
    assert (t.message_labels, t.injection_spans) == (
        {2: "none"},
        (InjectionSpan(1, 0, 2),),
    ) and "system" not in t.meta
    for key in ("system_prompt", "developer"):
        [t] = read(
            written(tmp_path, {key: [{"type": "text", "text": "No."}], "messages": CHAT, "label": "benign"})
        )
        assert t.messages[0] == {"role": "system", "content": "No."}
    with pytest.raises(TranscriptError, match=r"x.jsonl, line 1, system: stands beside a first message"):
        read(
            written(
                tmp_path, {"system": "a", "messages": [{"role": "system", "content": "b"}], "label": "benign"}
            )
        )


def test_older_forms_of_openai_are_read(tmp_path):
    messages = [
        {"role": "developer", "content": "Be brief."},
        CHAT[0],
        {
            "role": "assistant",
            "content": None,
            "function_call": {"name": "read", "arguments": '{"path": "a"}'},
        },
        {"role": "function", "name": "read", "content": "7"},
    ]
    [t] = read(written(tmp_path, {"messages": messages, "functions": [TOOL["function"]], "label": "benign"}))
    assert [m["role"] for m in t.messages] == ["system", "user", "assistant", "tool"] and t.tools == [TOOL]
    assert t.messages[2]["tool_calls"][0]["function"] == {"name": "read", "arguments": {"path": "a"}}
    assert sum(t.meta["adapted"].values()) == 4
    both = {
        "role": "assistant",
        "content": "",
        "function_call": {"name": "f", "arguments": "{}"},
        "tool_calls": [CALL],
    }
    for bad, field in (
        (both, "function_call"),
        ({"role": "assistant", "content": "", "function_call": {"name": "f"}}, "function_call"),
        ({"role": "function", "content": "7"}, "name"),
    ):
        with pytest.raises(TranscriptError, match=rf"line 1, messages\[1\]\.{field}"):
            read(written(tmp_path, {"messages": [CHAT[0], bad], "label": "benign"}))


def test_tools_as_text_and_calls_as_they_are(tmp_path):
    """A JSON string of tools; parallel calls with empty ids and long ids beside AgentDojo's notes in
    tool results."""
    parallel = [
        CHAT[0],
        {"role": "assistant", "content": "Two.", "tool_calls": [{**CALL, "id": ""}, {**CALL, "id": ""}]},
        *(
            {
                "role": "tool",
                "content": "- a",
                "tool_call_id": None,
                "tool_call": {"function": "read", "args": {}},
                "error": None,
            }
            for _ in range(2)
        ),
        {"role": "assistant", "content": "Done.", "tool_calls": []},
    ]
    ids = [
        CHAT[0],
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "7", "tool_call_id": CALL["id"]},
    ]
    a, b = read(
        written(
            tmp_path,
            {"messages": parallel, "tools": json.dumps([TOOL]), "label": "benign"},
            {"messages": ids, "label": "benign"},
        )
    )
    assert (
        a.tools == [TOOL]
        and len(a.messages[1]["tool_calls"]) == 2
        and [m["content"] for m in a.messages[2:4]] == ["- a"] * 2
    )
    assert b.messages[1]["tool_calls"] == [CALL] and b.messages[2]["tool_call_id"] == CALL["id"]


@pytest.mark.parametrize("format", [n for n in known_formats()])
@pytest.mark.parametrize("key", ["documents", "chat_template"])
def test_what_changes_the_meaning_is_never_dropped(format, key, tmp_path):
    "In any format: what the model would have read is followed or refused."
    files = {p.name: p for p in FIXTURES.iterdir()}
    known = known_formats()[format]
    names = [n for n in files if n.startswith({"openai": "agent"}.get(format, format) + ".")]
    record = next(
        r
        for _, _, r in read_records(files[names[0]])
        if known.recognises(r) and (format != "invariant" or "messages" in r)
    )
    gathered = {"claude_code": "lines", "codex": "rollout", "langchain": "messages"}.get(format)
    if gathered:
        record = {gathered: [r for _, _, r in read_records(files[names[0]])]}
    with pytest.raises(TranscriptError, match=f", {key}: changes what the model reads"):
        read(written(tmp_path, {**record, key: ["x"]}), format=format)


# --- sentences of refusal
# ------------------------------------------------------------------------------------

LINE = {
    "type": "user",
    "uuid": "u",
    "parentUuid": None,
    "sessionId": "s",
    "message": {"role": "user", "content": "a"},
}
REFUSED = [
    (
        "anthropic",
        {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
        r"messages[0].content[0]",
    ),
    (
        "anthropic",
        {"messages": [{"role": "assistant", "content": [{"type": "tool_use", "name": "f", "input": 3}]}]},
        "messages[0].content[0]",
    ),
    ("anthropic", {"messages": CHAT}, "label"),
    ("responses", {"input": [{"type": "computer_call"}]}, "input[0].type"),
    (
        "responses",
        {"input": "Hi", "output": [{"type": "function_call", "name": "f", "arguments": "{"}]},
        "output[0].arguments",
    ),
    (
        "responses",
        {"input": "Hi", "output": [{"type": "function_call_output", "output": "x"}]},
        "output[0].call_id",
    ),
    ("langchain", {"messages": [{"type": "robot", "content": "x"}]}, "messages[0].type"),
    (
        "langchain",
        {"messages": [{"type": "ai", "content": "", "invalid_tool_calls": [{"name": "f"}]}]},
        "messages[0].invalid_tool_calls",
    ),
    (
        "hermes",
        {"conversations": [{"from": "gpt", "value": "<tool_call>f()</tool_call>"}], "label": "benign"},
        "conversations[0]",
    ),
    (
        "hermes",
        {"conversations": [{"from": "gpt", "value": "<tool_call>{}"}], "label": "benign"},
        "conversations[0]",
    ),
    ("alpaca", {"instruction": "", "output": "x"}, "instruction"),
    ("alpaca", {"instruction": "x", "output": ""}, "output"),
    ("alpaca", {"instruction": "x", "output": "y", "history": [["a"]]}, "history"),
    ("preference", {"prompt": "x", "chosen": "a", "rejected": "a"}, "rejected"),
    ("preference", {"chosen": "a", "rejected": "b"}, "chosen"),
    ("inspect", {"eval": {}, "samples": []}, "samples"),
    ("inspect", {"eval": {}, "samples": [{"messages": []}]}, "messages"),
    (
        "inspect",
        {"eval": {}, "samples": [{"messages": [{"role": "user", "content": "attachment://x"}]}]},
        "messages[0]",
    ),
    (
        "inspect",
        {"eval": {}, "samples": [{"messages": [{"role": "tool", "content": "", "error": {}}]}]},
        "messages[0].error",
    ),
    (
        "invariant",
        {"metadata": {"user_task_id": "user_task_0", "injection_task_id": "i"}, "messages": CHAT},
        "metadata, security",
    ),
    ("tau2_bench", {"info": {}, "simulations": [{"messages": []}]}, "messages"),
    (
        "tau2_bench",
        {"info": {}, "simulations": [{"messages": [{"role": "tool", "tool_messages": 3}]}]},
        "messages[0].tool_messages",
    ),
    ("swe_agent", {"trajectory": [], "history": []}, "history"),
    (
        "mini_swe_agent",
        {"trajectory_format": "mini-swe-agent-1", "messages": [{"role": "exit", "content": ""}]},
        "messages",
    ),
    (
        "openhands",
        {"history": [{"source": "agent", "action": "run", "args": {}}]},
        "history[0].tool_call_metadata",
    ),
    ("openhands", {"events": [{"source": "user", "kind": "MessageEvent"}]}, "events[0].llm_message"),
    ("claude_code", {"lines": [LINE, LINE]}, "lines"),
    ("claude_code", {"lines": [LINE]}, "lines"),
    (
        "codex",
        {
            "rollout": [
                {"type": "response_item", "payload": {"type": "message", "role": "robot", "content": "x"}}
            ]
        },
        "items[0].role",
    ),
    ("bfcl", {"id": "a", "ground_truth": []}, "question"),
    ("bfcl", {"id": "a", "question": [CHAT[:1]], "function": [], "ground_truth": [{"f": 3}]}, "ground_truth"),
]


@pytest.mark.parametrize("format, record, field", REFUSED, ids=[f"{f}-{field}" for f, _, field in REFUSED])
def test_a_refusal_names_file_line_and_field(format, record, field, tmp_path):
    given = {} if field == "label" or format in ("preference", "hermes", "invariant") else {"label": "benign"}
    (file := tmp_path / "x.jsonl").write_text("\n" + json.dumps(record) + "\n")
    with pytest.raises(TranscriptError) as caught:
        read(file, format=format, **given)
    where = (
        "x.jsonl, "
        if format in ("claude_code", "codex") and "line 2" not in str(caught.value)
        else "x.jsonl, line 2, "
    )
    assert str(caught.value).startswith(where + field), caught.value


# --- files that are packed, tables or binary
# -----------------------------------------------------------------


def packed(data, way, file):
    "Writes bytes packed in one of the ways."
    if way == "gzip":
        file.write_bytes(gzip.compress(data))
    else:
        with pyarrow.output_stream(str(file), compression="zstd") as f:
            f.write(data)


PLAIN = (
    "agent.jsonl",
    "sharegpt.json",
    "agentdojo.json",
    "claude_code.jsonl",
    "tau2_bench.json",
    "openhands.jsonl",
)


@pytest.mark.parametrize("way", ["gzip", "zstd"])
@pytest.mark.parametrize("name", PLAIN)
def test_packed_files_are_read_as_what_is_in_them(name, way, tmp_path):
    "Lines, arrays and objects; whatever the file is called, and with a sentence where it is cut off."
    label = None if name in ("agent.jsonl", "agentdojo.json", "tau2_bench.json") else "benign"

    def content(file):
        return [(t.messages, t.tools, t.label, t.injection_spans) for t in read(file, label=label)]

    packed((FIXTURES / name).read_bytes(), way, file := tmp_path / "data.bin")
    assert content(file) == content(FIXTURES / name)
    file.write_bytes(file.read_bytes()[:-12])
    with pytest.raises(TranscriptError, match=r"^data\.bin: is damaged or cut off"):
        content(file)


@pytest.mark.parametrize("name", ["ultrachat.jsonl", "alpaca.json", "hermes.jsonl"])
def test_tables_are_read_as_their_rows(name, tmp_path):
    label = "benign" if name == "alpaca.json" else None
    rows = [{k: v for k, v in r.items() if k != "meta"} for _, _, r in read_records(FIXTURES / name)]
    want = [(t.messages, t.label) for t in read(written(tmp_path, *rows), label=label)]
    keys = {k for r in rows for k in r}  # pyarrow takes the columns from the first row
    table = pyarrow.Table.from_pylist([dict.fromkeys(sorted(keys)) | r for r in rows])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    for new, file in ((pyarrow.ipc.new_file, "b.arrow"), (pyarrow.ipc.new_stream, "c.arrow")):
        with new(str(tmp_path / file), table.schema) as f:
            f.write_table(table)
    for file in ("a.parquet", "b.arrow", "c.arrow"):
        assert [(t.messages, t.label) for t in read(tmp_path / file, label=label)] == want


@pytest.mark.parametrize(
    "start, kind", [(s, k) for s, k in BINARY.items() if s not in PACKED and s not in TABLES]
)
def test_a_binary_file_is_named(start, kind, tmp_path):
    (file := tmp_path / "x.jsonl").write_bytes(start + b"\0" * 40)
    with pytest.raises(TranscriptError, match=f"x.jsonl: is {kind}, which cannot be read; save it as JSONL"):
        read(file)


def zstd_member(name, value):
    """The bytes of a ZIP archive with one member packed as Inspect packs it (method 93), which Python
    cannot write."""
    data = json.dumps(value).encode()
    out = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(out, "zstd") as f:
        f.write(data)
    small, n = out.getvalue().to_pybytes(), name.encode()
    sizes = len(small).to_bytes(4, "little") + len(data).to_bytes(4, "little") + len(n).to_bytes(2, "little")
    fields = b"\x3f\0\0\0\x5d\0" + b"\0" * 4 + zlib.crc32(data).to_bytes(4, "little") + sizes
    local = b"PK\x03\x04" + fields + b"\0\0" + n + small
    central = b"PK\x01\x02\x3f\0" + fields + b"\0" * 16 + n
    return local, central


def test_an_eval_log_of_inspect_is_read_packed_as_it_is(tmp_path):
    "Members packed with Zstandard, and with zip's own method; the samples are those of the JSON log."
    log = json.loads((FIXTURES / "inspect.json").read_text())
    members = {"header.json": {k: v for k, v in log.items() if k != "samples"}}
    members |= {f"samples/{s['id']}_epoch_{s['epoch']}.json": s for s in log["samples"]}
    with zipfile.ZipFile(tmp_path / "a.eval", "w", zipfile.ZIP_DEFLATED) as z:
        for name, value in members.items():
            z.writestr(name, json.dumps(value))
    body, index = b"", b""
    for name, value in members.items():
        local, central = zstd_member(name, value)
        index += central[:42] + len(body).to_bytes(4, "little") + central[46:]
        body += local
    count = len(members).to_bytes(2, "little")
    end = (
        b"PK\x05\x06\0\0\0\0"
        + count * 2
        + len(index).to_bytes(4, "little")
        + len(body).to_bytes(4, "little")
        + b"\0\0"
    )
    (tmp_path / "b.eval").write_bytes(body + index + end)
    assert {i.compress_type for i in zipfile.ZipFile(tmp_path / "b.eval").infolist()} == {93}
    want = [(t.id, t.messages, t.tools, t.meta) for t in read(FIXTURES / "inspect.json", label="benign")]
    for name in ("a.eval", "b.eval"):
        assert [(t.id, t.messages, t.tools, t.meta) for t in read(tmp_path / name, label="benign")] == want


@pytest.mark.slow
def test_big_results_are_read_run_by_run(tmp_path, monkeypatch):
    """An object over the bound is read in two passes, in lines or on one line, in bounded memory; a bad
    run is skipped alone."""
    whole = json.loads((FIXTURES / "tau2_bench.json").read_text())
    run = whole["simulations"][1]
    runs = [
        {
            **run,
            "id": f"run-{i}",
            "messages": [{"role": "user", "content": f"{i} " * 400}, *run["messages"][1:]],
        }
        for i in range(3000)
    ]
    runs[7] = {**runs[7], "messages": []}
    monkeypatch.setattr(files, "MAX_LINE_BYTES", 2**16)
    for indent in (1, None):
        (file := tmp_path / "results.json").write_text(
            json.dumps({**whole, "simulations": runs}, indent=indent)
        )
        reader = read_transcripts(file, on_error="skip")
        tracemalloc.start()
        count = sum(not isinstance(t, TranscriptError) for t in reader.records())
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert count == 2999 and reader.skipped == [
            "results.json, simulations[7], messages: is missing or "
            "empty; the run broke off before it "
            "began, drop it"
        ]
        assert peak < 3 * 2**20 < file.stat().st_size, peak


def test_a_session_takes_linear_time_and_keeps_to_its_branch(tmp_path):
    """20,000 lines that hang on each other; a broken last line is one error, and an answer taken back is
    left out."""
    lines = [
        {
            **LINE,
            "type": kind,
            "uuid": f"u{i}",
            "parentUuid": f"u{i - 1}" if i else None,
            "message": {"role": kind, "content": f"{i}"},
        }
        for i in range(20_000)
        for kind in ("assistant" if i % 2 else "user",)
    ]
    lines.insert(11, {**lines[11], "uuid": "back", "message": {"role": "assistant", "content": "taken back"}})
    (file := tmp_path / "s.jsonl").write_text("".join(json.dumps(r) + "\n" for r in lines) + '{"type": "us')
    reader, start = read_transcripts(file, label="benign", on_error="skip"), time.process_time()
    with pytest.warns(UserWarning, match="1 record skipped"):
        [t] = reader
    assert (
        len(t.messages) == 20_000
        and all(m["content"] != "taken back" for m in t.messages)
        and time.process_time() - start < 20
    )


# --- folders, registry, conversion
# ---------------------------------------------------------------------------


def test_a_log_folder_of_agentdojo_is_read_as_it_is(tmp_path):
    """Injection tasks given as the user's request and attacks that deny service are left out and
    counted; alone, or with label=, they are not."""
    run = json.loads((FIXTURES / "agentdojo.json").read_text())
    files = {
        "user_task_0/none/none": {
            "injection_task_id": None,
            "attack_type": None,
            "user_task_id": "user_task_0",
            "injections": {},
        },
        "user_task_3/direct/injection_task_1": {},
        "user_task_3/felony_dos/injection_task_1": {"attack_type": "felony_dos"},
        "injection_task_1/none/none": {
            "user_task_id": "injection_task_1",
            "injection_task_id": None,
            "attack_type": None,
            "injections": {},
        },
    }
    for name, own in files.items():
        (file := tmp_path / "logs" / "office" / f"{name}.json").parent.mkdir(parents=True)
        file.write_text(json.dumps({**run, **own}, indent=4))
    reader = read_transcripts(tmp_path / "logs")
    with pytest.warns(UserWarning, match="left out"):
        found = list(reader)
    assert (
        sorted(t.label for t in found) == ["benign", "harmful"]
        and sum(reader.left_out.values()) == 2
        and len(reader.left_out) == 2
    )
    assert len(read(tmp_path / "logs", label="benign")) == 4
    with pytest.raises(TranscriptError, match="given as the user's own request"):
        read(file)
    report = convert(tmp_path / "logs", tmp_path / "out.jsonl")
    assert report["transcripts"] == 2 and sum(report["left_out"].values()) == 2 and report["dropped"] == {}


def test_a_format_adds_itself(tmp_path):
    own = Format(
        "mine",
        lambda r: "dialogue" in r,
        lambda r, where, i, label, source: from_openai({"messages": r["dialogue"]}, where, i, label, source),
    )
    file = written(tmp_path, {"dialogue": CHAT}, name="chat.txt")
    with pytest.raises(TranscriptError, match="no known format has the keys dialogue"):
        read(file, label="benign")
    add_format(own)
    try:
        assert [t.messages for t in read(file, label="benign")] == [CHAT]
    finally:
        del FORMATS["mine"]


def test_convert_never_writes_over_what_it_reads(tmp_path):
    """By name, link, hard link, or into the folder that is read; what it wrote reads back the same, and
    causes are counted once."""
    source = written(
        tmp_path,
        *({"messages": CHAT, "label": "benign"} for _ in range(2)),
        *({"messages": [{"role": f"usr{i}"}]} for i in range(3)),
    )
    before = source.read_bytes()
    (tmp_path / "soft").symlink_to(source)
    os.link(source, tmp_path / "hard")
    for out in (source, tmp_path / "soft", tmp_path / "hard", tmp_path, tmp_path / "none" / "x.jsonl"):
        with pytest.raises(OutputError):
            convert(source, out)
    with pytest.raises(OutputError, match="is what is read, or lies in it"):
        convert(tmp_path, tmp_path / "new.jsonl")
    assert source.read_bytes() == before and not (tmp_path / "new.jsonl").exists()
    report = convert(source, tmp_path / "out.jsonl")
    assert (
        report["transcripts"] == 2
        and list(report["dropped"].values()) == [3]
        and report["formats"] == {"openai": 2}
    )
    assert read(tmp_path / "out.jsonl") == [t for t in read(source, on_error="skip")]
    assert cause_of(TranscriptError("a.jsonl, line 3, x[1]: is 'b'; drop")) == cause_of(
        TranscriptError("a.jsonl, line 4, x[22]: is 'c'; drop")
    )


@pytest.mark.parametrize(
    "name", ["anthropic.jsonl", "inspect.json", "claude_code.jsonl", "hermes.jsonl", "tau2_bench.json"]
)
def test_what_was_adapted_is_told_and_kept(name, tmp_path):
    label = None if name in ("hermes.jsonl", "tau2_bench.json") else "benign"
    report = convert(FIXTURES / name, tmp_path / "own.jsonl", label=label)
    assert report["adapted"] and report["dropped"] == {}
    again = convert(tmp_path / "own.jsonl", tmp_path / "again.jsonl")
    assert (
        again["adapted"] == report["adapted"]
        and (tmp_path / "own.jsonl").read_bytes() == (tmp_path / "again.jsonl").read_bytes()
    )
