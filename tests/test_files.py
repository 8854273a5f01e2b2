"""What is written never destroys: outputs that are no files, or are inputs; full disks; and no writer beside the one door."""
import ast, ctypes, io, json, os, shutil, stat
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import pytest

import cbnb
from cbnb.cli import main
from cbnb.tinyagent import make_transcripts
from cbnb.transcripts import write_transcripts
from cbnb.verdicts import write_specimen
from forked import forked

PACKAGE = Path(cbnb.__file__).parent
# who may open a file for writing: {module: functions}; those behind the first two lines write into a folder that is renamed when it is whole, or append to a log
WRITERS = {"files": {"new_file", "append_bytes"}, "jobs": {"start"}, "lease": {"made"},
           "models": {"write_adapter"}, "teacher_cache": {"write_shards"}, "store": {"write_samples"}, "tinyagent": {"_save"}, "widgets.masks": {"read_pasted"}, "withheld": {"tidy"}}
WRITES = {"write_text", "write_bytes", "savefig", "save_file", "save_pretrained", "OSFile", "to_csv", "dump"}   # of any object, given a path
OTHERS = {"shutil": {"copy", "copy2", "copyfile", "copytree", "move"}, "np": {"save", "savez"}, "torch": {"save"}, "tempfile": {"mkstemp", "NamedTemporaryFile"}}


def writes(call):
    "What a call node opens for writing, or writes to a path; empty otherwise."
    owner = ast.unparse(call.func.value) if isinstance(call.func, ast.Attribute) else ""
    name = getattr(call.func, "attr", getattr(call.func, "id", ""))
    texts = [a.value for a in [*call.args, *(k.value for k in call.keywords)] if isinstance(a, ast.Constant) and isinstance(a.value, str)]
    mode = any(set(text) <= set("rwabx+t") and set(text) & set("wax+") for text in texts)
    flags = owner == "os" and ("O_CREAT" in ast.unparse(call) or any(isinstance(a, ast.Name) for a in call.args[1:2]))   # flags by a name may hold it
    return name if (name in ("open", "fdopen") and (mode or flags) or name in WRITES and owner and call.args or name == "save_file" or name in OTHERS.get(owner, ())) else ""


def found_writers(source):
    "`{(function, what)}` of a module's text."
    tree, found = ast.parse(source), set()
    def look(node, function):
        for child in ast.iter_child_nodes(node):
            name = child.name if isinstance(child, (ast.FunctionDef, ast.ClassDef)) and function in ("", None) else function
            if isinstance(child, ast.Call) and (what := writes(child)): found.add((name or "", what))
            look(child, name or "")
    look(tree, "")
    return found


def test_nothing_is_written_beside_the_door():
    for path in sorted(PACKAGE.rglob("*.py")):
        module = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        for function, what in found_writers(path.read_text()):
            assert function in WRITERS.get(module, ()), f"{module}.{function} calls {what}: write by cbnb.files.new_file, write_bytes or write_files"


def test_the_search_finds_writers():
    for line in ("open(p, 'w')", "Path(p).open('ab')", "p.write_text(x)", "frame.to_csv(p)", "torch.save(x, p)", "json.dump(x, f)", "save_file(x, p)", "fig.savefig(p)", "shutil.copy(a, b)",
                 "os.fdopen(h, mode='wb')", "os.open(p, os.O_WRONLY | os.O_CREAT)"):
        assert found_writers(f"def f(p):\n    {line}") and "f" in {function for function, _ in found_writers(f"def f(p):\n    {line}")}, line
    for line in ("open(p)", "open(p, 'rb')", "frame.to_csv(index=False)", "write_bytes(p, x)", "os.open(p, os.O_RDONLY)"): assert not found_writers(line), line


# --- paths that a user may name ---

