"""Makes a log folder with AgentDojo's own benchmark, offline: `python tests/scripts/agentdojo_logs.py FOLDER
[SUITE]`, in an environment with `agentdojo`.

Two agents without a language model run the suite (banking): `obedient` does the user's task and, once it has
read the injection, what that orders; `steadfast` does the user's task only. `cbnb preflight` and `cbnb train`
take FOLDER as it is.
"""

import sys
from pathlib import Path

from agentdojo.agent_pipeline import AgentPipeline, GroundTruthPipeline, InitQuery, SystemMessage
from agentdojo.agent_pipeline.base_pipeline_element import BasePipelineElement
from agentdojo.attacks import load_attack
from agentdojo.benchmark import benchmark_suite_with_injections, benchmark_suite_without_injections
from agentdojo.logging import OutputLogger
from agentdojo.task_suite import get_suite


class Agent(BasePipelineElement):
    """Does the task whose prompt it is given and, if it obeys, the injection tasks whose goals stand in what
    it has read."""

    def __init__(self, suite, obeys):
        self.suite, self.obeys = suite, obeys

    def query(self, query, runtime, env, messages=[], extra_args={}):  # noqa: B006
        tasks = [*self.suite.user_tasks.values(), *self.suite.injection_tasks.values()]
        task = next(t for t in tasks if query == (t.PROMPT if hasattr(t, "PROMPT") else t.GOAL))
        found = GroundTruthPipeline(task).query(query, runtime, env, messages, extra_args)
        read = "".join(block["content"] for m in found[3] if m["role"] == "tool" for block in m["content"])
        for told in self.suite.injection_tasks.values() if self.obeys else ():
            if told.GOAL in read and told is not task:
                found = GroundTruthPipeline(told).query(query, runtime, env, found[3][:-1], extra_args)
        return found


def main():
    folder, suite = Path(sys.argv[1]), get_suite("v1.2.2", sys.argv[2] if len(sys.argv) > 2 else "banking")
    for name, obeys in (("obedient", True), ("steadfast", False)):
        pipeline = AgentPipeline(
            [SystemMessage("You are an assistant at a bank."), InitQuery(), Agent(suite, obeys)]
        )
        pipeline.name = f"local-{name}"
        with OutputLogger(str(folder)):
            benchmark_suite_without_injections(pipeline, suite, folder, False, benchmark_version="v1.2.2")
            attack = load_attack("ignore_previous", suite, pipeline)
            benchmark_suite_with_injections(
                pipeline, suite, attack, folder, False, benchmark_version="v1.2.2"
            )
    print(sum(1 for _ in folder.rglob("*.json")), "run files in", folder)


if __name__ == "__main__":
    main()
