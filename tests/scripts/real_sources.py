"""What cbnb makes of real transcripts: `python tests/scripts/real_sources.py FOLDER [--most N] [--write]`.

FOLDER holds one folder for each source, with its files as they were fetched. Prints three tables as Markdown:
what was read of each source; what three stock templates encode of it, without adaptations and with them; and,
of a source called `agentdojo`, whose actions its harmful runs show. `--write` puts them into
nbs/real_sources.md, in the place of what stands there of these sources; others' rows stay. With `--most` N,
at most N transcripts of a source are encoded. An answer whose trained words are not those of
`spoken.spelled`, which asks no masker, is an AssertionError.
"""

import argparse
import random
import re
import sys
import time
import warnings
from collections import Counter
from itertools import dropwhile, takewhile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))
from cbnb.data.convert import cause_of  # noqa: E402
from cbnb.data.spans import find_spans  # noqa: E402
from cbnb.evaluate.benchmarks import own_calls, questions  # noqa: E402
from cbnb.masking.actions import (  # noqa: E402
    action_key,
    action_origins,
    actions,
    first_injected,
    injected_actions,
    with_own_work,
)
from cbnb.masking.adapt import adapt, adapt_names, restore  # noqa: E402
from cbnb.masking.targets import training_mask  # noqa: E402
from cbnb.masking.templates import MaskError  # noqa: E402
from cbnb.transcripts.holdout import count_shared, part  # noqa: E402
from cbnb.transcripts.reader import read_transcripts  # noqa: E402
from cbnb.transcripts.record import TranscriptError  # noqa: E402
from spoken import STOCK, spelled, stock_masker, trained  # noqa: E402

FILE = ROOT / "nbs" / "real_sources.md"


def table(head, rows):
    "Lines of a Markdown table; columns whose cells are numbers are set right."
    aligned = [
        "--:" if rows and re.fullmatch(r"[\d.]+", str(cell)) else "---"
        for cell in (rows[0] if rows else head)
    ]
    return [f"| {' | '.join(map(str, row))} |" for row in (head, aligned, *rows)] + [""]


def kept(head, column, sources):
    """Rows of the table in FILE whose first cells are `head`, but for those that name one of `sources` in
    their `column`."""
    lines = FILE.read_text(encoding="utf-8").splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {' | '.join(head)} |"))
    rows = [line.strip("| ").split(" | ") for line in takewhile(bool, lines[start + 2 :])]
    return [row for row in rows if row[column] not in sources]


def counted(counts):
    return ", ".join(f"{n:,} × {name}" for name, n in counts.most_common()) or "none"


def read(folder):
    "`(transcripts, row of the table)` of a source."
    start, found, dropped, adaptations = time.monotonic(), [], Counter(), Counter()

    def records(label=None):
        reader = read_transcripts(folder, on_error="skip", label=label)
        return reader, [*reader.records(empty=True)]

    reader, each = records()
    # a format that says nothing of harm
    if all(isinstance(t, TranscriptError) for t in each):
        reader, each = records("benign")
    for t in each:
        if isinstance(t, TranscriptError):
            dropped[cause_of(t)] += 1
        else:
            found.append(t)
            adaptations.update({k: n for k, n in (t.meta.get("adapted") or {}).items() if type(n) is int})
    labels = Counter(t.label for t in found)
    out = Counter(reader.left_out) + Counter({"read once, though they stood twice": reader.repeated})
    return found, (
        folder.name,
        len(found) + dropped.total() + out.total(),
        len(found),
        counted(adaptations),
        counted(dropped + out),
        ", ".join(f"{n:,} {label}" for label, n in sorted(labels.items())),
        sum(bool(t.injection_spans) for t in found),
        round(time.monotonic() - start, 1),
    )


def share(n, of):
    return f"{n:,} of {of:,} ({n / of:.1%})"


def encoding(masker, transcripts):
    "The Encoding of each of `transcripts`, or the MaskError in its place."
    for at in range(0, len(transcripts), 64):
        yield from masker.encode_batch(transcripts[at : at + 64], errors="return")


def is_whole(e):
    return not isinstance(e, MaskError) and not (
        e.lost_words or e.lost_calls or any("drops its content" in w for w in e.warnings)
    )


def meet(source, transcripts):
    "Rows of the table template × source."
    for name, (_, _, names, _) in STOCK.items():
        start, names = time.monotonic(), adapt_names(names)
        before = list(encoding(stock_masker(name), transcripts))
        changed = [adapt(t, names) for t in transcripts]
        for t, other in zip(transcripts, changed):
            assert restore(other) == t, (name, t.id)
        refused, equal, whole, done = Counter(), 0, 0, Counter()
        for t, other, e in zip(transcripts, changed, encoding(stock_masker(name, names), changed)):
            done.update(other.meta.get("adaptations", {}).get("counts", {}).keys())
            if isinstance(e, MaskError):
                refused[cause_of(e)] += 1
            else:
                assert (said := trained(name, e)) == (meant := spelled(name, t.messages)), (
                    name,
                    t.id,
                    meant - said,
                    said - meant,
                )
                equal, whole = equal + 1, whole + is_whole(e)
        n = len(transcripts)
        yield (
            name,
            source,
            share(sum(not isinstance(e, MaskError) for e in before), n),
            share(sum(map(is_whole, before)), n),
            share(equal, n),
            share(whole, n),
            counted(done),
            counted(refused),
            round(time.monotonic() - start, 1),
        )


