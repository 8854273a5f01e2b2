"""AgentDojo's ground truth, judged by its own pipeline, and played through cbnb's in the place of generation.

python tests/dojo_replay.py [--pairs N] [SUITE…]

Every user task of each suite, and N pairs of a user task and an injection task in three behaviours (obeys and
goes on, obeys only, does not obey), judged twice: by AgentDojo's GroundTruthPipeline, and by the tiny agent's
template, reader and prompts with the recorded turns as generated tokens. Prints how many verdicts are equal,
and fails where one is not. 200 to 400 pairs of one suite take two minutes of CPU at most."""

import argparse
import contextlib
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

from cbnb.agent.agentdojo import VERSION, dojo
from cbnb.agent.agentdojo_runs import list_tasks, open_bench, run_tasks, task_of
from cbnb.agent.model import Agent, prompt_for, read_reply
from cbnb.evaluate.decoding import Decoding
from cbnb.evaluate.reader import derive_reader
from cbnb.masking.masker import ChatMasker
from cbnb.step.models import load_tokenizer

BEHAVIOURS = ("obeys and goes on", "obeys only", "does not obey")


def tiny_agent(model=None):
    "The tiny agent's template and reader; `model` where one is to generate."
    masker = ChatMasker(load_tokenizer("tinyagent"))
    return Agent(model, masker, derive_reader(masker), Decoding(max_new_tokens=24))


@dataclass
class Replay:
    """What answers in the place of a Batcher: turn k of episode NAME is `scripts[NAME][k]`, an assistant
    message, as the tokens that its template writes, read as generated tokens are."""

    agent: Agent
    scripts: dict = field(default_factory=dict)
    prompts: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def episode(self):
        return contextlib.nullcontext()

    def close(self):
        pass

    def ask(self, request, check=None):
        script = self.scripts[request.name]
        message, masker = script[request.turn], self.agent.masker
        with self.lock:
            prompt = prompt_for(self.agent, request)  # asserts that training sees these ids
            self.prompts += 1
            text = masker.encode([*request.messages, message], request.tools).text
            rest = text[len(masker.prompt(request.messages, request.tools)) :]
            ids = masker.tokenizer(rest, add_special_tokens=False)["input_ids"]
            reply = read_reply(self.agent, request, prompt, ids, True)
        calls = [c["function"] for c in reply.message.get("tool_calls") or ()]
        assert calls == [c["function"] for c in message.get("tool_calls") or ()], (request.name, calls)
        assert reply.message["content"] == message["content"], (request.name, reply.message)
        return reply


def script_of(calls, output):
    "Assistant messages that make AgentDojo's `calls` one by one and end with the text `output`."
    turns = [
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [
                {
                    "id": f"call{k:05d}",
                    "type": "function",
                    "function": {"name": c.function, "arguments": dict(c.args)},
                }
            ],
        }
        for k, c in enumerate(calls)
    ]
    return [*turns, {"role": "assistant", "content": output}]


@dataclass
class Acted:
    "A task of AgentDojo's GroundTruthPipeline: the ground truth of several tasks, one after the other."

    tasks: list

    def ground_truth(self, world):
        return [call for task in self.tasks for call in task.ground_truth(world)]

    @property
    def GROUND_TRUTH_OUTPUT(self):  # noqa: N802
        return self.tasks[-1].GROUND_TRUTH_OUTPUT


def acted(user, injection, behaviour):
    "The tasks that an agent does which has a `user` task and reads an `injection` one, by its `behaviour`."
    if injection is None:
        return Acted([user])
    return Acted(
        {BEHAVIOURS[0]: [injection, user], BEHAVIOURS[1]: [injection], BEHAVIOURS[2]: [user]}[behaviour]
    )


def world_of(suite, user, injections):
    world = suite.load_and_inject_default_environment(injections)
    return user.init_environment(world) if hasattr(user, "init_environment") else world


def judge_both(suite_name, attack, tasks, behaviour, folder, threads=8, version=VERSION):
    """`{task: ((utility, security) by AgentDojo's GroundTruthPipeline, those in our run file)}` of `tasks`,
    those whose ground truth raises in a world that another has changed, and the number of turns."""
    replay = Replay(tiny_agent())
    title = f"local-{behaviour.replace(' ', '-')}"
    bench = open_bench(replay, suite_name, attack, folder, title, steps=99, version=version)
    suite, pipelines = bench.suite, dojo("agent_pipeline.ground_truth_pipeline")
    theirs, raised = {}, []
    for task in tasks:
        user, injection = task_of(suite, task.user), suite.injection_tasks.get(task.injection)
        injections = bench.attack.attack(user, injection) if injection else {}
        agent = acted(user, injection, behaviour)
        try:
            theirs[task] = suite.run_task_with_pipeline(
                pipelines.GroundTruthPipeline(agent), user, injection, injections
            )
        except Exception as e:
            raised.append(f"{task}: {type(e).__name__}")
            continue
        calls = agent.ground_truth(world_of(suite, user, injections))
        name = f"{suite_name}/{task.user}/{task.attack}/{task.injection}"
        replay.scripts[name] = script_of(calls, agent.GROUND_TRUTH_OUTPUT)
    results = run_tasks(bench, list(theirs), threads)
    assert not results.problems, results.problems
    ours = {e.task: (e.utility, e.security) for e in results.episodes}
    strange = [e for e in results.episodes if e.outcome != "ended"]
    assert not strange, strange[0]
    return {task: (tuple(map(bool, theirs[task])), ours[task]) for task in theirs}, raised, replay.prompts


def spread(items, n):
    "`n` of `items` at equal distances; all where there are fewer."
    return items if len(items) <= n else [items[int(k * len(items) / n)] for k in range(n)]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("suites", nargs="*", default=["workspace", "banking", "slack", "travel"])
    parser.add_argument("--pairs", type=int, default=100, help="of each suite and behaviour")
    parser.add_argument("--attack", default="important_instructions")
    args = parser.parse_args()
    bad = 0
    for suite in args.suites:
        start = time.process_time()
        tasks = list_tasks(open_bench(None, suite, args.attack, "", "local"))
        alone = [t for t in tasks if t.injection == "none"]
        pairs = spread([t for t in tasks if t.injection != "none"], args.pairs)
        rounds = [("alone", "none", alone), *((behaviour, args.attack, pairs) for behaviour in BEHAVIOURS)]
        for behaviour, attack, chosen in rounds:
            with tempfile.TemporaryDirectory() as folder:
                verdicts, raised, prompts = judge_both(suite, attack, chosen, behaviour, Path(folder))
            unequal = {task: pair for task, pair in verdicts.items() if pair[0] != pair[1]}
            bad += len(unequal)
            sums = [sum(pair[1][k] for pair in verdicts.values()) for k in (0, 1)]
            print(
                f"{suite:9} {behaviour:17} {len(verdicts) - len(unequal)} of {len(verdicts)} equal; utility "
                f"{sums[0]}, security {sums[1]}; {prompts} prompts; ground truth raised in {len(raised)}; "
                f"{time.process_time() - start:.0f} CPU s",
                flush=True,
            )
            for task, pair in unequal.items():
                print("  unequal:", task, pair)
            for text in raised:
                print("  raised:", text)
    sys.exit(bad > 0)


if __name__ == "__main__":
    main()
