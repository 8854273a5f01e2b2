"""Chat templates that take much of little: each is ended or refused in words, within seconds and MiB that are
counted here; and the process in which templates run is one that nothing disturbs."""

import contextlib
import json
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time

import pytest

from cbnb.masking import templates
from cbnb.masking.templates import (
    LEVELS,
    MaskError,
    ask_process,
    ask_template,
    compile_template,
    render,
    start_process,
    template_inputs,
    trace_render,
    trace_renders,
)
from forked import forked
from helpers import ROOT, run
from hostile import BOMBS, REFUSALS

ASKED = [{"role": "user", "content": "x"}]
LIMIT = 0.05  # seconds of the processor, here; python tests/hostile.py runs them under the package's own
# as long as the transcript says
BY_NUMBER = "{% for m in messages %}{{ m.role }} {{ 'x' * (m.content | int) }};{% endfor %}"


def numbered(number):
    return [{"role": "user", "content": str(number)}]


@pytest.fixture(scope="module")
def told():
    "What tests/hostile.py says, run in a process of its own."
    # 12 of the processor; a machine that is full takes ten times as long
    done = run(sys.executable, ROOT / "tests" / "hostile.py", str(LIMIT), cwd=ROOT, timeout=600)
    assert done.returncode == 0, done.stdout
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_there_are_seventy_kinds(told):
    assert len(BOMBS) >= 70 and told["outcomes"].keys() == {*BOMBS, *REFUSALS}


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_ended(name, told):
    said, wall, cpu = told["outcomes"][name]
    assert re.match(
        "the chat template refuses this transcript: it (runs for over 0.05 seconds|takes over 512 MiB of "
        "memory); ",
        said,
    ), said
    # the processor's time is counted in both processes, with the start of the next
    assert cpu < LIMIT + 0.5 and wall < 60, (cpu, wall)


@pytest.mark.parametrize("name", REFUSALS)
def test_what_needs_no_end_is_refused_in_words(name, told):
    said, wall, _ = told["outcomes"][name]
    assert said.startswith("the chat template ") and len(said) < 700 and wall < 60, said


def test_a_bomb_takes_no_memory(told):
    assert told["mib"] < 64 and told["child_mib"] <= 512, told


def test_what_templates_do_with_lists_still_works():
    source = (
        "{% set n = namespace(out=[]) %}{% for m in messages %}{% set n.out = n.out + [{'role': m.role, "
        "'text': [m.content, 'y']}] %}{% endfor %}"
        "{% set b %}{{ n.out | tojson }}{% endset %}{{ b }}{{ ['a', 'b'] | join(', ') }}{{ '%s-%s' | "
        "format(1, 'z') }}{{ ' '.join(('p', 'q')) }}"
    )
    assert render(compile_template(source), ASKED) == '[{"role": "user", "text": ["x", "y"]}]a, b1-zp q'


def test_the_largest_transcript_is_rendered_and_traced():
    content = "\U0001f600" * (2**23 - 64)  # four bytes each, in Python and in UTF-8
    trace = trace_render(
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}",
        [{"role": "user", "content": content}],
        None,
        {},
    )
    assert trace.level == LEVELS[0] and trace.text == f"<user>{content}"


# --- transcripts that are hostile, and templates that are slow for some ---


def test_of_a_batch_only_the_hostile_one_is_refused():
    good, bad, other = trace_renders(BY_NUMBER, [(numbered(n), None, {}) for n in (3, 10**10, 4)])
    assert good.text == "user xxx;" and other.text == "user xxxx;" and good.level == other.level
    assert isinstance(bad, MaskError) and "it takes over 512 MiB of memory" in str(bad)


def test_a_template_that_has_to_be_ended_again_and_again_is_not_run(monkeypatch):
    monkeypatch.setattr(templates, "MAX_RENDER_SECONDS", 0.05)
    source = BY_NUMBER + "{# ended often #}{% if messages[0].content == '1' %}{{ 9 ** (10 ** 9) }}{% endif %}"
    said = [str(ask_template(source, "render", (numbered(1),))[0]) for _ in range(6)]
    assert [s for s in said if "runs for over" in s] == said[:4] and "had to be ended 4 times" in said[
        4
    ] == said[5]
    assert "had to be ended 4 times" in str(ask_template(source, "trace", (numbered(2), None, {}, {}))[0])


def test_a_good_template_is_not_given_up_for_a_bad_transcript_in_a_thousand(monkeypatch):
    monkeypatch.setattr(templates, "RENDERS_PER_END", 10)
    source = BY_NUMBER + "{# now and then #}"
    for _ in range(4):
        assert [
            isinstance(a, MaskError)
            for a in ask_template(source, "render", (numbered(10**10),), *[(numbered(1),)] * 10)
        ] == [True] + [False] * 10
    assert templates.tally(source)[1] == 4 and render(source, numbered(1)) == "user x;"


