"""What a run leaves holds no secret of its environment and is private: sweeps and plain papermill whose kernels print and raise secrets in every way, and are killed."""
import base64, html, json, os, re, stat, subprocess, sys
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import quote

import pytest

from cbnb.runs import close_run
from forked import command, forked
from helpers import ROOT, environment
from train_common import load

PEM = "\n".join(["-----BEGIN PRIVATE KEY-----", "MIIEvQIBADANBgkqhkiG9w0BAQEFAASC", "BKcwggSjAgEAAoIBAQC7VJTUt9Us8cKj", "-----END PRIVATE KEY-----"])
SECRETS = {"HF_TOKEN": "hf_qWeRtYuIoPaSdFgHjKlZxCvBnM", "WANDB_API_KEY": "0123456789abcdef" * 2 + "01234567", "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI/K7MDENG+bPxRfiCYzz",
           "MLFLOW_TRACKING_PASSWORD": 'p"ä\\ss <w0rd>', "SSH_PRIVATE_KEY": PEM, "DB_PASSWORD": "correcthorse", "NEPTUNE_API_TOKEN": "a" * 39 + "="}
INSIDE = {"https_proxy": ("http://me:pr0xy-pass@proxy.invalid:3128", "pr0xy-pass"), "MY_PROXY": ("socks5://me:p%40ss-w0rd@proxy.invalid", "p@ss-w0rd"),
          "AZURE_STORAGE_CONNECTION_STRING": ("AccountName=me;AccountKey=Zm9vYmFyYmF6cXV4Zm9v==;EndpointSuffix=core", "Zm9vYmFyYmF6cXV4Zm9v=="),
          "AZURE_CREDENTIALS": ('{"clientId": "me", "clientSecret": "Xy8~clientSecretValue"}', "Xy8~clientSecretValue")}
FILES = {"HF_TOKEN_PATH": ("hf_fromTheFileOfTheHub01", "hf_fromTheFileOfTheHub01"), "NETRC": ("machine api.wandb.ai login user password netrcPassw0rd\n", "netrcPassw0rd"),
         "GOOGLE_APPLICATION_CREDENTIALS": (json.dumps({"type": "service_account", "private_key": PEM.replace("MII", "NII")}), "NIIEvQIBADANBgkqhkiG9w0BAQEFAASC")}
ORDINARY = {"MAX_TOKENS": "4096", "OTHER_PASSWORD": "password", "A_TOKEN": "1", "B_SECRET": "true"}

PRINTED = """
import logging, os, sys, subprocess, json, base64, html, warnings
from urllib.parse import quote
from IPython.display import HTML, display
names = {names!r}
values = [os.environ[name] for name in names] + {more!r}
for value in values:
    print("plain", value, repr([value]), json.dumps([value]), quote(value), quote(value, safe=""), html.escape(value))
    print(base64.b64encode(f"me:{{value}}".encode()).decode(), base64.urlsafe_b64encode(value.encode()).decode())
    display(HTML(f"<b>{{html.escape(value)}}</b>"), {{"application/json": {{"deep": [1, value]}}}}, raw=False)
    display({{"application/json": {{"deep": [1, value]}}, "text/plain": value}}, raw=True)
    logging.warning("log %s", value)
    warnings.warn(f"warned of {{value}}")
sys.stderr.flush()
for value in values:
    for part in ("in two parts: ", value[:7], value[7:], "\\n"): sys.stdout.write(part), sys.stdout.flush()
print("ordinary", {{name: os.environ[name] for name in {ordinary!r}}}, "true or 1, correcthorses")
subprocess.run(["env"])
subprocess.run(["sh", "-c", "env >&2"])
(run.path / "tracker").mkdir()
for name, text in (("debug.log", "\\n".join(values)), ("run.bin", "")):
    (run.path / "tracker" / name).write_text(text)
    (run.path / "tracker" / name).chmod(0o644)
append_metrics(run, {{"step": 1, "text": values}})
write_result(run, {{"before": values}})
print("end of the cell")
values"""
RAISED = """
with stage(run, "work"):
    if x == 2: os.kill(os.getpid(), 9)
    raise RuntimeError(f"401 for https://me:{os.environ['AWS_SECRET_ACCESS_KEY']}@hub.invalid?token={quote(os.environ['HF_TOKEN'])} {' '.join(values)}")"""


def spellings(value):
    "How a text may hold `value`, worked out here and not by the package."
    core = [base64.b64encode(b"\0" * n + value.encode()).decode().rstrip("=")[(0, 2, 3)[n]:-2] for n in range(3)]
    lines = [line for line in value.splitlines() if "PRIVATE KEY" not in line] if "\n" in value else []
    return {value, *lines, json.dumps(value)[1:-1], json.dumps(value, ensure_ascii=False)[1:-1], quote(value), quote(value, safe=""), html.escape(value), *core, *(c.replace("+", "-").replace("/", "_") for c in core)}


