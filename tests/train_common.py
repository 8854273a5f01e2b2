"""`papermill nbs/train.ipynb` as a user calls it, for the tests of full runs and of short ones."""
import json, sys
from pathlib import Path

from helpers import NBS, ROOT, run

# a run that is over in seconds, for what does not depend on what it learned
FEW = ("-p", "total_steps", 4, "-p", "warmup_steps", 1, "-p", "max_new_tokens", 4, "-p", "diagnose_steps", 2)


def papermill(*arguments, cwd=ROOT, runs=None, notebook=NBS / "train.ipynb", timeout=900, **env):
    "`papermill train.ipynb ARGUMENTS`, with the runs folder `runs` and further environment variables."
    if runs: env["CBNB_RUNS"] = str(runs)
    return run(sys.executable, "-m", "papermill", notebook, *arguments, cwd=cwd, env=env, timeout=timeout)


def load(path): return json.loads(Path(path).read_text())


def metrics(folder): return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