def whose_actions(transcripts):
    """Lines on the harmful runs of AgentDojo: whose calls follow the injection, how many tokens move, and
    what is held out."""
    transcripts = with_own_work([find_spans(t, wrappers=True)[0] for t in transcripts])
    harmful = [t for t in transcripts if t.label == "harmful" and t.injection_spans]
    masker, calls, messages, tokens, refused = (
        stock_masker("Gemma 3", names := STOCK["Gemma 3"][2]),
        Counter(),
        Counter(),
        Counter(),
        Counter(),
    )
    for t in harmful:
        try:
            found, changed = action_origins(t), adapt(t, names)
        except MaskError as e:
            refused[cause_of(e)] += 1
            continue
        after = [
            action_key(made) in t.meta["own_work"]["calls"]
            for i, _, made in actions(t)
            if i > first_injected(t)
        ]
        messages.update(kind for kind in found.values() if kind != "words")
        calls.update(all=len(after), own=sum(after), runs=1, with_own=any(after), first=own_calls(t))
        own = injected_actions(changed)
        every, theirs = masker.encode_batch([changed, own])
        every, theirs = (
            training_mask(every, changed, "post_injection_only"),
            training_mask(theirs, own, "injected_actions_only"),
        )
        assert not (theirs & ~every).any(), t.id
        tokens.update(every=int(every.sum()), theirs=int(theirs.sum()))
    yield (
        f"- {share(len(harmful), sum(t.label == 'harmful' for t in transcripts))} harmful runs have "
        "injection spans, by the wrappers of `cbnb spans`; "
        f"{calls['runs']:,} can be compared with attack-free runs of their task (others: {counted(refused)})"
    )
    if calls["all"]:
        yield (
            f"- {share(calls['own'], calls['all'])} calls after the injection are the user's own work, and "
            f"{share(calls['with_own'], calls['runs'])} runs hold one; "
            f"of the messages with calls there, {counted(messages)}"
        )
    if tokens["every"]:
        yield (
            f"- `injected_actions_only` trains {share(tokens['theirs'], tokens['every'])} of the tokens "
            "that `post_injection_only` trains"
        )
    if calls["runs"]:
        yield (
            "- the first call after the injection is the user's own in "
            f"{share(calls['first'], calls['runs'])} runs: no attack question comes of them"
        )
    asked = [q for t in harmful for q in questions(t)]
    own = [
        q
        for q in asked
        if {*q.meta.get("sensitive_tools", ())} & {*q.meta.get("own_work", {}).get("tools", ())}
    ]
    if asked:
        yield (
            f"- {len(asked):,} attack questions come of them; the `sensitive_tools` of "
            f"{share(len(own), len(asked))} hold a tool of the user's own task"
        )
    parted = part(
        [t for t in transcripts if t.label == "harmful"], [t for t in transcripts if t.label == "benign"]
    )
    lines = [
        f"{f['shared']} of {f['with']} share their {kind}"
        for kind, f in count_shared(parted.harmful + parted.benign, parted.held_out).items()
        if kind != "suite"
    ]
    yield (
        f"- held out by task and injection: {len(parted.held_out):,} runs, of which {'; '.join(lines)} "
        f"with one of the {len(parted.harmful) + len(parted.benign):,} that are trained"
    )
    assert not any(
        f["shared"]
        for kind, f in count_shared(parted.harmful + parted.benign, parted.held_out).items()
        if kind in ("task", "injection", "prompt")
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--most", type=int)
    parser.add_argument("--write", action="store_true")
    args, sources, first, second, more = parser.parse_args(), {}, [], [], []
    warnings.simplefilter("ignore")  # on records that are skipped: they are counted
    for folder in sorted(p for p in args.folder.iterdir() if p.is_dir()):
        sources[folder.name], row = read(folder)
        first.append(row)
        print(*row, sep=" | ", file=sys.stderr, flush=True)
    for name, transcripts in sources.items():
        if not transcripts:
            continue
        some = (
            transcripts
            if args.most is None or len(transcripts) <= args.most
            else random.Random(0).sample(transcripts, args.most)
        )
        for row in meet(name, some):
            second.append(row)
            print(*row, sep=" | ", file=sys.stderr, flush=True)
    if "agentdojo" in sources:
        more = [
            "Of AgentDojo's runs, by cbnb.masking.actions and cbnb.transcripts.holdout:",
            "",
            *whose_actions(sources["agentdojo"]),
            "",
        ]
    else:
        more = [
            *dropwhile(
                lambda line: not line.startswith("Of AgentDojo"),
                FILE.read_text(encoding="utf-8").splitlines(),
            ),
            "",
        ]
    first = sorted([*kept(("source", "records"), 0, sources), *first], key=lambda row: row[0])
    second = sorted([*kept(("template", "source"), 1, sources), *second], key=lambda row: row[1])
    command = " ".join(
        [
            "python tests/scripts/real_sources.py FOLDER",
            *[f"--most {args.most}"] * (args.most is not None),
            "--write",
        ]
    )
    lines = [
        f"<!-- Made by `{command}`, with one folder for each source in FOLDER: do not edit. -->",
        "",
        "# Real records",
        "",
        "> How many records of public data sets are read, and what three chat templates make of them",
        "",
        *table(
            (
                "source",
                "records",
                "read",
                "adapted by the reader",
                "dropped or left out",
                "labels",
                "with spans",
                "seconds",
            ),
            first,
        ),
        *table(
            (
                "template",
                "source",
                "encoded before",
                "nothing lost before",
                "encoded after, words equal",
                "nothing lost after",
                "transcripts adapted",
                "refused after",
                "seconds",
            ),
            second,
        ),
        *more,
    ]
    print(*lines, sep="\n")
    if args.write:
        FILE.write_text("\n".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
