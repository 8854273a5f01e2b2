"""One door for what is read: regular files only, opened without a race and without waiting, no more of them
than was there; and lists of bad records end early."""

import ast
import gzip
import io
import os
import signal
import socket
import time
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
from papermill.iorw import LocalHandler

import cbnb
from cbnb.basics import reading
from cbnb.basics.jsonfiles import RunError, read_json
from cbnb.basics.places import TINYAGENT
from cbnb.basics.reading import InputError, check_folder, open_regular, read_bytes, read_text, sha256
from cbnb.cli import main
from cbnb.config import ConfigError
from cbnb.data import sources
from cbnb.data import streams as data
from cbnb.masking import templates
from cbnb.masking.templates import MaskError
from cbnb.run.execute import read_for_papermill as read_notebook_text
from cbnb.run.settings import template_source
from cbnb.step.loaders import read_adapter, read_config, read_tokenizer
from cbnb.sweep.keys import content_hash
from cbnb.sweep.spec import read_notebook, read_spec
from cbnb.transcripts import files, reader
from cbnb.transcripts.reader import MAX_BAD, MAX_SKIPPED, TooManyBad, read_transcripts, write_transcripts
from cbnb.transcripts.record import TranscriptError
from cbnb.transcripts.tinyworld import make_transcripts
from helpers import code_cells, run_notebooks

PACKAGE, FIXTURES = Path(cbnb.__file__).parent, Path(__file__).parent / "fixtures"
# who opens a file beside the door, and why it may: {module: {function: what}}
READERS = {
    # the door; /proc/self/mountinfo
    "basics.reading": {"open_regular": {"open", "fdopen"}, "file_system": {"read_bytes"}},
    # for writing (tests/test_files.py)
    "basics.files": {"append_bytes": {"open"}, "new_file": {"fdopen"}},
    "sweep.launch": {"start": {"open"}},
    "basics.private": {"tidy": {"open"}},  # the same
    # never through a link, and never waiting
    "basics.lease": {
        "dated_lease": {"open"},
        "make_new": {"open"},
        "boot": {"read_text"},
        "process_start": {"read_text"},
    },  # of /proc
    # of what was made here, to flush it
    "run.sealed": {"sync": {"open"}},
    "basics.terminal": {"nowhere": {"open"}},  # /dev/null
    # of a stream, or of a member of an open archive
    "transcripts.packed": {"": {"open"}, "open_zst": {"input_stream"}, "read_member": {"open"}},
    # of the package's own pages
    "widgets.views": {"source": {"read_text"}},
}
OPENS = {"open", "fdopen", "read_text", "read_bytes"}
LIBRARIES = {
    "memory_map",
    "ParquetFile",
    "ZipFile",
    "safe_open",
    "load_file",
    "input_stream",
    "loadtxt",
    "fromfile",
    "memmap",
    "read_csv",
    "read_parquet",
}
# one of them in the same function has looked at what a library opens
DOOR = {"check_regular", "open_regular", "check_folder"}


def name_of(call):
    return getattr(call.func, "attr", getattr(call.func, "id", ""))


def found_readers(source):
    """`{(function, what)}` of a module's text that opens a path beside the door: by the outermost function or
    class."""
    found = set()
    for top in ast.parse(source).body:
        calls = [node for node in ast.walk(top) if isinstance(node, ast.Call)]
        looked = any(name_of(call) in DOOR for call in calls)
        for call in calls:
            name, owner = (
                name_of(call),
                ast.unparse(call.func.value) if isinstance(call.func, ast.Attribute) else "",
            )
            # the door's, or an AnswerReader's
            own = name in ("read_text", "read_bytes") and owner in ("", "self", "reader")
            if name in OPENS and not own or name in LIBRARIES and not looked:
                found.add((getattr(top, "name", ""), name))
    return found


def test_nothing_is_read_beside_the_door():
    allowed = {
        (module, function, what)
        for module, names in READERS.items()
        for function, all_ in names.items()
        for what in all_
    }
    found = {
        (".".join(path.relative_to(PACKAGE).with_suffix("").parts), *pair)
        for path in PACKAGE.rglob("*.py")
        for pair in found_readers(path.read_text())
    }
    writers = {("train.store", name, "OSFile") for name in ("write_samples", "write_twins")}
    assert found - allowed - writers == set(), (
        "read by cbnb.basics.reading: read_text, read_bytes, open_regular; look with check_regular before a "
        "library opens"
    )
    assert allowed - found == set(), "what is allowed and not there any more is taken out"
    for path in run_notebooks():
        for cell in code_cells(path):
            assert not found_readers(
                "\n".join(
                    "" if line.lstrip().startswith(("%", "!")) else line for line in cell.source.splitlines()
                )
            ), path