@pytest.fixture
def world(tmp_path):
    "A folder with inputs of every command, and places where no file may go: `{name: path}`, and what is in the files."
    (data := tmp_path / "data").mkdir()
    transcripts = [t for kind in ("injection", "plain") for t in make_transcripts(kind, 2)]
    write_transcripts(data / "in.jsonl", transcripts)
    (tmp_path / "tools.json").write_text('[{"type": "function", "function": {"name": "x", "parameters": {}}}]')
    (tmp_path / "injections.json").write_text('{"a": "an injected text"}')
    (tmp_path / "template.jinja").write_text("{{ messages }}")
    places = {"input": data / "in.jsonl", "tools": tmp_path / "tools.json", "injections": tmp_path / "injections.json", "folder": data, "beside": data / "new.jsonl", "template": tmp_path / "template.jinja",
              "nowhere": tmp_path / "none" / "x", **{name: tmp_path / name for name in ("soft", "dangling", "hard", "pipe", "device")}}
    places["soft"].symlink_to(data / "in.jsonl")
    places["dangling"].symlink_to(tmp_path / "elsewhere")
    os.link(data / "in.jsonl", places["hard"])
    os.mkfifo(places["pipe"])
    try: os.mknod(places["device"], 0o600 | stat.S_IFCHR, os.makedev(1, 3))   # a /dev/null of our own: as root the real one could be lost
    except PermissionError: places["device"] = Path("/dev/null")
    return places


def kept(tmp_path): return {p: (p.lstat().st_mode, p.lstat().st_ino, p.read_bytes() if p.is_file() and not p.is_symlink() else "") for p in tmp_path.rglob("*")}


COMMANDS = {"convert": lambda w, out: ["convert", w["input"], out, "--tools", w["tools"]],
            "convert a folder": lambda w, out: ["convert", w["folder"], out],
            "spans": lambda w, out: ["spans", w["input"], "--injections", w["injections"], "--tools", w["tools"], "--out", out],
            "masks": lambda w, out: ["masks", w["input"], "--model", "tinyagent", "--tools", w["tools"], "--html", out]}


@pytest.mark.parametrize("command", COMMANDS)
def test_outputs_go_to_files_that_are_no_input(command, world, tmp_path, capsys):
    before = kept(tmp_path)
    wrong = {"input", "folder", "nowhere", "soft", "dangling", "hard", "pipe", "device"} | ({"tools"} if command != "convert a folder" else {"beside"}) | ({"injections"} if command == "spans" else set())
    for name in sorted(wrong):
        assert main([str(word) for word in COMMANDS[command](world, world[name])]) == 2, name
        said = capsys.readouterr().err.splitlines()
        assert len(said) == 1 and str(world[name]) in said[0] and ("; name " in said[0] or "make it first" in said[0]), (name, said)
        assert kept(tmp_path) == before, name
    assert main([str(word) for word in COMMANDS[command](world, tmp_path / "out")]) in (0, 1)
    capsys.readouterr()
    assert {p: v for p, v in kept(tmp_path).items() if p.name != "out"} == before and stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o600


def test_a_template_is_an_input_too(world, tmp_path, capsys):
    assert main(["masks", str(world["input"]), "--model", "tinyagent", "--chat-template", str(world["template"]), "--html", str(world["template"])]) == 2
    assert "is what is read" in capsys.readouterr().err and world["template"].read_text() == "{{ messages }}"


def test_a_report_leaves_what_is_not_its_own(tmp_path, capsys):
    "A folder with the user's own files, a run's own page, a place that is no folder: one sentence each, and nothing is changed."
    sweep = write_specimen(tmp_path / "sweep", betas=(0.0, 0.3), seeds=(0,))
    run = next(p.parent for p in sweep.glob("*/result.json"))
    (run / "report.html").write_text("the page of the run")
    (mine := tmp_path / "mine").mkdir()
    (mine / "curves.png").write_text("a picture of mine")
    (tmp_path / "file").write_text("")
    os.mkfifo(tmp_path / "pipe")
    before = kept(tmp_path)
    for out in (mine, run, tmp_path / "file", tmp_path / "pipe"):
        assert main(["report", str(sweep), "--out", str(out)]) == 2
        said = capsys.readouterr().err.splitlines()
        assert len(said) == 1 and str(out) in said[0], said
        assert kept(tmp_path) == before


