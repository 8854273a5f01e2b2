"""What a run leaves holds no secret of its environment and is private: sweeps and plain papermill whose
kernels print and raise secrets in every way, and are killed."""

import ast
import base64
import html
import json
import os
import pprint
import re
import shlex
import stat
import subprocess
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import quote, quote_plus

import nbformat
import pytest
import yaml
from jupyter_client.session import Session
from nbformat.v4 import new_code_cell, new_notebook, new_output

from cbnb.basics import private, withheld
from cbnb.basics.files import OutputError, append_bytes
from cbnb.basics.terminal import visible
from cbnb.config import ConfigError
from cbnb.run.directory import close_run
from cbnb.run.execute import write_for_papermill
from cbnb.run.recorder import Book
from cbnb.run.records import wants
from cbnb.step.loaders import name_failures
from cbnb.step.models import in_words
from forked import command, forked
from helpers import ROOT, environment
from train_common import load

LINE = "MIIEvQIBADANBgkqhkiG9w0BAQEFAASC"
PEM = f"-----BEGIN PRIVATE KEY-----\n{LINE}\nBKcwggSjAgEAAoIBAQC7VJTUt9Us8cKj\n-----END PRIVATE KEY-----"
SECRETS = {
    "HF_TOKEN": "hf_qWeRtYuIoPaSdFgHjKlZxCvBnM",
    "WANDB_API_KEY": "0123456789abcdef" * 2 + "01234567",
    "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI/K7MDENG+bPxRfiCYzz",
    "MLFLOW_TRACKING_PASSWORD": 'p"ä\\ss <w0rd>',
    "SSH_PRIVATE_KEY": PEM,
    "DB_PASSWORD": "correcthorse",
    "NEPTUNE_API_TOKEN": "a" * 39 + "=",
}
# the secret is a part of the variable, or stands in the file that it names: (text, secret)
PARTS = {
    "https_proxy": ("http://me:pr0xy-pass@proxy.invalid:3128", "pr0xy-pass"),
    "MY_PROXY": ("socks5://me:p%40ss-w0rd@proxy.invalid", "p@ss-w0rd"),
    "AZURE_STORAGE_CONNECTION_STRING": ("Name=me;AccountKey=Zm9vYmFyYmF6cXV4;A=b", "Zm9vYmFyYmF6cXV4"),
    "AZURE_CREDENTIALS": ('{"clientId": "me", "clientSecret": "Xy8~clientSecret"}', "Xy8~clientSecret"),
}
ACCOUNT = {"type": "service_account", "private_key": PEM.replace("MII", "NII")}
FILES = {
    "HF_TOKEN_PATH": ("hf_fromTheFileOfTheHub01", "hf_fromTheFileOfTheHub01"),
    "NETRC": ("machine api.wandb.ai login user password netrcPassw0rd\n", "netrcPassw0rd"),
    "GOOGLE_APPLICATION_CREDENTIALS": (json.dumps(ACCOUNT), LINE.replace("MII", "NII")),
}
ORDINARY = {"MAX_TOKENS": "4096", "OTHER_PASSWORD": "password", "A_TOKEN": "1", "B_SECRET": "true"}
VALUES = [*SECRETS.values(), *(value for _, value in (*PARTS.values(), *FILES.values()))]

PRINTED = """
import logging, os, sys, subprocess, json, base64, html, warnings
from pathlib import Path
from urllib.parse import quote
from IPython.display import HTML, display
values, ordinary = json.loads(Path(FOLDER, "values.json").read_text())
for value in values:
    print("plain", value, repr([value]), json.dumps([value]), quote(value), quote(value, safe=""))
    print(html.escape(value), base64.b64encode(f"me:{value}".encode()).decode())
    print(base64.urlsafe_b64encode(value.encode()).decode())
    display(HTML(f"<b>{html.escape(value)}</b>"))
    display({"application/json": {"deep": [1, value]}, "text/plain": value}, raw=True)
    logging.warning("log %s", value)
    warnings.warn(f"warned of {value}")
sys.stderr.flush()
for value in values:
    for part in ("in two parts: ", value[:7], value[7:], "\\n"): sys.stdout.write(part), sys.stdout.flush()
print("ordinary", {name: os.environ[name] for name in ordinary}, "true or 1, correcthorses")
subprocess.run(["env"])
subprocess.run(["sh", "-c", "env >&2"])
(run.path / "tracker").mkdir()
(run.path / "tracker" / "debug.log").write_text("\\n".join(values))
(run.path / "tracker" / "debug.log").chmod(0o644)
append_metrics(run, {"step": 1, "text": values})
write_result(run, {"before": values})
print("end of the cell")
values"""
RAISED = """
with stage(run, "work"):
    if x == 2: os.kill(os.getpid(), 9)
    key, token = os.environ["AWS_SECRET_ACCESS_KEY"], quote(os.environ["HF_TOKEN"])
    hub = f"https://me:{key}@hub.invalid?token={token}"
    raise RuntimeError(f"401 for {hub} {' '.join(values)}")"""