def test_the_search_finds_readers():
    for line in (
        "open(p)",
        "os.open(p, os.O_RDONLY)",
        "Path(p).open('rb')",
        "Path(p).read_text()",
        "p.read_bytes()",
        "safe_open(p, 'pt')",
        "pq.ParquetFile(p)",
        "zipfile.ZipFile(p)",
    ):
        assert found_readers(f"def f(p):\n    {line}"), line
    for line in (
        "read_text(p)",
        "read_bytes(p)",
        "open_regular(p)",
        "check_regular(p); safe_open(p, 'pt')",
        "self.read_text(p)",
    ):
        assert not found_readers(f"def f(p):\n    {line}"), line


# --- what is no file ---


@contextmanager
def at_most(seconds):
    "Raises TimeoutError where the block waits for longer, as for a FIFO."

    def late(*_):
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def open_handles():
    "How many descriptors this process has, without those of the process of the templates."
    templates.end()
    return len(os.listdir("/proc/self/fd"))


def place(kind, path):
    "Puts something at `path` that is no file to read; returns a word of the sentence."
    if kind == "FIFO":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as s:
            here = os.getcwd()
            os.chdir(path.parent)  # its name may have 107 bytes
            try:
                s.bind(path.name)
            finally:
                os.chdir(here)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "system":
        path.symlink_to("/proc/self/maps")
    elif kind == "folder":
        path.mkdir()
    elif kind == "sparse":
        path.write_text("{}")
        os.truncate(path, 2**40)
    return {"system": "made up by the system", "sparse": "never written"}.get(kind, f"is a {kind}")


NO_FILES = ("FIFO", "socket", "device", "system", "folder", "sparse")


@pytest.fixture
def world(tmp_path):
    write_transcripts(
        tmp_path / "in.jsonl", [t for kind in ("injection", "plain") for t in make_transcripts(kind, 2)]
    )
    (tmp_path / "injections.json").write_text('{"a": "an injected text"}')
    return tmp_path


COMMANDS = {
    "convert": lambda w, bad: ["convert", bad, w / "out.jsonl"],
    "convert, its tools": lambda w, bad: ["convert", w / "in.jsonl", w / "out.jsonl", "--tools", bad],
    "spans": lambda w, bad: ["spans", bad, "--injections", w / "injections.json"],
    "spans, its injections": lambda w, bad: ["spans", w / "in.jsonl", "--injections", bad],
    "masks": lambda w, bad: ["masks", bad, "--model", "tinyagent"],
    "masks, its template": lambda w, bad: [
        "masks",
        w / "in.jsonl",
        "--model",
        "tinyagent",
        "--chat-template",
        bad,
    ],
    "ablate": lambda w, bad: ["ablate", bad, "--dry-run"],
    "report": lambda w, bad: ["report", bad],
    "status": lambda w, bad: ["status", bad],
    "evaluate": lambda w, bad: ["evaluate", bad],
}
# a folder is what they may be given
OF_FOLDERS = {"convert", "spans", "masks", "report", "status", "evaluate", "spans, its injections"}


def run_main(arguments):
    "`(exit status, stderr)`, within seconds."
    with redirect_stderr(io.StringIO()) as err, redirect_stdout(io.StringIO()), at_most(20):
        try:
            status = main([str(a) for a in arguments])
        except SystemExit as e:
            status = e.code
    return status, err.getvalue()


@pytest.mark.parametrize("kind", NO_FILES)
def test_commands_read_files_alone(kind, world):
    place(kind, bad := world / "bad.jsonl")
    handles = open_handles()
    for name, command in COMMANDS.items():
        if kind == "folder" and name in OF_FOLDERS:
            continue
        status, said = run_main(command(world, bad))
        assert (
            status == 2
            and len(said.splitlines()) == 1
            and any(name in said for name in (bad.name, str(bad.resolve())))
        ), (name, status, said)
        assert not (world / "out.jsonl").exists(), name
    assert open_handles() <= handles


@pytest.mark.parametrize("kind", NO_FILES)
def test_settings_name_files(kind, tmp_path):
    place(kind, bad := tmp_path / "bad.jsonl")
    tries = [
        lambda: template_source(str(bad)),
        lambda: sources.check_reading({"tools": str(bad)}),
        lambda: read_notebook(bad),
        lambda: read_spec(bad),
        lambda: read_notebook_text(LocalHandler(), bad),
        lambda: content_hash(bad, {}),
        lambda: read_json(bad),
    ]
    if kind != "folder":
        tries.append(lambda: sources.Reading().read([str(bad)]))
    for attempt in tries[:-2] + tries[-1:] if kind == "folder" else tries:
        with at_most(5), pytest.raises((ValueError, OSError, RunError)) as e:
            attempt()
        assert (
            any(name in str(e.value) for name in (bad.name, str(bad.resolve())))
            and "\n" not in str(e.value)
            and not isinstance(e.value, TimeoutError)
        ), e.value


