"""`cbnb masks` as a program: exit status, what a stranger's file can do to a terminal or a page, start-up
time, and memory on a long file."""

import json
import os
import pty
import re
import subprocess
import sys
import xml.etree.ElementTree as ET

import pytest

from cbnb.cli import main
from cbnb.masking.audit import NOTE_KINDS, SPOKEN
from cbnb.masking.policies import assistant_only
from cbnb.masking.turns import Segment
from cbnb.transcripts.reader import write_transcripts
from cbnb.transcripts.record import Transcript
from cbnb.transcripts.tinyworld import make_transcripts
from forked import command
from helpers import ROOT, run

PROGRAM = (sys.executable, "-m", "cbnb.cli")
TINY = ("--model", "tinyagent")
ENVIRONMENT = {"PYTHONPATH": str(ROOT), "NO_COLOR": "", "TERM": "xterm"}
ASK = {"role": "user", "content": "Is it cold?"}
ANSWER = {"role": "assistant", "content": "It is."}
HEADER = "<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"


def conversation(id="t", *messages):
    return Transcript(id, list(messages) or [ASK, ANSWER])


@pytest.fixture
def file(tmp_path):
    "Writes transcripts to a file and returns its path."

    def write(*transcripts):
        write_transcripts(tmp_path / "some.jsonl", transcripts)
        return str(tmp_path / "some.jsonl")

    return write


def found(capsys, *arguments):
    "(exit status, {kind: number of transcripts with it}, rows) of `cbnb masks ... --json`."
    status = main(["masks", *arguments, *TINY, "--json"])
    *rows, last = map(json.loads, capsys.readouterr().out.splitlines())
    return status, last["summary"]["findings"], rows


def test_every_bad_line_is_listed(file, tmp_path, capsys):
    path = file(conversation())
    with open(path, "a") as f:
        f.write('{"x": 1}\n' * 1500)
    status, kinds, rows = found(capsys, path)
    assert (status, kinds) == (1, {"unreadable": 1500}) and len(rows) == 1501


def test_a_page_never_overwrites_what_it_is_about(file, tmp_path, capsys):
    path = file(conversation())
    before = open(path).read()
    for page in (path, str(tmp_path)):
        assert main(["masks", path, *TINY, "--html", page]) == 2 and "; name a" in capsys.readouterr().err
    assert open(path).read() == before


def test_a_policy_that_exits_is_an_error(file, capsys):
    assert main(["masks", file(conversation()), *TINY, "--policy", "sys:exit"]) == 1
    assert "no_mask" in capsys.readouterr().out


# --- what fails the audit ---


def test_a_sound_file_passes(file, capsys):
    good = [
        t
        for kind in ("plain", "injection", "general", "sensitive", "hard_negative")
        for t in make_transcripts(kind, 20)
    ]
    status, kinds, rows = found(capsys, file(*good), "--max-length", "2048")
    assert (status, kinds, len(rows)) == (0, {}, 100) and all(
        r["trained"] > 1 and r["tokens"] > r["trained"] for r in rows
    )


@pytest.mark.parametrize(
    "kind, messages, arguments",
    [
        ("all_zero", [ASK], ()),
        ("all_zero", [ASK, {"role": "assistant", "content": ""}], ("--policy", "test_audit:words_only")),
        ("eot_untrained", [ASK, ANSWER], ("--policy", "test_audit:words_only")),
        (
            "eot_untrained",
            [ASK, {"role": "assistant", "content": "Yes, it is cold."}],
            ("--max-length", "22", "--truncation", "right"),
        ),
        ("eot_only", [ASK, {"role": "assistant", "content": ""}], ()),
        ("trains_header", [ASK, ANSWER], ("--policy", "test_audit:with_header")),
        (
            "trains_tool_result",
            make_transcripts("plain", 1)[0].messages,
            ("--policy", "test_audit:everything"),
        ),
        ("trains_user", [ASK, ANSWER], ("--policy", "test_audit:everything")),
        ("no_mask", [{**ASK, "content": "<|eot_id|>"}, ANSWER], ()),
        ("no_mask", [ASK, ANSWER], ("--policy", "test_audit:broken")),
        (
            "lost_to_truncation",
            [{**ASK, "content": "word " * 99}, ANSWER],
            ("--max-length", "64", "--truncation", "right"),
        ),
        (
            "lost_to_truncation",
            [ASK, ANSWER, {**ASK, "content": "word " * 99}, ANSWER],
            ("--max-length", "64"),
        ),
        ("lost_context", [{**ASK, "content": "word " * 99}, ANSWER], ("--max-length", "64")),
    ],
)
def test_each_defect_fails_and_is_named(file, capsys, monkeypatch, kind, messages, arguments):
    monkeypatch.syspath_prepend(str(ROOT / "tests"))
    path = file(conversation("sound"), conversation("broken", *messages))
    status, kinds, rows = found(capsys, path, *arguments)
    assert status == 1 and kind in kinds
    assert kind in [f["kind"] for f in rows[1]["findings"]] and rows[1]["transcript"] == "broken"
    assert main(["masks", path, *TINY, *arguments, "--show", "0"]) == 1
    printed = capsys.readouterr().out
    assert re.search(rf"^{kind}: some\.jsonl, transcript 2 \(broken\): \w", printed, re.M), printed
    allowed = [a for k in kinds if k not in NOTE_KINDS for a in ("--allow", k)]
    assert found(capsys, path, *arguments, *allowed)[:2] == (0, kinds)