def tokenizer():
    "One without a vocabulary: no text of these tests is tokenised."
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE()), bos_token="<s>", eos_token="</s>"
    )


def test_setting_up_a_masker_ends_a_template_four_times_at_most(monkeypatch):
    from cbnb.masking.masker import ChatMasker

    monkeypatch.setattr(templates, "MAX_RENDER_SECONDS", 0.05)
    source = (
        "{% if messages | length > 1 %}{{ 9 ** (10 ** 9) }}{% endif %}x</s>{% if add_generation_prompt "
        "%}A: {% endif %}"
    )
    for attempt in (
        lambda m: m.encode([*ASKED, {"role": "assistant", "content": "y"}]),
        lambda m: m.with_adaptations(["hermes"]),
        lambda m: m.encode(ASKED),
    ):
        with contextlib.suppress(MaskError):
            attempt(ChatMasker(tokenizer(), source))
    assert templates.tally(source)[1] == 4


def test_transformers_renders_no_template_of_others(monkeypatch):
    "It has no bounds: what it is given is the package's own probe."
    from cbnb.masking.masker import PROBE, ChatMasker

    made = tokenizer()
    given, source, theirs = (
        [],
        "{{ bos_token }}{{ other }}{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}",
        made.apply_chat_template,
    )
    monkeypatch.setattr(
        made, "apply_chat_template", lambda *a, **k: given.append(k["chat_template"]) or theirs(*a, **k)
    )
    assert ChatMasker(made, source).prompt(ASKED) == "<s>user: x"
    assert given == [PROBE + "{{ bos_token }}\n{{ messages }}\n{{ other }}\n"]
    for other in (
        lambda m, *a, **k: theirs([{**m[0], "content": "x "}], *a, **k),
        lambda *a, **k: theirs(*a, **k | {"other": 1}),
        lambda *a, **k: theirs(*a, **k) + " ",
    ):
        monkeypatch.setattr(made, "apply_chat_template", other)
        with pytest.raises(
            MaskError, match="gives the template other values; this version of transformers is not supported"
        ):
            ChatMasker(made, source).prompt(ASKED)


# --- the process ---


def test_the_process_has_bounds_and_nothing_of_ours(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    templates.end()
    process = start_process()
    assert template_inputs("{{ a_first_question }}")  # it has set its bounds
    assert resource.prlimit(process.pid, resource.RLIMIT_AS) == (templates.MAX_RENDER_BYTES,) * 2
    assert (
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE)
        == (0, 0)
        == resource.prlimit(process.pid, resource.RLIMIT_CORE)
    )
    with open(f"/proc/{process.pid}/environ", "rb") as f:
        assert b"secret" not in f.read()
    assert {*os.listdir(f"/proc/{process.pid}/fd")} == {"0", "1", "2"} and os.readlink(
        f"/proc/{process.pid}/cwd"
    ) == "/"