@pytest.mark.parametrize("kind", NO_FILES)
def test_the_door_names_what_it_is(kind, tmp_path):
    words = place(kind, bad := tmp_path / "bad")
    handles = open_handles()
    for read in (open_regular, read_text, read_bytes, sha256):
        with at_most(5), pytest.raises(InputError) as e:
            read(bad)
        assert str(e.value).startswith(str(bad)) and words in str(e.value), e.value
    assert open_handles() <= handles
    if kind not in ("folder", "sparse"):
        with at_most(5), pytest.raises(InputError, match=words):
            check_folder(tmp_path)


@pytest.mark.parametrize("kind", ("FIFO", "device", "folder"))
def test_what_is_put_there_in_between_is_refused_too(kind, tmp_path, monkeypatch):
    look = reading.check_regular

    def swapped(path):
        about = look(path)
        path.unlink()
        place(kind, path)
        return about

    (path := tmp_path / "x").write_text("{}")
    monkeypatch.setattr(reading, "check_regular", swapped)
    with at_most(5), pytest.raises(InputError, match=f"is a {kind}"):
        read_text(path)


def test_a_file_that_grows_ends_where_it_was(tmp_path, monkeypatch):
    (path := tmp_path / "log").write_bytes(b"0123456789")
    digest, opened = sha256(path), reading.open_regular

    def growing(path):
        file = opened(path)
        size = reading.os.fstat(file.fileno())
        monkeypatch.setattr(reading.os, "fstat", lambda n: size)
        with open(path, "ab") as f:
            f.write(b"more" * 10000)
        return file

    monkeypatch.setattr(reading, "open_regular", growing)
    assert sha256(path) == digest


def model_with(tmp_path, name, kind):
    "A folder as that of tinyagent, with something that is no file under `name`."
    (folder := tmp_path / "model").mkdir()
    for path in TINYAGENT.iterdir():
        if path.name != name:
            (folder / path.name).symlink_to(path)
    place(kind, folder / name)
    return folder


@pytest.mark.parametrize(
    "name",
    ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "model.safetensors"),
)
def test_a_model_is_of_files(name, tmp_path):
    folder = model_with(tmp_path, name, "FIFO")
    for read in (read_config, read_tokenizer, read_adapter):
        with at_most(5), pytest.raises((InputError, ConfigError), match=f"{name} is a FIFO"):
            read(str(folder))
    status, said = run_main(["masks", Path(folder, "none"), "--model", folder])
    assert status == 2 and len(said.splitlines()) == 1


def test_a_folder_of_files_that_are_none(tmp_path):
    "They are passed over; the file beside them is read."
    write_transcripts(tmp_path / "a.jsonl", make_transcripts("plain", 2))
    for kind in ("FIFO", "socket"):
        place(kind, tmp_path / f"{kind}.jsonl")
    with at_most(5):
        assert len(list(read_transcripts(tmp_path))) == 2


def test_a_packed_file_that_never_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MAX_UNPACKED_BYTES", 2**20)
    with gzip.open(tmp_path / "bomb.jsonl.gz", "wb") as f:
        f.write(b"\n" * 2**23)
    with pytest.raises(
        TranscriptError, match="bomb.jsonl.gz: unpacks to over .* bytes, which no transcripts do"
    ):
        list(read_transcripts(tmp_path / "bomb.jsonl.gz"))
    monkeypatch.setattr(files, "MAX_GAP_BYTES", 2**16)
    for text in (b"\n" * 2**17, b"x" * 2**17):
        monkeypatch.setattr(files, "MAX_LINE_BYTES", 2**12)
        (tmp_path / "gap.jsonl").write_bytes(text)
        with pytest.raises(TranscriptError, match="gap.jsonl"):
            list(read_transcripts(tmp_path / "gap.jsonl", format="openai"))


# --- a million bad records ---

BAD, GOOD = (
    '{"messages": []}\n',
    '{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}], "label": '
    '"benign"}\n',
)
WORDS = "10,001 of the first 10,001 records cannot be read, so the rest is not looked at"


@pytest.fixture(scope="module")
def million(tmp_path_factory):
    (path := tmp_path_factory.mktemp("bad") / "bad.jsonl").write_text(BAD * 1_000_000)
    return path