def words_only(encoding):
    return SPOKEN[encoding.segments]


def with_header(encoding):
    return assistant_only(encoding) | (encoding.segments == Segment.HEADER)


def everything(encoding):
    return encoding.segments >= 0


def broken(encoding):
    return encoding.no_such_field


@pytest.mark.parametrize(
    "ending, kinds",
    [
        ("<|eot_id|>", {}),
        ("", {"eot_untrained": 1, "warning": 1}),
        ("{% if loop.last %}<|eot_id|>{% endif %}", {"eot_untrained": 1, "warning": 1}),
    ],
)
def test_a_template_without_end_of_turn(file, tmp_path, capsys, ending, kinds):
    "None at all, or after the last turn alone: the model would not learn to stop (open-instruct#1800)."
    template = tmp_path / "chat.jinja"
    body = (
        "{% if m.role == 'assistant' %}{{ m.content }}"
        + ending
        + "{% else %}{{ m.content }}<|eot_id|>{% endif %}"
    )
    template.write_text(
        "{{ bos_token }}{% for m in messages %}"
        + HEADER
        + body
        + "{% endfor %}{% if add_generation_prompt %}"
        + HEADER.replace("{{ m.role }}", "assistant")
        + "{% endif %}"
    )
    path = file(
        conversation(
            "two-turns", ASK, ANSWER, {**ASK, "content": "And now?"}, {**ANSWER, "content": "Warmer."}
        )
    )
    status, found_kinds, rows = found(capsys, path, "--chat-template", str(template))
    assert (status, found_kinds) == (1 if kinds else 0, kinds)
    if ending.startswith("{%"):
        assert [f["messages"] for f in rows[0]["findings"] if f["kind"] == "eot_untrained"] == [[1]]


def test_control_tokens_in_what_a_user_says(file, capsys):
    path = file(conversation("fake", {**ASK, "content": "Say <|eot_id|>."}, ANSWER))
    assert [found(capsys, path, "--control", mode)[:2] for mode in ("error", "text", "allow")] == [
        (1, {"no_mask": 1}),
        (0, {}),
        (0, {}),
    ]


def test_a_bad_record_is_a_finding_and_the_rest_is_read(file, capsys):
    path = file(*(conversation(f"t{i}") for i in range(200)))
    with open(path) as f:
        lines = f.read().splitlines()
    lines[2:2], lines[150:150] = ["{"], ['{"messages": [], "label": "benign"}']
    with open(path, "w") as f:
        f.write("\n".join(lines))
    status, kinds, rows = found(capsys, path)
    assert (status, kinds, len(rows)) == (1, {"unreadable": 2}, 202)
    assert [r["findings"][0]["text"].split(":")[0] for r in rows if r["findings"]] == [
        "some.jsonl, line 3",
        "some.jsonl, line 151, messages",
    ]
    assert found(capsys, path, "--limit", "2")[:2] == (0, {}) and found(capsys, path, "--limit", "3")[:2] == (
        1,
        {"unreadable": 1},
    )


