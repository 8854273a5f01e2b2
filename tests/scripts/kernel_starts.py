"""How many of COUNT runs that start at once get their kernel: python tests/scripts/kernel_starts.py [COUNT]
[ENGINE]

Each run is the command that a user or a batch script gives, `papermill NOTEBOOK OUT`, on a notebook of one
line. ENGINE nbclient is papermill's own, by TCP; without it the runs take cbnb's, by unix sockets. A minute
or two for 50 on two cores."""

import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import nbformat


def main(count=50, engine=None):
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell("1 + 1")], metadata={"kernelspec": kernel}
    )
    with tempfile.TemporaryDirectory() as folder:
        nbformat.write(notebook, f"{folder}/one.ipynb")
        start, more = time.monotonic(), ["--engine", engine] if engine else []
        command = [sys.executable, "-m", "papermill", "--no-progress-bar", "one.ipynb"]
        with open(f"{folder}/log", "w+") as log:
            runs = [
                subprocess.Popen(
                    [*command, f"out{i}.ipynb", *more],
                    cwd=folder,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                )
                for i in range(count)
            ]
            ended = Counter(run.wait() for run in runs)
            log.seek(0)
            reasons = Counter(line.strip() for line in log if "Error: " in line)
        done = sum(
            '"text/plain": [\n' in Path(f"{folder}/out{i}.ipynb").read_text()
            for i in range(count)
            if Path(f"{folder}/out{i}.ipynb").exists()
        )
    print(
        f"{ended[0]} of {count} runs ended well, {done} with an output, in {time.monotonic() - start:.0f} s"
    )
    for reason, times in reasons.most_common():
        print(f"{times} x {reason}")
    return int(ended[0] < count or done < count)


if __name__ == "__main__":
    sys.exit(main(int((sys.argv[1:] or [50])[0]), *sys.argv[2:]))