def test_threads_share_it():
    answers = {}

    def work(name):
        for i in range(20):
            answers[name, i] = render(BY_NUMBER, numbered(i + name))

    threads = [threading.Thread(target=work, args=(name,)) for name in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert answers == {(name, i): f"user {'x' * (i + name)};" for name in range(4) for i in range(20)}


def test_a_fork_has_its_own():
    render(BY_NUMBER, numbered(1))
    mine = start_process().pid

    def work():
        assert render(BY_NUMBER, numbered(2)) == "user xx;" and start_process().pid != mine
        print("own")

    done = forked(work)
    assert (
        done.stdout == "own\n"
        and start_process().pid == mine
        and render(BY_NUMBER, numbered(3)) == "user xxx;"
    ), done.stdout


def test_a_signal_to_the_job_does_not_end_it():
    render(BY_NUMBER, numbered(1))
    pid = start_process().pid
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        os.kill(pid, number)
    assert render(BY_NUMBER, numbered(2)) == "user xx;" and start_process().pid == pid
    assert os.getpgid(pid) != os.getpgid(0)


def test_a_key_pressed_in_between_leaves_no_answer_behind(monkeypatch):
    render(BY_NUMBER, numbered(1))
    before = start_process().pid

    class Pressed:
        def __init__(self):
            self.left = 3

        def register(self, *args):
            pass

        def poll(self, wait):
            raise KeyboardInterrupt

    monkeypatch.setattr(templates.select, "poll", Pressed)
    with pytest.raises(KeyboardInterrupt):
        render(BY_NUMBER, numbered(5))
    monkeypatch.undo()
    assert render(BY_NUMBER, numbered(2)) == "user xx;" and start_process().pid != before


def test_a_process_that_neither_works_nor_ends_is_killed(monkeypatch):
    render(BY_NUMBER, numbered(1))
    stopped = start_process()
    os.kill(stopped.pid, signal.SIGSTOP)
    with pytest.raises(TimeoutError):
        templates.exchange(b"", time.monotonic() + 0.1)
    templates.end(0)
    assert stopped.returncode == -signal.SIGKILL and render(BY_NUMBER, numbered(2)) == "user xx;"


def handles():
    return sorted(os.listdir("/proc/self/fd"))


def test_a_process_that_is_killed_costs_no_answer_and_leaves_nothing(monkeypatch, tmp_path):
    """Between two requests, and in the middle of one; each time another process goes on, and no descriptor,
    no child and no file is left."""
    templates.end()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before = handles()
    for _ in range(3):
        render(BY_NUMBER, numbered(1))
        os.kill(start_process().pid, signal.SIGKILL)
        assert render(BY_NUMBER, numbered(2)) == "user xx;"
    wait, killed = templates.exchange, []

    def in_the_middle(data, deadline):
        if not killed:
            killed.append(start_process().pid)
            threading.Timer(0.1, os.kill, (killed[0], signal.SIGKILL)).start()
        return wait(data, deadline)

    monkeypatch.setattr(templates, "exchange", in_the_middle)
    slow = "{% for i in range(900) %}{% for j in range(900) %}{% endfor %}{% endfor %}{{ messages | length }}"
    assert ask_template(slow, "render", *[(ASKED,)] * 8) == ["1"] * 8 and start_process().pid != killed[0]
    templates.end()
    assert handles() == before and not any(tmp_path.iterdir())
    with pytest.raises(ProcessLookupError):
        os.kill(killed[0], 0)


def test_a_process_that_dies_of_every_request_is_said(monkeypatch):
    wait = templates.exchange

    def dying(data, deadline):
        os.kill(start_process().pid, signal.SIGKILL)
        return wait(data, deadline)

    monkeypatch.setattr(templates, "exchange", dying)
    with pytest.raises(MaskError, match=r"it ends its process \(status -9\); change the transcript"):
        render(BY_NUMBER + "{# dies #}", numbered(1))


def test_a_job_that_was_stopped_for_hours_goes_on(monkeypatch):
    """SLURM suspends a job with all its processes: afterwards the time of the wall is over, and no template
    is to blame."""
    wait, late = templates.exchange, []

    def once(data, deadline):
        if late:
            return wait(data, deadline)
        late.append(True)
        os.kill(start_process().pid, signal.SIGSTOP)
        return wait(data, time.monotonic() + 0.1)

    monkeypatch.setattr(templates, "exchange", once)
    assert render(BY_NUMBER, numbered(3)) == "user xxx;" and templates.tally(BY_NUMBER)[1] <= 1


@pytest.mark.parametrize("number", (signal.SIGINT, signal.SIGTERM, signal.SIGKILL))
def test_the_end_of_its_owner_at_work_leaves_none_behind(number):
    """Ctrl-C in a terminal, the shutdown of a kernel, a job that is killed: while a template is running,
    which then ends, too."""
    program = (
        "from cbnb.masking import templates\nfrom cbnb.masking.templates import "
        "*\ntemplates.MAX_RENDER_SECONDS = 0.5\nprint(start_process().pid, flush=True)\nrender('{{ 9 ** "
        "(10 ** 8) }}', [])"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    ) as owner:
        pid = int(owner.stdout.readline())
        time.sleep(0.3)
        os.killpg(owner.pid, number)
    gone(pid)


def gone(pid):
    "Waits until the process `pid` has ended, longer than a template may run."
    end = time.monotonic() + 30
    while time.monotonic() < end:
        try:
            with open(f"/proc/{pid}/stat") as f:
                # ended, and not yet waited for by whoever adopted it
                if f.read().rsplit(")", 1)[1].split()[0] == "Z":
                    return
        except (FileNotFoundError, ProcessLookupError):
            return
        time.sleep(0.02)
    raise AssertionError(f"process {pid} is still there")


def test_it_ends_with_its_owner():
    program = (
        "import sys\nfrom cbnb.masking.templates import *\nrender('{{ 1 }}', "
        "[])\nprint(start_process().pid, flush=True)\nsys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as owner:
        pid = int(owner.stdout.readline())
        os.kill(pid, 0)
        owner.kill()
    gone(pid)


def test_what_is_no_json_is_refused_and_runs_no_code():
    for value in (print, re.compile("x"), threading.Lock(), object()):
        with pytest.raises(MaskError, match="is given what is no JSON"):
            render("{{ x }}", ASKED, None, {"x": value})
    assert (
        render("{{ x }}", ASKED, None, {"x": (1, None, 2.5, {"a": [True]})})
        == "(1, None, 2.5, {'a': [True]})"
    )
    assert ask_process([("inputs", ("{{ y }}",))]) == [(True, {"y"})]