def test_tables_count_what_is_trained(file, capsys):
    status, _, rows = found(
        capsys, file(*make_transcripts("injection", 7), conversation("x")), "--policy", "post_injection_only"
    )
    assert (
        main(
            [
                "masks",
                str(file(*make_transcripts("injection", 7), conversation("x"))),
                *TINY,
                "--policy",
                "post_injection_only",
            ]
        )
        == 0
    )
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    table = {
        line[0]: line[1:]
        for line in lines
        if line and line[0] in ("system", "user", "assistant", "tool", "1", "2")
    }
    trained = sum(r["trained"] for r in rows)
    assert (
        table["assistant"][:1] == ["15"]
        and table["assistant"][2] == str(trained)
        and {table[r][2] for r in ("system", "user", "tool")} == {"0"}
    )
    assert table["1"][0] == "8" and table["1"][-2:] == ["8", "1"] and table["2"][-2:] == ["7", "7"]
    assert int(table["1"][2]) + int(table["2"][2]) == trained


# --- what a stranger's text can do ---

EVIL = (
    "\x1b]0;owned\a\x1b[2J\x9b1m \u202eright\u2066\u200b\r\x08\x7f \u2028 ⟦trained⟧ "
    "</p><script>alert(1)</script>{{ 7*7 }}"
)


def test_a_transcript_cannot_drive_the_terminal(file, capsys):
    path = file(
        conversation(EVIL, {**ASK, "content": EVIL}, {**ANSWER, "content": EVIL}),
        conversation("\x1b[31m", ASK),
    )
    for extra in ((), ("--json",)):
        assert main(["masks", path, *TINY, *extra]) == 1
        printed = capsys.readouterr()
        assert (
            all(line.isprintable() for line in printed.out.splitlines())
            and "\\u202e" in printed.out
            and not printed.err
        )
    assert main(["masks", path, *TINY, "--color", "always"]) == 1
    assert set(re.findall("\x1b[^m]*m", coloured := capsys.readouterr().out)) <= {
        f"\x1b[{c}m" for c in ("0", "2", *(f"{n}{s}" for n in range(31, 37) for s in ("", ";1;4")))
    }
    assert "\x9b" not in coloured and "\a" not in coloured and "\u202e" not in coloured


def test_a_page_holds_text_only(file, tmp_path, capsys):
    path, page = (
        file(
            conversation(EVIL, {**ASK, "content": EVIL}, {**ANSWER, "content": EVIL}),
            conversation("\x1b[31m", ASK),
        ),
        tmp_path / "out.html",
    )
    page.write_text("old")
    assert main(["masks", path, *TINY, "--html", str(page)]) == 1
    text = page.read_text(encoding="utf-8")
    assert (
        "<script" not in text
        and not re.search(r"https?:|url\(|@import", text)
        and "prefers-color-scheme: dark" in text
    )
    assert "Content-Security-Policy" in text and sorted(os.listdir(tmp_path)) == ["out.html", "some.jsonl"]
    said = "".join(ET.fromstring(text).find("body").itertext())
    assert (
        "{{ 7*7 }}" in said
        and "all_zero" in said
        and "EOT trained" in said
        and not set("\x1b\x9b\a\u202e\u2066\x7f") & set(said)
    )
    underlined = "".join(u.text for u in ET.fromstring(text).iter("u") if u.text != "underlined")
    assert "alert(1)" in underlined and underlined.endswith("<|eot_id|>") and "start_header" not in underlined


# --- the program ---


def test_help_starts_at_once():
    "No model library is imported, and a processor spends under 2 s."
    code = (
        "import sys, os, cbnb.cli\n"
        "try: cbnb.cli.main(sys.argv[1:])\n"
        "except SystemExit as e: assert e.code == 0\n"
        "assert not {'torch', 'transformers', 'pandas', 'plotly', 'peft'} & set(sys.modules)\n"
        "spent = os.times(); print('SECONDS', spent.user + spent.system)"
    )
    for arguments in ((), ("masks",)):
        said = run(sys.executable, "-c", code, *arguments, "--help", cwd=ROOT, env=ENVIRONMENT).stdout
        assert "masks" in said and float(said.split("SECONDS")[1]) < 2, said


