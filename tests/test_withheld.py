"""What a run leaves holds no secret of its environment and is private: sweeps and plain papermill whose
kernels print and raise secrets in every way, and are killed."""
import base64, html, json, os, re, stat, subprocess, sys
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import quote

import pytest

from cbnb.run.directory import close_run
from forked import command, forked
from helpers import ROOT, environment
from train_common import load

LINE = "MIIEvQIBADANBgkqhkiG9w0BAQEFAASC"
PEM = f"-----BEGIN PRIVATE KEY-----\n{LINE}\nBKcwggSjAgEAAoIBAQC7VJTUt9Us8cKj\n-----END PRIVATE KEY-----"
SECRETS = {"HF_TOKEN": "hf_qWeRtYuIoPaSdFgHjKlZxCvBnM", "WANDB_API_KEY": "0123456789abcdef" * 2 + "01234567",
           "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI/K7MDENG+bPxRfiCYzz",
           "MLFLOW_TRACKING_PASSWORD": 'p"ä\\ss <w0rd>', "SSH_PRIVATE_KEY": PEM,
           "DB_PASSWORD": "correcthorse", "NEPTUNE_API_TOKEN": "a" * 39 + "="}
# the secret is a part of the variable, or stands in the file that it names: (text, secret)
PARTS = {"https_proxy": ("http://me:pr0xy-pass@proxy.invalid:3128", "pr0xy-pass"),
         "MY_PROXY": ("socks5://me:p%40ss-w0rd@proxy.invalid", "p@ss-w0rd"),
         "AZURE_STORAGE_CONNECTION_STRING": ("Name=me;AccountKey=Zm9vYmFyYmF6cXV4;A=b", "Zm9vYmFyYmF6cXV4"),
         "AZURE_CREDENTIALS": ('{"clientId": "me", "clientSecret": "Xy8~clientSecret"}', "Xy8~clientSecret")}
ACCOUNT = {"type": "service_account", "private_key": PEM.replace("MII", "NII")}
FILES = {"HF_TOKEN_PATH": ("hf_fromTheFileOfTheHub01", "hf_fromTheFileOfTheHub01"),
         "NETRC": ("machine api.wandb.ai login user password netrcPassw0rd\n", "netrcPassw0rd"),
         "GOOGLE_APPLICATION_CREDENTIALS": (json.dumps(ACCOUNT), LINE.replace("MII", "NII"))}
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
OPENED = ("\nfrom cbnb.run.directory import open_run\nfrom cbnb.run.metrics import append_metrics, write_result\n"
          "from cbnb.run.parameters import strict_parameters\nfrom cbnb.run.stages import set_status, stage\n"
          "run = open_run(strict_parameters(globals()), name='toy', run_dir=run_dir or None)")


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
    plain = [sys.executable, "-m", "papermill", folder / "toy.ipynb", folder / "plain.ipynb", "--log-output",
             "-p", "x", "2", "-p", "run_dir", folder / "runs" / "plain"]
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with ThreadPoolExecutor(1) as pool, pytest.MonkeyPatch.context() as patch:
        patch.delenv("PYTEST_CURRENT_TEST")   # with it ipykernel leaves file descriptors alone
        for name, value in given.items(): patch.setenv(name, value)
        env = environment(folder / "runs")
        beside = pool.submit(subprocess.run, list(map(str, plain)), cwd=ROOT, env=env, text=True, **streams)
        sweep = command("ablate", folder / "toy.yaml", "--local", 2, runs=folder / "runs")
        said = [sweep.stdout, beside.result().stdout]
        forked(lambda: close_run(folder / "runs" / "plain", 1) and 0)   # as a batch script does
        return folder, said


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
    prints = re.compile(r"\bprintenv\b|\bset\s+-\w*x|\bset\s*$|\bbash\s+-\w*x|\bdeclare\s+-\w*[px]\w*\s*$"
                        r"|\bexport\s+(-p)?\s*$|(^|[;&|(]\s*)env\s*($|[|>])|/environ\b")
    assert len(scripts) > 8
    for path in scripts:
        for number, line in enumerate(path.read_text().splitlines(), 1):
            assert not prints.search(line.partition(" #")[0]), f"{path}:{number}"
