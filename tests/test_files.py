"""What is written never destroys: outputs that are no files or are inputs; full disks; the one door."""

import ast
import ctypes
import io
import json
import os
import shutil
import stat
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import pytest

import cbnb
from cbnb.cli import main
from cbnb.report.verdicts import write_specimen
from cbnb.transcripts.reader import write_transcripts
from cbnb.transcripts.tinyworld import make_transcripts
from forked import forked

PACKAGE = Path(cbnb.__file__).parent
# who may open a file for writing: {module: functions}; those that are not the door write into a folder
# that is renamed when it is whole or thrown away, to a log, in place, or nowhere
WRITERS = {
    "basics.files": {"new_file", "append_bytes"},
    "sweep.launch": {"start"},
    "sweep.gguf": {"save_weights", "convert_gguf", "make_smollm2"},
    "sft.folder": {"save_agent", "keep_agent"},
    "basics.lease": {"make_new"},
    "step.models": {"write_adapter"},
    "train.teacher_cache": {"ShardWriter"},
    "train.store": {"write_samples", "write_twins"},
    "basics.terminal": {"nowhere"},
    "evaluate.tinyagent": {"_save"},
    "widgets.masks": {"read_pasted"},
    "basics.private": {"tidy"},
}
# of any object, given a path; and of these modules
WRITES = {"write_text", "write_bytes", "savefig", "save_file", "save_pretrained", "OSFile", "to_csv", "dump"}
OTHERS = {
    "shutil": {"copy", "copy2", "copyfile", "copytree", "move"},
    "np": {"save", "savez"},
    "torch": {"save"},
    "tempfile": {"mkstemp", "NamedTemporaryFile"},
}


def writes(call):
    "What a call node opens for writing, or writes to a path; empty otherwise."
    owner = ast.unparse(call.func.value) if isinstance(call.func, ast.Attribute) else ""
    name = getattr(call.func, "attr", getattr(call.func, "id", ""))
    given = [a for a in [*call.args, *(k.value for k in call.keywords)] if isinstance(a, ast.Constant)]
    texts = [a.value for a in given if isinstance(a.value, str)]
    mode = any(set(text) <= set("rwabx+t") and set(text) & set("wax+") for text in texts)
    named = any(isinstance(a, ast.Name) for a in call.args[1:2])  # flags behind a name may hold it
    creates = owner == "os" and ("O_CREAT" in ast.unparse(call) or named)
    opens = name in ("open", "fdopen") and (mode or creates)
    found = opens or name == "save_file" or name in OTHERS.get(owner, ())
    return name if found or name in WRITES and owner and call.args else ""


def found_writers(source):
    "`{(function, what)}` of a module's text."
    found = set()

    def look(node, function):
        for child in ast.iter_child_nodes(node):
            named = isinstance(child, (ast.FunctionDef, ast.ClassDef))
            name = function or (child.name if named else "")
            if isinstance(child, ast.Call) and (what := writes(child)):
                found.add((name, what))
            look(child, name)

    look(ast.parse(source), "")
    return found


def test_nothing_is_written_beside_the_door():
    for path in sorted(PACKAGE.rglob("*.py")):
        module = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        for function, what in found_writers(path.read_text()):
            why = f"{module}.{function} calls {what}: write by cbnb.basics.files, its new_file or write_bytes"
            assert function in WRITERS.get(module, ()), why


def test_the_search_finds_writers():
    for line in (
        "open(p, 'w')",
        "Path(p).open('ab')",
        "p.write_text(x)",
        "frame.to_csv(p)",
        "torch.save(x, p)",
        "json.dump(x, f)",
        "save_file(x, p)",
        "fig.savefig(p)",
        "shutil.copy(a, b)",
        "os.fdopen(h, mode='wb')",
        "os.open(p, os.O_WRONLY | os.O_CREAT)",
    ):
        assert {function for function, _ in found_writers(f"def f(p):\n    {line}")} == {"f"}, line
    for line in (
        "open(p)",
        "open(p, 'rb')",
        "frame.to_csv(index=False)",
        "write_bytes(p, x)",
        "os.open(p, os.O_RDONLY)",
    ):
        assert not found_writers(line), line


# --- paths that a user may name ---