def test_a_million_bad_records_end_early(million, monkeypatch):
    start, reader = time.process_time(), read_transcripts(million, format="openai", on_error="skip")
    with pytest.raises(TooManyBad, match=WORDS):
        list(reader)
    assert reader.skipped_count == reader.record_count == MAX_BAD + 1 and len(reader.skipped) == MAX_SKIPPED
    with pytest.raises(TranscriptError, match="line 1, messages"):
        list(read_transcripts(million, format="openai"))
    read = sources.Reading(on_error="skip", max_skipped=1.0)
    with pytest.raises(TranscriptError, match=WORDS):
        read.read([f"{million}:openai"])
    status, said = run_main(["convert", million, million.parent / "out.jsonl", "--format", "openai"])
    assert status == 2 and WORDS in said and not (million.parent / "out.jsonl").exists()
    # each of the three reads 10,001 records; a million take half a minute
    assert time.process_time() - start < 8


def test_good_records_among_bad_ones_are_all_read(tmp_path, monkeypatch):
    """Counts stay exact where the good ones are as many, and the sentence is that of the place where they are
    not."""
    monkeypatch.setattr(reader, "MAX_BAD", 10)

    def read(text):
        (path := tmp_path / "mixed.jsonl").write_text(text)
        reader = read_transcripts(path, format="openai", on_error="skip")
        return sum(not isinstance(t, TranscriptError) for t in reader.records()), reader.skipped_count

    assert read((GOOD + BAD) * 200) == (200, 200)
    assert read(BAD * 10 + GOOD) == (1, 10)
    assert read(GOOD * 50 + BAD * 50) == (50, 50)
    with pytest.raises(TooManyBad, match="51 of the first 101 records"):
        read(GOOD * 50 + BAD * 50 + BAD + GOOD * 1000)


def test_contradictions_are_counted_as_far_as_they_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(reader, "MAX_BAD", 10)
    (path := tmp_path / "many.jsonl").write_text(
        (FIXTURES / "trace_v1_inverted.jsonl").read_text().splitlines()[0] + "\n" + GOOD
    )
    with pytest.raises(TranscriptError, match=r"\(1 of 2 records contradict themselves"):
        list(read_transcripts(path))
    path.write_text(path.read_text().splitlines()[0] + "\n")
    path.write_text(path.read_text() * 100)
    with pytest.raises(TranscriptError, match=r"\(11 of the first 11 records contradict themselves"):
        list(read_transcripts(path))


def test_kinds_of_errors_are_bounded():
    reading = sources.Reading(on_error="skip")

    def letters(n):
        return "".join(chr(97 + n // 26**k % 26) for k in range(4))

    for n in range(3 * sources.MAX_CAUSES):
        reading.skip(TranscriptError(f"x.jsonl, line {n}: {letters(n)} is no role"))
    assert (
        len(reading.skipped) == len(reading.examples) == sources.MAX_CAUSES + 1
        and reading.skipped.total() == 3 * sources.MAX_CAUSES
    )
    assert reading.skipped["another cause"] == 2 * sources.MAX_CAUSES


def test_a_template_that_refuses_all_is_not_asked_a_million_times(monkeypatch, tmp_path):
    monkeypatch.setattr(data, "MAX_BAD", 10)
    asked = []

    def refusals(transcripts, *_):
        for t in transcripts:
            asked.append(t)
            yield MaskError(f"{t}: no") if t % 100 else None

    with pytest.raises(
        TranscriptError,
        match="the chat template refuses 11 of the first 12 transcripts, so the rest is not looked at; .*; "
        "the first: 1: no",
    ):
        list(data.until_most_fail(refusals(range(10**6))))
    assert len(asked) == 12
    monkeypatch.setattr(data, "refusals", lambda transcripts, *_: (MaskError("no") for _ in transcripts))
    with pytest.raises(TranscriptError, match="refuses 11 of the first 11 transcripts"):
        data.drop_refused(
            make_transcripts("plain", 20), None, sources.Reading(on_error="skip", max_skipped=1.0, records=20)
        )


def test_a_big_object_is_cut_only_where_its_members_end(tmp_path, monkeypatch):
    "Cutting the open member at each of its tokens took hours for a member of some megabytes."
    (path := tmp_path / "log.json").write_text(
        '{"log": [' + ", ".join(["[1]"] * 5000) + '], "runs": [{}, {}]}'
    )
    cuts, item = [], files.OpenText.item
    monkeypatch.setattr(files.OpenText, "item", lambda text: cuts.append(1) or item(text))
    assert [part[:2] for part in files.object_parts(path, "log.json", {"runs"})] == [
        ("log", None),
        ("runs", 0),
        ("runs", 1),
    ]
    assert len(cuts) < 10
