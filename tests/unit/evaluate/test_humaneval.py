import pytest

from nanochat.evaluate import sandbox
from nanochat.evaluate.humaneval import Problem, problems, program

TRIVIAL = Problem(
    "T/0",
    'from typing import List\n\n\ndef double(xs: List[int]) -> List[int]:\n    """ Double each. """\n',
    "\n\ndef check(candidate):\n    assert candidate([1, 2]) == [2, 4]\n",
    "double",
    "    return [2 * x for x in xs]\n",
)


def passes(problem: Problem, answer: str, chat: bool) -> bool:
    return sandbox.run(program(problem, answer, chat)).status == "passed"


def test_there_are_164_problems():
    found = problems()
    assert len(found) == len({problem.task_id for problem in found}) == 164
    assert [problem.task_id for problem in problems(3)] == ["HumanEval/0", "HumanEval/1", "HumanEval/2"]


@pytest.mark.parametrize(
    "answer",
    [
        TRIVIAL.canonical_solution,
        TRIVIAL.canonical_solution + "\n\ndef other(:\n    nonsense",
        TRIVIAL.canonical_solution + "\nprint(double(",
        TRIVIAL.canonical_solution + "\n# and so on (",
    ],
)
def test_a_continuation_is_cut_where_the_function_ends(answer):
    assert passes(TRIVIAL, answer, chat=False)


@pytest.mark.parametrize(
    "answer",
    [
        "Here you are:\n```python\ndef double(xs: List[int]):\n    return [2 * x for x in xs]\n```\nIt doubles.",
        "```\ndef double(xs):\n    return [x + x for x in xs]",
        "def double(xs):\n    return [x + x for x in xs]",
        TRIVIAL.canonical_solution,
    ],
)
def test_an_answer_of_the_chat_model_is_understood(answer):
    assert passes(TRIVIAL, answer, chat=True)


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("answer", ["", "    return xs\n", "    return None", "    pass", "    exit(0)", "gibberish ("])
def test_wrong_answers_fail(answer, chat):
    assert not passes(TRIVIAL, answer, chat)


@pytest.mark.slow
@pytest.mark.parametrize("chat", [True, False])
def test_the_canonical_solutions_pass(chat):
    """All 164: the programs are put together rightly and the limits are wide enough."""
    found = problems()
    answers = [
        f"```python\n{problem.prompt}{problem.canonical_solution}```" if chat else problem.canonical_solution
        for problem in found
    ]
    programs = [program(problem, answer, chat) for problem, answer in zip(found, answers, strict=True)]
    outcomes = sandbox.run_all(programs, sandbox.Limits(seconds=20))
    failed = [(p.task_id, o) for p, o in zip(found, outcomes, strict=True) if o.status != "passed"]
    assert failed == []


def test_no_problem_is_solved_by_nothing():
    """Chance is 0: an empty function passes none of a sample of the tests."""
    found = problems()[::20]
    assert not any(outcome.status == "passed" for outcome in sandbox.run_all([program(p, "", False) for p in found]))