@pytest.fixture
def world(tmp_path):
    "`{name: path}` of the inputs of every command, and of places where no file may go."
    (data := tmp_path / "data").mkdir()
    transcripts = [t for kind in ("injection", "plain") for t in make_transcripts(kind, 2)]
    write_transcripts(data / "in.jsonl", transcripts)
    tool = {"type": "function", "function": {"name": "x", "parameters": {}}}
    (tmp_path / "tools.json").write_text(json.dumps([tool]))
    (tmp_path / "injections.json").write_text('{"a": "an injected text"}')
    (tmp_path / "template.jinja").write_text("{{ messages }}")
    names = {
        "tools": "tools.json",
        "injections": "injections.json",
        "template": "template.jinja",
        "nowhere": "none/x",
        **{name: name for name in ("soft", "dangling", "hard", "pipe", "device")},
    }
    places = {"input": data / "in.jsonl", "folder": data, "beside": data / "new.jsonl"}
    places |= {name: tmp_path / path for name, path in names.items()}
    places["soft"].symlink_to(data / "in.jsonl")
    places["dangling"].symlink_to(tmp_path / "elsewhere")
    os.link(data / "in.jsonl", places["hard"])
    os.mkfifo(places["pipe"])
    # a /dev/null of our own: as root the real one could be lost
    try:
        os.mknod(places["device"], 0o600 | stat.S_IFCHR, os.makedev(1, 3))
    except PermissionError:
        places["device"] = Path("/dev/null")
    return places


def kept(folder):
    "What is in a folder: kind and mode, which file it is, and what it holds."

    def held(p):
        return p.read_bytes() if stat.S_ISREG(p.lstat().st_mode) else ""

    return {p: (p.lstat().st_mode, p.lstat().st_ino, held(p)) for p in folder.rglob("*")}


def cbnb(*arguments):
    return main([str(word) for word in arguments])