OPENED = (
    "\nfrom cbnb.run.directory import open_run\nfrom cbnb.run.metrics import append_metrics, write_result\n"
    "from cbnb.run.parameters import strict_parameters\nfrom cbnb.run.stages import set_status, stage\n"
    "run = open_run(strict_parameters(globals()), name='toy', run_dir=run_dir or None)"
)


def spellings(value):
    "How a text may hold `value`, worked out here and not by the package."
    coded = [base64.b64encode(b"\0" * n + value.encode()).decode().rstrip("=") for n in range(3)]
    core = [text[at:-2] for text, at in zip(coded, (0, 2, 3))]
    core += [text.replace("+", "-").replace("/", "_") for text in core]
    lines = [line for line in value.splitlines() if "PRIVATE KEY" not in line] if "\n" in value else []
    escaped = [json.dumps(value)[1:-1], json.dumps(value, ensure_ascii=False)[1:-1], html.escape(value)]
    return {value, *lines, *escaped, quote(value), quote(value, safe=""), *core}


def leaks(text):
    "The spellings of the secrets that `text` holds; of a plain word where it is one."
    found = [form for value in VALUES for form in spellings(value) if form in text]
    return [form for form in found if form != "correcthorse" or re.search(rf"\b{form}\b", text)]


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """`(folder, what cbnb and papermill said)` of a sweep of two runs, one of which raises and one is
    killed, and of a run by plain papermill that is killed."""
    folder = tmp_path_factory.mktemp("ran")
    given = SECRETS | {name: text for name, (text, _) in PARTS.items()} | ORDINARY
    for name, (text, _) in FILES.items():
        (folder / name).write_text(text)
        given[name] = str(folder / name)
    (folder / "values.json").write_text(json.dumps([VALUES, list(ORDINARY)]))
    sources = ["x: int = 1\nrun_dir: str = ''", OPENED, PRINTED.replace("FOLDER", repr(str(folder))), RAISED]
    empty = {"cell_type": "code", "metadata": {}, "outputs": [], "execution_count": None}
    cells = [empty | {"id": f"c{i}", "source": source.strip()} for i, source in enumerate(sources)]
    cells[0]["metadata"] = {"tags": ["parameters"]}
    kernel = {"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}
    notebook = {"cells": cells, "metadata": kernel, "nbformat": 4, "nbformat_minor": 5}
    (folder / "toy.ipynb").write_text(json.dumps(notebook))
    (folder / "toy.yaml").write_text(f"notebook: {folder / 'toy.ipynb'}\ngrid: {{x: [1, 2]}}\n")
    plain = [
        sys.executable,
        "-m",
        "papermill",
        folder / "toy.ipynb",
        folder / "plain.ipynb",
        "--log-output",
        "-p",
        "x",
        "2",
        "-p",
        "run_dir",
        folder / "runs" / "plain",
    ]
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with ThreadPoolExecutor(1) as pool, pytest.MonkeyPatch.context() as patch:
        patch.delenv("PYTEST_CURRENT_TEST")  # with it ipykernel leaves file descriptors alone
        for name, value in given.items():
            patch.setenv(name, value)
        env = environment(folder / "runs")
        beside = pool.submit(subprocess.run, list(map(str, plain)), cwd=ROOT, env=env, text=True, **streams)
        sweep = command("ablate", folder / "toy.yaml", "--local", 2, runs=folder / "runs")
        said = [sweep.stdout, beside.result().stdout]
        forked(lambda: close_run(folder / "runs" / "plain", 1) and 0)  # as a batch script does
        return folder, said


@pytest.mark.slow
def test_no_secret_is_in_anything_that_a_run_leaves(ran):
    folder, said = ran
    left = [p for p in (folder / "runs").rglob("*") if p.is_file()] + [folder / "plain.ipynb"]
    wanted = {"out.1.ipynb", "papermill.log", "status.json", "metrics.jsonl", "result.json", "debug.log"}
    assert wanted <= {p.name for p in left}
    texts = {str(p): p.read_bytes().decode("utf-8", "replace") for p in left}
    texts |= dict(zip(("cbnb", "papermill"), said))
    assert {name: found for name, text in texts.items() if (found := leaks(text))} == {}


def test_what_was_printed_is_there_all_the_same(ran):
    "The test above would pass for an empty file, or one in which everything is hidden."
    folder, _ = ran
    executed = [*(folder / "runs" / "toy").glob("*/out.1.ipynb"), folder / "plain.ipynb"]
    assert len(executed) == 3
    for path in executed:
        outputs = [o for cell in load(path)["cells"] for o in cell.get("outputs", ())]
        text = "".join("".join(o.get("text", "")) for o in outputs)
        assert text.count("plain [removed]") == len(VALUES) == text.count("in two parts: [removed]\n")
        assert "HF_TOKEN=[removed]" in text and "end of the cell" in text
        assert "true or 1, correcthorses" in text
        for name, value in ORDINARY.items():
            assert f"'{name}': '{value}'" in text and f"{name}={value}" in text
    sweep = folder / "runs" / "toy"
    states = {load(p.parent / "params.json")["x"]: load(p) for p in sweep.glob("*/status.json")}
    assert states[1]["error"].startswith("RuntimeError: 401 for https://[removed]hub.invalid?token=[removed]")
    assert states[2]["state"] == "failed"
    log = next(p for p in sweep.glob("x1-*/papermill.log")).read_text()
    assert "HF_TOKEN=[removed]" in log, "what env printed past the kernel"
    assert "RuntimeError: 401" in log


def test_everything_in_a_run_directory_is_private(ran):
    folder, _ = ran
    runs = [run for run in (*(folder / "runs" / "toy").iterdir(), folder / "runs" / "plain") if run.is_dir()]
    modes = {p: stat.S_IMODE(p.stat().st_mode) for run in runs for p in (run, *run.rglob("*"))}
    assert any(p.name == "debug.log" for p in modes)
    assert {p: oct(mode) for p, mode in modes.items() if mode & 0o077} == {}


def test_batch_scripts_do_not_print_the_environment():
    scripts = [p for p in (ROOT / "slurm").rglob("*") if p.suffix in (".sh", ".sbatch", ".env")]
    prints = re.compile(
        r"\bprintenv\b|\bset\s+-\w*x|\bset\s*$|\bbash\s+-\w*x|\bdeclare\s+-\w*[px]\w*\s*$"
        r"|\bexport\s+(-p)?\s*$|(^|[;&|(]\s*)env\s*($|[|>])|/environ\b"
    )
    assert len(scripts) > 8
    for path in scripts:
        for number, line in enumerate(path.read_text().splitlines(), 1):
            assert not prints.search(line.partition(" #")[0]), f"{path}:{number}"


HARD = {
    "A_TOKEN": r"""Zq8\wP"4'x9K.+*[a]""",
    "B_TOKEN": "abc/def+ghiJKL12/mnopQRST3456==",
    "D_TOKEN": "eyJ" + "aB3d" * 60,
    "E_TOKEN": "pässwörtß-X12",
    "F_TOKEN": "line one aa\nline two bb 77\nline3cc99",
    "G_TOKEN": "correct horse battery staple 42 " * 4 + "end",
    "H_TOKEN": "😀 smile&<b>;%25 99",
}


@pytest.fixture
def hard(monkeypatch):
    "The values of `HARD`, which are secrets of the environment for as long as a test runs."
    monkeypatch.setattr(withheld, "SEEN", {})
    for name, value in HARD.items():
        monkeypatch.setenv(name, value)
    return list(HARD.values())


def of_quoted(value, change):
    "`value` percent-encoded, with each escape changed."
    return re.sub("%..", lambda found: change(found[0]), quote(value, safe=""))


WRITTEN = {  # the ways to write a text in which something of a value must not stay
    "json": json.dumps,
    "repr": repr,
    "json of repr": lambda v: json.dumps(repr(v)),
    "json of json": lambda v: json.dumps(json.dumps(v)),
    "repr of repr": lambda v: repr(repr(v)),
    "four deep": lambda v: json.dumps(repr(json.dumps(repr({"k": v})))),
    "repr of json": lambda v: repr({"x": json.dumps({"k": v})}),
    "bytes": lambda v: repr(v.encode()),
    "json of bytes": lambda v: json.dumps(repr(v.encode())),
    "ascii": ascii,
    "html": html.escape,
    "markupsafe": lambda v: html.escape(v).replace("&#x27;", "&#39;").replace("&quot;", "&#34;"),
    "json of html": lambda v: json.dumps(html.escape(v)),
    "html of json": lambda v: html.escape(json.dumps(v)),
    "small percent": lambda v: of_quoted(v, str.lower),
    "percent twice": lambda v: quote(quote(v, safe=""), safe=""),
    "form": quote_plus,
    "json slash": lambda v: json.dumps(v).replace("/", r"\/"),
    "json u": lambda v: json.dumps(v).replace("+", r"\u002b").replace("&", r"\u0026").replace("'", r"\u0027"),
    "hex": lambda v: v.encode().hex(),
    "HEX": lambda v: v.encode().hex().upper(),
    "base64 lines": lambda v: base64.encodebytes(b"abc" + v.encode()).decode(),
    "base64 lines in repr": lambda v: repr(base64.encodebytes(v.encode())),
    "shlex": shlex.quote,
    "pprint": lambda v: pprint.pformat({"k": v}),
    "pprint bytes": lambda v: pprint.pformat({"k": v.encode()}),
    "wrapped": lambda v: "\n".join(textwrap.wrap(v, 70)),
    "crlf": lambda v: v.replace("\n", "\r\n"),
    "indented": lambda v: textwrap.indent(v, "    "),
    "visible": visible,
    "yaml": lambda v: yaml.safe_dump({"k": v}),
    "yaml unicode": lambda v: yaml.safe_dump({"k": v}, allow_unicode=True),
    "re": re.escape,
}


@pytest.mark.parametrize("way", WRITTEN)
def test_a_secret_is_found_however_it_is_written(way, hard):
    for value in hard:
        out = withheld.scrub(f"said: {(text := WRITTEN[way](value))} end")
        assert "[removed]" in out, (value, text)
        left = re.sub(r"\[removed\]|said:|end|&quot;|YWJj", "", out)
        assert not re.search(r"[A-Za-z0-9]{4}", left), (value, text, out)


def test_a_shell_that_quotes_is_understood(hard):
    for name, _value in HARD.items():
        out = subprocess.run(["bash", "-c", f'printf %q "${name}"'], capture_output=True, text=True).stdout
        assert "[removed]" in withheld.scrub(out), out


def test_what_is_no_secret_stays(hard):
    for text in (
        "line one a",
        "Zq8 \\wP",
        json.dumps({"k": "abc/def", "n": "correct horse battery"}),
        "pässwörter",
        "\\" * 99,
    ):
        assert withheld.scrub(text) == text


@pytest.mark.parametrize(
    "unit", ["Zq8" + "\\" * 40, "\\", '"', "correct horse ", "eyJaB3d\n", "&amp;", "%25", "aB3d"]
)
def test_no_text_takes_long(unit, hard):
    """Time grows with the length, whatever the text: 1 MB of the worst takes seconds, and of a log 2 ms a
    secret."""
    text = unit * (200_000 // len(unit))
    begin = time.process_time()
    withheld.withhold(text), withheld.open_tail(text)
    assert time.process_time() - begin < 5


def executed(value):
    "A notebook that shows `value` in every place of one."
    error = new_output(
        "error", ename="ValueError", evalue=repr({"k": value}), traceback=["Trace", repr([value])]
    )
    shown = new_output(
        "execute_result", {"text/plain": repr(value), "application/json": {value: [json.dumps(value)]}}
    )
    said = new_output("stream", name="stdout", text=f"{value}\n{json.dumps({'k': value})}\n")
    cell = new_code_cell(f"model = {value!r}", outputs=[shown, said, error])
    return new_notebook(cells=[cell], metadata={"papermill": {"parameters": {"model": value}}})


def is_clean(text, value):
    "Whether no text in a notebook holds something of `value`, also after another JSON or repr."
    parts = re.findall(r"[A-Za-z0-9]{4,}", value)
    return not any(part in text for part in parts if part not in ("line", "text"))


def test_a_notebook_is_scrubbed_text_by_text(hard, tmp_path):
    class Handler:
        _cwd = str(tmp_path)

    for value in hard:
        book = executed(value)
        write_for_papermill(Handler, nbformat.writes(book), "out.ipynb")
        recorded = Book()
        recorded.notebook = book
        for text in ((tmp_path / "out.ipynb").read_text(), recorded.text()):
            assert is_clean(text, value), text
            (cell,) = nbformat.reads(text, 4).cells
            assert cell.source == "model = '[removed]'" or cell.source == 'model = "[removed]"'
            assert cell.outputs[0].data["application/json"] == {"[removed]": ['"[removed]"']}
            assert cell.outputs[1].text == '[removed]\n{"k": "[removed]"}\n'


def test_a_kernel_sends_no_secret_in_a_repr(hard):
    sent = []

    class Wire:
        def send_multipart(self, parts, **_):
            sent.append(b"".join(parts).decode())

    session = Session()
    withheld.guard_session(session)
    for value in hard:
        content = {"data": {"text/plain": repr({"k": repr(value)}), "application/json": {value: [value]}}}
        session.send(Wire(), "execute_result", content)
        session.send(
            Wire(),
            "error",
            {
                "ename": "ValueError",
                "evalue": str(ValueError({"k": value})),
                "traceback": [json.dumps(value)],
            },
        )
        assert all(is_clean(text, value) for text in sent), sent[-2:]


def test_files_with_a_second_name_outside_stay(hard, tmp_path):
    (run := tmp_path / "run").mkdir()
    (outside := tmp_path / "settings").write_text(f"A={HARD['B_TOKEN']}")
    outside.chmod(0o644)
    os.link(outside, run / "copy.txt")
    os.link(outside, run / "other.txt")
    assert private.tidy(run) == []
    assert outside.read_text() == f"A={HARD['B_TOKEN']}" and stat.S_IMODE(outside.stat().st_mode) == 0o644
    for name in ("copy.txt", "other.txt"):
        assert (
            set((run / name).read_text()) == set("A=*") and stat.S_IMODE((run / name).stat().st_mode) == 0o600
        )
    (log := tmp_path / "log").write_bytes(b"kept\nno end")
    os.link(log, run / "metrics.jsonl")
    with pytest.raises(OutputError, match="second name"):
        append_bytes(run / "metrics.jsonl", b"row\n")
    assert log.read_bytes() == b"kept\nno end"


def test_nothing_is_cut_before_it_is_scrubbed(hard):
    token = HARD["D_TOKEN"]
    for before in range(150, 300, 7):
        for block, kind in ((in_words("x"), ConfigError), (name_failures("x"), ConfigError)):
            with pytest.raises(kind) as raised:
                with block:
                    raise ValueError("w " * (before // 2) + token)
            assert "eyJ" not in str(raised.value)
    assert "eyJ" not in wants("a", "a number", token)


def test_errors_are_cut_by_one_function():
    "No text of an error or a value is cut in another way: not `str(e)[:300]`, nor `{value!r:.60}`."

    def of_error(node):
        return any(isinstance(n, ast.Name) and n.id in ("e", "error", "why") for n in ast.walk(node))

    found = []
    for path in sorted((ROOT / "cbnb").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if (
                isinstance(node, ast.Subscript)
                and isinstance(node.slice, ast.Slice)
                and not node.slice.lower
                and of_error(node.value)
            ):
                found.append(f"{path.name}:{node.lineno}")
            if (
                isinstance(node, ast.FormattedValue)
                and node.format_spec
                and (node.conversion == ord("r") or of_error(node.value))
            ):
                spec = "".join(str(getattr(part, "value", "")) for part in node.format_spec.values)
                if re.fullmatch(r"\.\d+", spec):
                    found.append(f"{path.name}:{node.lineno}")
    assert found == []


def test_names_of_secrets(tmp_path):
    login = base64.b64encode(b"me:hunter2Hunter9").decode()
    given = {
        "HOME": str(tmp_path),
        "SSHPASS": "hunter2Hunter5",
        "LDAP_PW": "hunter3Hunter8",
        "DOCKER_AUTH_CONFIG": json.dumps({"auths": {"registry.io": {"auth": login}}}),
    }
    assert {"hunter2Hunter5", "hunter3Hunter8", login, "hunter2Hunter9"} <= set(withheld.secret_values(given))