def leaks(text, values):
    "The spellings of `values` that `text` holds; of a plain word where it is one."
    return [form for value in values for form in spellings(value) if (re.search(rf"\b{form}\b", text) if value == "correcthorse" else form in text)]


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    "`(folder, values, what cbnb and papermill said)` of a sweep of two runs, one of which raises and one is killed, and of a killed run by plain papermill."
    folder = tmp_path_factory.mktemp("ran")
    given = SECRETS | {name: text for name, (text, _) in INSIDE.items()} | ORDINARY
    for name, (text, _) in FILES.items():
        (folder / name).write_text(text)
        given[name] = str(folder / name)
    values = [*SECRETS.values(), *(value for _, value in (*INSIDE.values(), *FILES.values()))]
    more = [value for _, value in (*INSIDE.values(), *FILES.values())]
    printed = PRINTED.format(names=[*SECRETS], more=[], ordinary=[*ORDINARY]).replace("{more}", "")
    printed = printed.replace("] + []", f"] + json.loads((__import__('pathlib').Path({str(folder)!r}) / 'more.json').read_text())")
    (folder / "more.json").write_text(json.dumps(more))
    sources = ["x: int = 1\nrun_dir: str = ''", "from cbnb.runs import *\nrun = open_run(strict_parameters(globals()), name='toy', run_dir=run_dir or None)", printed, RAISED]
    cells = [{"cell_type": "code", "id": f"c{i}", "metadata": {"tags": ["parameters"] if i == 0 else []}, "source": s.strip(), "outputs": [], "execution_count": None} for i, s in enumerate(sources)]
    kernel = {"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}
    (folder / "toy.ipynb").write_text(json.dumps({"cells": cells, "metadata": kernel, "nbformat": 4, "nbformat_minor": 5}))
    (folder / "toy.yaml").write_text(f"notebook: {folder / 'toy.ipynb'}\ngrid: {{x: [1, 2]}}\n")
    env = {k: v for k, v in environment(folder / "runs").items() if k != "PYTEST_CURRENT_TEST"} | given   # with it ipykernel leaves file descriptors alone
    plain = [sys.executable, "-m", "papermill", folder / "toy.ipynb", folder / "plain.ipynb", "-p", "x", "2", "-p", "run_dir", folder / "runs" / "plain", "--log-output"]
    with ThreadPoolExecutor(1) as pool, pytest.MonkeyPatch.context() as patch:
        patch.delenv("PYTEST_CURRENT_TEST")
        for name, value in given.items(): patch.setenv(name, value)
        beside = pool.submit(subprocess.run, list(map(str, plain)), cwd=ROOT, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        sweep = command("ablate", folder / "toy.yaml", "--local", 2, runs=folder / "runs")
        said = [sweep.stdout, beside.result().stdout]
        forked(lambda: close_run(folder / "runs" / "plain", 1) and 0)   # as a batch script does
        return folder, values, said


def test_no_secret_is_in_anything_that_a_run_leaves(ran):
    folder, values, said = ran
    for text in said: assert not leaks(text, values), [(form, text[max(0, text.index(form) - 200):][:400]) for form in leaks(text, values)[:2]]
    left = [p for p in (folder / "runs").rglob("*") if p.is_file()] + [folder / "plain.ipynb"]
    names = {p.name for p in left}
    assert {"out.1.ipynb", "papermill.log", "status.json", "metrics.jsonl", "result.json", "notebook.ipynb", "debug.log"} <= names, names
    for path in left: assert not leaks(path.read_bytes().decode("utf-8", "replace"), values), (path, leaks(path.read_bytes().decode("utf-8", "replace"), values))


def test_what_was_printed_is_there_all_the_same(ran):
    "The test above would pass for an empty file, or one in which everything is hidden."
    folder, _, said = ran
    executed = [*(folder / "runs" / "toy").glob("*/out.1.ipynb"), folder / "plain.ipynb"]
    assert len(executed) == 3
    for path in executed:
        text = "".join("".join(o.get("text", "")) for cell in load(path)["cells"] for o in cell.get("outputs", ()))
        assert text.count("plain [removed]") == len(SECRETS) + len(INSIDE) + len(FILES) == text.count("in two parts: [removed]\n")
        assert "HF_TOKEN=[removed]" in text and "end of the cell" in text
        for name, value in ORDINARY.items(): assert f"'{name}': '{value}'" in text and f"{name}={value}" in text
        assert "true or 1, correcthorses" in text
    states = {load(p.parent / "params.json")["x"]: load(p) for p in (folder / "runs" / "toy").glob("*/status.json")}
    assert states[1]["error"].startswith("RuntimeError: 401 for https://[removed]hub.invalid?token=[removed]") and states[2]["state"] == "failed"
    log = next(p for p in (folder / "runs" / "toy").glob("x1-*/papermill.log")).read_text()
    assert "HF_TOKEN=[removed]" in log and "RuntimeError: 401" in log, "what `env` printed past the kernel, and the traceback"


def test_everything_in_a_run_directory_is_private(ran):
    folder, *_ = ran
    modes = {p: stat.S_IMODE(p.stat().st_mode) for run in (*(folder / "runs" / "toy").iterdir(), folder / "runs" / "plain") if run.is_dir() for p in (run, *run.rglob("*"))}
    assert any(p.name == "debug.log" for p in modes) and not {p: oct(m) for p, m in modes.items() if m & 0o077}


def test_batch_scripts_do_not_print_the_environment():
    scripts = [p for p in (ROOT / "slurm").rglob("*") if p.suffix in (".sh", ".sbatch", ".env")]
    assert len(scripts) > 8
    for path in scripts:
        for number, line in enumerate(path.read_text().splitlines(), 1):
            code = line.partition(" #")[0]
            assert not re.search(r"\bprintenv\b|\bset\s+-\w*x|\bset\s*$|\bbash\s+-\w*x|\bdeclare\s+-\w*[px]\w*\s*$|\bexport\s+(-p)?\s*$|(^|[;&|(]\s*)env\s*($|[|>])|/environ\b", code), f"{path}:{number}"
