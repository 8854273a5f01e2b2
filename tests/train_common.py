"""`papermill nbs/train.ipynb` as a user calls it, for the tests of full runs and of short ones."""

import json
import sys
from pathlib import Path

from helpers import NBS, ROOT, run


def papermill(*arguments, cwd=ROOT, runs=None, notebook=NBS / "train.ipynb", timeout=900, **env):
    "`papermill train.ipynb ARGUMENTS`, with the runs folder `runs` and further environment variables."
    if runs:
        env["CBNB_RUNS"] = str(runs)
    return run(sys.executable, "-m", "papermill", notebook, *arguments, cwd=cwd, env=env, timeout=timeout)


def load(path):
    return json.loads(Path(path).read_text())


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def little_data(folder):
    """Parameters that point to a few transcripts in `folder`, written here, for runs that measure nothing of
    interest."""
    from cbnb.transcripts.reader import write_transcripts
    from cbnb.transcripts.tinyworld import make_transcripts

    for name, part in (("data", slice(0, 8)), ("eval_data", slice(8, 10))):
        write_transcripts(
            folder / f"{name}.jsonl",
            [t for kind in ("injection", "plain") for t in make_transcripts(kind, 10)[part]],
        )
    return {name: str(folder / f"{name}.jsonl") for name in ("data", "eval_data")} | {
        "preset": "tinyagent",
        "max_new_tokens": 4,
        "eval_scales": "",
        "diagnose_steps": 0,
    }


def few(folder, **parameters):
    """papermill's arguments for a run that is over in seconds, on `little_data`, for what does not depend on
    what it learned."""
    given = (
        little_data(folder)
        | {"total_steps": 4, "warmup_steps": 1, "batch_size": 2, "diagnose_steps": 2}
        | parameters
    )
    return [word for name, value in given.items() for word in ("-p", name, value)]