def test_a_spec_is_not_written_over(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CBNB_RUNS", str(tmp_path))
    (tmp_path / "mine").mkdir()
    (spec := tmp_path / "mine" / "sweep.json").write_text('{"name": "mine", "parameters": {"total_steps": 2}}')
    assert main(["ablate", str(spec), "--local", "1"]) == 2 and "is what is read" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["sweep.json"] and json.loads(spec.read_text())["name"] == "mine"


# --- a full disk ---

def small_disk(path, size):
    "Mounts a disk of `size` bytes at `path`, for this process and its children alone; as any user where the kernel allows that."
    libc, uid, gid = ctypes.CDLL(None, use_errno=True), os.getuid(), os.getgid()
    NEWNS, NEWUSER, PRIVATE = 0x00020000, 0x10000000, 0x44000
    if libc.unshare(NEWNS | (NEWUSER if uid else 0)): raise OSError(ctypes.get_errno(), "no mount namespace: run this test where `unshare --map-root-user --mount` is allowed")
    if uid:
        for name, text in (("setgroups", "deny"), ("uid_map", f"0 {uid} 1"), ("gid_map", f"0 {gid} 1")): Path("/proc/self", name).write_text(text)
    assert not libc.mount(b"none", b"/", None, PRIVATE, None), os.strerror(ctypes.get_errno())
    path.mkdir(exist_ok=True)
    assert not libc.mount(b"none", bytes(path), b"tmpfs", 0, f"size={size}".encode()), os.strerror(ctypes.get_errno())


def fill(disk, left=0):
    "Leaves `left` bytes of a disk, to the nearest page."
    with open(disk / "filler", "wb", buffering=0) as f:
        try:
            while True: f.write(bytes(4096))
        except OSError: f.truncate(max(0, f.tell() - left))


def free(disk): (disk / "filler").unlink()


def files(folder): return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def said_by(*arguments):
    "`(exit status, stderr)` of `cbnb ARGUMENTS` in this process."
    with redirect_stderr(io.StringIO()) as err, redirect_stdout(io.StringIO()): status = main([str(a) for a in arguments])
    return status, err.getvalue()


def refused(disk, *arguments):
    "`cbnb ARGUMENTS` ends with one sentence that names the full disk, and leaves everything as it was."
    before = files(disk)
    status, said = said_by(*arguments)
    assert status == 2 and len(said.splitlines()) == 1 and f"No space left on device: the disk mounted at {disk}, where {disk}" in said, (arguments, said)
    assert files(disk) == before, (arguments, files(disk).keys() ^ before.keys())


def commands_on_a_full_disk(disk):
    "convert, masks, report and ablate: refused, nothing left; with space again they do what they always do."
    small_disk(disk, 8 << 20)
    write_transcripts(disk / "in.jsonl", make_transcripts("plain", 40))
    sweep = write_specimen(disk / "sweep", betas=(0.0, 0.3), seeds=(0,))
    assert main(["report", str(sweep)]) == 0
    (disk / "two.yaml").write_text(json.dumps({"parameters": {"total_steps": 2}, "grid": {"beta_kl": [0, 1]}}))
    os.environ["CBNB_RUNS"] = str(disk / "runs")
    (disk / "runs").mkdir()
    fill(disk, 4096)
    for arguments in (("convert", disk / "in.jsonl", disk / "out.jsonl"), ("masks", disk / "in.jsonl", "--model", "tinyagent", "--html", disk / "out.html"), ("report", sweep)): refused(disk, *arguments)
    for left in (0, 8192):   # at the lock of the sweep, and among the files of a run
        fill(disk, left)
        status, said = said_by("ablate", disk / "two.yaml", "--local", 1)
        assert status == 2 and f"No space left on device: the disk mounted at {disk}" in said, said
        assert not list((disk / "runs").glob("*/.*.part")) and not list((disk / "runs").glob("*/*/status.json")), "no run is prepared by half, none is started"
    free(disk)
    assert main(["convert", str(disk / "in.jsonl"), str(disk / "out.jsonl")]) == 0 and main(["report", str(sweep)]) == 0


def test_commands_on_a_full_disk(tmp_path):
    done = forked(lambda: commands_on_a_full_disk(tmp_path / "disk"))
    assert done.returncode == 0, done.stdout[-4000:]


def run_on_a_full_disk(disk):
    "Encoded transcripts, the teacher's states, the answers of an evaluation and an adapter: the place is named, nothing half-made is left, and what was whole is used afterwards."
    from cbnb import teacher_cache
    from cbnb.answers import answer_questions
    from cbnb.config import get_config
    from cbnb.data import encode_stream
    from cbnb.decoding import Decoding
    from cbnb.masks import ChatMasker
    from cbnb.models import add_adapter, load_model, load_tokenizer, save_adapter
    from cbnb.reader import derive_reader
    from cbnb.runs import RunError, open_run, read_lines, read_status, stage
    from cbnb.store import stored_stream
    small_disk(disk, 6 << 20)
    masker, config = ChatMasker(load_tokenizer("tinyagent")), get_config("tinyagent", batch_size=2)
    student = add_adapter(load_model("tinyagent"), config)
    run = open_run({"test": "full"}, run_dir=disk / "run")

    def fails(name, place, work):
        fill(disk, 12288)
        before = {p for p in files(disk) if not p.startswith("run/status")}
        try:
            with stage(run, name): work()
        except RunError as e: assert f"No space left on device: the disk mounted at {disk}, where {place}" in str(e), e
        else: raise AssertionError(f"{name} found space")
        free(disk)
        status = read_status(run.path)
        assert status["state"] == "failed" and status["stage"] == name and str(place) in status["error"], status
        return {p for p in files(disk) if not p.startswith("run/status")} - before - {"filler"}

    encode = lambda: stored_stream(disk / "encoded", make_transcripts("plain", 100), masker, "assistant_only", processes=1)
    assert fails("data", disk / "encoded", encode) == set()
    assert encode()[1].samples == 100
    harmful, benign = (encode_stream(make_transcripts(kind, 16), masker, policy)[0] for kind, policy in (("injection", config.harmful_policy), ("plain", config.benign_policy)))
    teacher_cache.SHARD = 20_000
    cache = lambda: teacher_cache.open_cache(disk / "teacher", student, harmful, benign, config, 0)
    teacher_cache.shutil = SimpleNamespace(**vars(shutil) | {"disk_usage": lambda path: SimpleNamespace(free=1 << 40)})   # another job takes the space meanwhile
    left = fails("teacher cache", disk / "teacher", cache)
    assert not any(name.endswith(".partial") for name in left), left
    assert cache().states(benign[:1])["last"].numel() and not list((disk / "teacher").glob(".*unfinished"))

    questions, decoding = make_transcripts("plain", 40), Decoding(max_new_tokens=8)
    ask = lambda folder: answer_questions(student, masker, derive_reader(masker), questions, decoding, folder=folder, stage="before")
    assert fails("evaluation", run.path, lambda: ask(run.path)) <= {"run/answers.jsonl"}
    whole = (run.path / "answers.jsonl").read_bytes()
    assert whole.endswith(b"\n") and 0 < len(read_lines(run.path / "answers.jsonl")) < 40
    again = ask(run.path)
    assert [line["ids"] for line in again] == [line["ids"] for line in ask(None)] and (run.path / "answers.jsonl").read_bytes().startswith(whole)

    save_adapter(student, run.path / "adapter")
    kept = files(run.path / "adapter")
    assert fails("evaluation after", run.path, lambda: save_adapter(student, run.path / "adapter")) == set()
    assert files(run.path / "adapter") == kept


def test_caches_evaluation_and_adapter_on_a_full_disk(tmp_path):
    done = forked(lambda: run_on_a_full_disk(tmp_path / "disk"))
    assert done.returncode == 0, done.stdout[-4000:]