WRONG = {"input", "folder", "nowhere", "soft", "dangling", "hard", "pipe", "device"}
COMMANDS = {  # its words for the output `out`, and which places are wrong beside `WRONG`
    "convert": (lambda w, out: ["convert", w["input"], out, "--tools", w["tools"]], {"tools"}),
    "convert a folder": (lambda w, out: ["convert", w["folder"], out], {"beside"}),
    "spans": (
        lambda w, out: [
            "spans",
            w["input"],
            "--out",
            out,
            "--injections",
            w["injections"],
            "--tools",
            w["tools"],
        ],
        {"tools", "injections"},
    ),
    "masks": (
        lambda w, out: ["masks", w["input"], "--model", "tinyagent", "--html", out, "--tools", w["tools"]],
        {"tools"},
    ),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_outputs_go_to_files_that_are_no_input(command, world, tmp_path, capsys):
    before, (words, more) = kept(tmp_path), COMMANDS[command]
    for name in sorted(WRONG | more):
        assert cbnb(*words(world, world[name])) == 2, name
        said = capsys.readouterr().err.splitlines()
        assert len(said) == 1 and str(world[name]) in said[0], (name, said)
        assert "; name " in said[0] or "make it first" in said[0], said
        assert kept(tmp_path) == before, name
    assert cbnb(*words(world, tmp_path / "out")) in (0, 1)
    capsys.readouterr()
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o600
    assert {p: v for p, v in kept(tmp_path).items() if p.name != "out"} == before


def test_a_template_is_an_input_too(world, tmp_path, capsys):
    template = world["template"]
    arguments = [
        "masks",
        world["input"],
        "--model",
        "tinyagent",
        "--html",
        template,
        "--chat-template",
        template,
    ]
    assert cbnb(*arguments) == 2
    assert "is what is read" in capsys.readouterr().err and template.read_text() == "{{ messages }}"


def test_a_report_leaves_what_is_not_its_own(tmp_path, capsys):
    "A folder with files of the user, a run's own page, no folder: one sentence each, and nothing is changed."
    sweep = write_specimen(tmp_path / "sweep", betas=(0.0, 0.3), seeds=(0,))
    run = next(p.parent for p in sweep.glob("*/result.json"))
    (run / "report.html").write_text("the page of the run")
    (mine := tmp_path / "mine").mkdir()
    (mine / "curves.png").write_text("a picture of mine")
    (tmp_path / "file").write_text("")
    os.mkfifo(tmp_path / "pipe")
    before = kept(tmp_path)
    for out in (mine, run, tmp_path / "file", tmp_path / "pipe"):
        assert cbnb("report", sweep, "--out", out) == 2
        said = capsys.readouterr().err.splitlines()
        assert len(said) == 1 and str(out) in said[0], said
        assert kept(tmp_path) == before


def test_a_spec_is_not_written_over(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CBNB_RUNS", str(tmp_path))
    (tmp_path / "mine").mkdir()
    spec = tmp_path / "mine" / "sweep.json"
    spec.write_text('{"name": "mine", "parameters": {"total_steps": 2}}')
    before = kept(tmp_path)
    assert cbnb("ablate", spec, "--local", 1) == 2 and "is what is read" in capsys.readouterr().err
    assert kept(tmp_path) == before


# --- a full disk ---


def small_disk(path, size):
    "Mounts a disk of `size` bytes at `path`, for this process and its children alone."
    libc, uid, gid = ctypes.CDLL(None, use_errno=True), os.getuid(), os.getgid()

    def call(name, *arguments):
        if getattr(libc, name)(*arguments):
            raise OSError(ctypes.get_errno(), f"no {name}: run where `unshare --map-root-user --mount` works")

    NEWNS, NEWUSER, PRIVATE = 0x00020000, 0x10000000, 0x44000
    call("unshare", NEWNS | (NEWUSER if uid else 0))
    if uid:
        maps = {"setgroups": "deny", "uid_map": f"0 {uid} 1", "gid_map": f"0 {gid} 1"}
        for name, text in maps.items():
            Path("/proc/self", name).write_text(text)
    call("mount", b"none", b"/", None, PRIVATE, None)
    path.mkdir(exist_ok=True)
    call("mount", b"none", bytes(path), b"tmpfs", 0, f"size={size}".encode())


def fill(disk, left=0):
    "Leaves `left` bytes of a disk, to the nearest page."
    with open(disk / "filler", "wb", buffering=0) as f:
        try:
            while True:
                f.write(bytes(4096))
        except OSError:
            f.truncate(max(0, f.tell() - left))


def free(disk):
    (disk / "filler").unlink()


FULL = "No space left on device: the disk mounted at"


def files(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def said_by(*arguments):
    "`(exit status, stderr)` of `cbnb ARGUMENTS` in this process."
    with redirect_stderr(io.StringIO()) as err, redirect_stdout(io.StringIO()):
        status = cbnb(*arguments)
    return status, err.getvalue()


def refused(disk, *arguments):
    "`cbnb ARGUMENTS` ends with one sentence that names the full disk, and leaves everything as it was."
    before = files(disk)
    status, said = said_by(*arguments)
    assert status == 2 and len(said.splitlines()) == 1, (arguments, said)
    assert f"{FULL} {disk}, where {disk}" in said, (arguments, said)
    assert files(disk) == before, (arguments, files(disk).keys() ^ before.keys())


def commands_on_a_full_disk(disk):
    "convert, masks, report and ablate: refused, nothing left; with space again they do what they always do."
    small_disk(disk, 8 << 20)
    write_transcripts(disk / "in.jsonl", make_transcripts("plain", 40))
    sweep = write_specimen(disk / "sweep", betas=(0.0, 0.3), seeds=(0,))
    assert cbnb("report", sweep) == 0
    spec = {"parameters": {"total_steps": 2}, "grid": {"beta_kl": [0, 1]}}
    (disk / "two.yaml").write_text(json.dumps(spec))
    os.environ["CBNB_RUNS"] = str(disk / "runs")
    (disk / "runs").mkdir()
    fill(disk, 4096)
    refused(disk, "convert", disk / "in.jsonl", disk / "out.jsonl")
    refused(disk, "masks", disk / "in.jsonl", "--model", "tinyagent", "--html", disk / "out.html")
    refused(disk, "report", sweep)
    for left in (0, 8192):  # at the lock of the sweep, and among the files of a run
        fill(disk, left)
        status, said = said_by("ablate", disk / "two.yaml", "--local", 1)
        assert status == 2 and f"{FULL} {disk}" in said, said
        assert not list((disk / "runs").glob("*/.*.part")), "no run is prepared by half"
        assert not list((disk / "runs").glob("*/*/status.json")), "and none is started"
    free(disk)
    assert cbnb("convert", disk / "in.jsonl", disk / "out.jsonl") == 0 and cbnb("report", sweep) == 0


@pytest.mark.slow
def test_commands_on_a_full_disk(tmp_path):
    done = forked(lambda: commands_on_a_full_disk(tmp_path / "disk"))
    assert done.returncode == 0, done.stdout[-4000:]


def run_on_a_full_disk(disk):
    """Encoded transcripts, the teacher's states, the answers of an evaluation and an adapter: the place is
    named, nothing half-made is left, and what was whole is used afterwards."""
    from cbnb.basics.jsonfiles import RunError
    from cbnb.config import get_config
    from cbnb.data.streams import encode_stream
    from cbnb.evaluate.answers import answer_questions
    from cbnb.evaluate.decoding import Decoding
    from cbnb.evaluate.reader import derive_reader
    from cbnb.masking.masker import ChatMasker
    from cbnb.run.directory import open_run
    from cbnb.run.metrics import read_json_lines
    from cbnb.run.stages import read_status, stage
    from cbnb.step.models import add_adapter, load_model, load_tokenizer, save_adapter
    from cbnb.train import teacher_cache
    from cbnb.train.store import stored_stream

    small_disk(disk, 6 << 20)
    masker, config = ChatMasker(load_tokenizer("tinyagent")), get_config("tinyagent", batch_size=2)
    student = add_adapter(load_model("tinyagent"), config)
    run = open_run({"test": "full"}, run_dir=disk / "run")

    def fails(name, place, work):
        fill(disk, 12288)
        before = {p for p in files(disk) if not p.startswith("run/status")}
        try:
            with stage(run, name):
                work()
        except RunError as e:
            assert f"{FULL} {disk}, where {place}" in str(e), e
        else:
            raise AssertionError(f"{name} found space")
        free(disk)
        status = read_status(run.path)
        assert (status["state"], status["stage"]) == ("failed", name), status
        assert str(place) in status["error"], status
        return {p for p in files(disk) if not p.startswith("run/status")} - before - {"filler"}

    plain = make_transcripts("plain", 100)

    def encode():
        return stored_stream(disk / "encoded", plain, masker, "assistant_only", processes=1)

    assert fails("data", disk / "encoded", encode) == set()
    assert encode()[1].samples == 100
    harmful = encode_stream(make_transcripts("injection", 16), masker, config.harmful_policy)[0]
    benign = encode_stream(plain[:16], masker, config.benign_policy)[0]
    teacher_cache.SHARD = 20_000

    def cache():
        return teacher_cache.open_cache(disk / "teacher", student, harmful, benign, config, 0)

    # another job takes the space after it was asked for
    usage = SimpleNamespace(free=1 << 40)
    teacher_cache.shutil = SimpleNamespace(**vars(shutil) | {"disk_usage": lambda path: usage})
    left = fails("teacher cache", disk / "teacher", cache)
    assert not any(name.endswith(".partial") for name in left), left
    assert cache().states(benign[:1])["last"].numel() and not list((disk / "teacher").glob(".*unfinished"))

    reader, decoding = derive_reader(masker), Decoding(max_new_tokens=8)

    def ask(folder):
        return answer_questions(student, masker, reader, plain[:40], decoding, folder=folder, stage="before")

    assert fails("evaluation", run.path, lambda: ask(run.path)) <= {"run/answers.jsonl"}
    whole = (run.path / "answers.jsonl").read_bytes()
    assert whole.endswith(b"\n") and 0 < len(read_json_lines(run.path / "answers.jsonl")) < 40
    again = ask(run.path)
    assert [line["ids"] for line in again] == [line["ids"] for line in ask(None)]
    assert (run.path / "answers.jsonl").read_bytes().startswith(whole)

    save_adapter(student, run.path / "adapter")
    kept = files(run.path / "adapter")
    assert fails("evaluation after", run.path, lambda: save_adapter(student, run.path / "adapter")) == set()
    assert files(run.path / "adapter") == kept


def test_caches_evaluation_and_adapter_on_a_full_disk(tmp_path):
    done = forked(lambda: run_on_a_full_disk(tmp_path / "disk"))
    assert done.returncode == 0, done.stdout[-4000:]