def test_mistakes_are_one_sentence(file, tmp_path):
    path, empty = file(conversation()), tmp_path / "empty.jsonl"
    empty.touch()
    for arguments in (
        ["masks"],
        [],
        ["mask"],
        ["masks", path],
        ["masks", str(tmp_path / "no.jsonl"), *TINY],
        ["masks", path, *TINY, "--policy", "asistant_only"],
        ["masks", path, *TINY, "--format", "opnai"],
        ["masks", path, *TINY, "--max-length", "0"],
        ["masks", path, *TINY, "--html", str(tmp_path / "no" / "x.html")],
    ):
        result = command(*arguments, runs=tmp_path)
        assert result.returncode == 2 and "Traceback" not in result.stdout, result.stdout
        assert re.match(r"cbnb( masks)?: \S", result.stdout.strip().splitlines()[-1]), result.stdout
    for arguments in (["masks", str(empty), *TINY], ["masks", path, "--model", str(tmp_path)]):
        result = command(*arguments, runs=tmp_path)
        assert (
            result.returncode == 2
            and len(result.stdout.strip().splitlines()) == 1
            and result.stdout.startswith("cbnb masks: ")
        ), result.stdout


def on_a_terminal(*arguments, env):
    "(exit status, output) of the program with a terminal as stdout and stderr."
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [*PROGRAM, *arguments],
        cwd=ROOT,
        env=os.environ | ENVIRONMENT | env,
        stdin=subprocess.DEVNULL,
        stdout=theirs,
        stderr=theirs,
    )
    os.close(theirs)
    said = b""
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:
            break  # how Linux says that the other end is closed
        if not part:
            break
        said += part
    os.close(ours)
    return process.wait(), said.decode()


@pytest.mark.slow
def test_colours_are_for_terminals_and_not_needed(file, capsys):
    path = file(conversation())
    status, coloured = on_a_terminal("masks", path, *TINY, env={})
    assert status == 0 and "\x1b[32;1;4m⟦It⟧\x1b[0m" in coloured, coloured
    status, plain = on_a_terminal("masks", path, *TINY, env={"NO_COLOR": "1"})
    assert status == 0 and "\x1b" not in plain and ">   1 assistant text        ⟦It⟧⟦ is⟧⟦.⟧" in plain, plain
    assert re.sub("\x1b\\[[0-9;]*m", "", coloured) == plain


@pytest.mark.slow
def test_a_reader_that_leaves_early_is_no_error(file):
    path = file(*(conversation(f"t{i}") for i in range(3000)))
    result = subprocess.run(
        f"'{sys.executable}' -m cbnb.cli masks '{path}' --model tinyagent --json | head -1",
        shell=True,
        cwd=ROOT,
        env=os.environ | ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert json.loads(result.stdout)["transcript"] == "t0" and not result.stderr


MEASURE = """
import gc, os, re, sys
from pathlib import Path
import cbnb.cli
from cbnb.transcripts.record import Transcript
cbnb.cli.load_masker("tinyagent")
alive, audit = [], cbnb.cli.audit
def watched(*arguments):
    for audited in audit(*arguments):
        if audited.number % 3_000 == 0: alive.append(sum(isinstance(o, Transcript) for o in gc.get_objects()))
        yield audited
cbnb.cli.audit = watched
def read(field): return int(re.search(field + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
before = read("VmRSS")
status = cbnb.cli.main(sys.argv[1:])
spent = os.times()
print("MEASURED", status, (read("VmHWM") - before) // 1024, spent.user + spent.system, *alive)
"""


@pytest.mark.slow
def test_memory_on_a_long_file(tmp_path):
    """8,000 transcripts: at most 1 GiB over the model libraries, and never more than a few batches of them
    alive."""
    path = tmp_path / "long.jsonl"
    with open(path, "w") as f:
        for i in range(8_000):
            f.write(
                json.dumps(
                    {
                        "messages": [
                            {"role": "user", "content": f"What is number {i}?"},
                            {"role": "assistant", "content": f"It is {i}."},
                        ],
                        "label": "benign",
                        "id": f"a-rather-long-id-{i:08d}",
                    }
                )
                + "\n"
            )
    result = run(
        sys.executable, "-c", MEASURE, "masks", path, *TINY, "--show", "1", cwd=ROOT, env=ENVIRONMENT
    )
    measured = result.stdout.rpartition("MEASURED")[2].split()
    assert result.returncode == 0 and measured[0] == "0" and "8,000 transcripts" in result.stdout, (
        result.stdout[-2000:]
    )
    print(f"{measured[1]} MiB, {measured[2]} s")
    assert int(measured[1]) < 1024, f"{measured[1]} MiB over the libraries"
    assert len(measured) == 5 and max(map(int, measured[3:])) < 500, f"{measured[3:]} transcripts are held"
