"""Walks through every state that a model can reach, and prints how it came to a bad one.

A *model* is a first state and *actions*. An action is a method of the model: given a state it yields what may happen
next, each as a line for people and the state after it; nothing when it cannot happen. Instead of a state it may yield
`Broken`, which says what rule was broken. What may happen at once may happen in any order, so all orders are walked
through. States are compared and kept, so they are tuples all the way down.

Two things are looked for:

* *safety*: no action yields `Broken`, and `Model.check` finds nothing wrong with any state;
* *progress*: from every state an end can be reached (`Model.ended`) by what is bound to happen: not by a further verb,
  say, or by a death. What is stuck, or can only go round in circles, does not have one.

Breadth first, so a counterexample is as short as there is one. Every action names the functions that it stands for;
`test_names.py` looks for them, so that a model does not outlive what it is a model of.
"""

from __future__ import annotations

import re
import time
from array import array
from collections.abc import Callable, Hashable, Iterator
from pathlib import Path
from typing import Any, Final, Generic, TypeVar

import attrs

ROOT: Final = Path(__file__).resolve().parents[2]
State = TypeVar("State", bound=Hashable)


@attrs.frozen
class Broken:
    """What an action yields that must never happen."""

    why: str


@attrs.frozen
class Action:
    """An action of a model, and the functions that it stands for, each as "path:function"."""

    name: str
    functions: tuple[str, ...]
    may_never: bool
    run: Callable[[Any, Any], Iterator[tuple[str, Any]]]


Steps = Iterator[tuple[str, State | Broken]]
Method = TypeVar("Method", bound=Callable[..., Any])


def stands_for(*functions: str, may_never: bool = False) -> Callable[[Method], Method]:
    """Mark a method as an action. No functions: what the world does by itself, a death or a message that comes.

    `may_never`: nothing makes it happen, so progress must not need it.
    """

    def mark(method: Method) -> Method:
        method.__dict__["stands_for"] = (functions, may_never)
        return method

    return mark


class Model(Generic[State]):
    """Base of models."""

    @classmethod
    def actions(cls) -> list[Action]:
        """List the actions, in the order in which they are defined, those of base classes first."""
        methods = {name: value for base in reversed(cls.__mro__) for name, value in vars(base).items()}
        marked = {name: value for name, value in methods.items() if hasattr(value, "stands_for")}
        return [Action(name, value.stands_for[0], value.stands_for[1], value) for name, value in marked.items()]

    def first(self) -> State:
        """Return the state that everything begins with."""
        raise NotImplementedError

    def check(self, state: State) -> str | None:
        """Return what is wrong with a state, None: nothing."""
        del state
        return None

    def canonical(self, state: State) -> State:
        """Return the state that stands for all from which the same may happen as from this one."""
        return state

    def ended(self, state: State) -> bool:
        """Whether a state is one in which everything may come to rest."""
        raise NotImplementedError

    def show(self, state: State) -> str:
        """Return a state in one line, for traces."""
        return str(state)


@attrs.frozen
class Step:
    """One line of a trace."""

    action: Action
    text: str
    state: str


@attrs.frozen
class Result:
    """What was found: `why` is None when nothing was; else `trace` is the way there."""

    states: int
    transitions: int
    depth: int
    seconds: float
    why: str | None = None
    trace: tuple[Step, ...] = ()

    def story(self) -> str:
        """Return the counterexample for people: what happens, in which code, and the state after each step."""
        if self.why is None:
            return f"nothing found in {self.states:,} states, {self.transitions:,} transitions"
        lines = [f"{self.why}", f"after {len(self.trace)} steps:"]
        for number, step in enumerate(self.trace, 1):
            code = ", ".join(step.action.functions) or "-"
            lines.append(f"  {number:3}  {step.text:58}  {code}")
            if step.state:
                lines.append(f"{'':7}{step.state}")
        return "\n".join(lines)


def explore(model: Model[Any], limit: int = 5_000_000) -> Result:
    """Walk through all states of a model, up to the first that is bad. RuntimeError when there are more than `limit`.

    Progress is looked at when safety is shown.
    """
    started = time.perf_counter()
    actions = model.actions()
    first = model.canonical(model.first())
    known: dict[Any, int] = {first: 0}
    order: list[Any] = [first]
    parents, by, depths = array("i", [-1]), array("h", [-1]), array("i", [0])
    edges_from, edges_to = array("i"), array("i")

    def trace(number: int, *last: Step) -> tuple[Step, ...]:
        steps = list(reversed(last))
        while number:
            before, action = order[parents[number]], actions[by[number]]
            after = order[number]
            text = next(text for text, s in action.run(model, before) if model.canonical(s) == after)
            steps.append(Step(action, text, model.show(after)))
            number = parents[number]
        return tuple(reversed(steps))

    def result(why: str | None = None, steps: tuple[Step, ...] = ()) -> Result:
        return Result(len(order), transitions, max(depths), time.perf_counter() - started, why, steps)

    at = transitions = 0
    while at < len(order):
        state = order[at]
        if (wrong := model.check(state)) is not None:
            return result(wrong, trace(at))
        for number, action in enumerate(actions):
            for text, outcome in action.run(model, state):
                if isinstance(outcome, Broken):
                    return result(outcome.why, trace(at, Step(action, text, "")))
                after = model.canonical(outcome)
                index = known.get(after)
                if index is None:
                    index = known[after] = len(order)
                    order.append(after)
                    parents.append(at)
                    by.append(number)
                    depths.append(depths[at] + 1)
                    if index >= limit:
                        raise RuntimeError(f"more than {limit} states")
                transitions += 1
                if not action.may_never:
                    edges_from.append(at)
                    edges_to.append(index)
        at += 1
    stuck = _stuck(model, order, edges_from, edges_to)
    if stuck is not None:
        return result("stuck: nothing leads from here to an end", trace(stuck))
    return result()


def _stuck(model: Model[Any], order: list[Any], edges_from: array[int], edges_to: array[int]) -> int | None:
    """Return the first state from which no end can be reached."""
    # Predecessors of each state as one array: those of state i stand from starts[i] to starts[i + 1].
    starts = array("i", bytes(4 * (len(order) + 2)))
    for to in edges_to:
        starts[to + 2] += 1
    for i in range(2, len(starts)):
        starts[i] += starts[i - 1]
    before = array("i", bytes(4 * len(edges_to)))
    for source, to in zip(edges_from, edges_to, strict=True):
        before[starts[to + 1]] = source
        starts[to + 1] += 1
    good = bytearray(len(order))
    todo = [i for i, state in enumerate(order) if model.ended(state)]
    for i in todo:
        good[i] = 1
    while todo:
        i = todo.pop()
        for j in before[starts[i] : starts[i + 1]]:
            if not good[j]:
                good[j] = 1
                todo.append(j)
    return good.find(0) if 0 in good else None


def missing_functions(model: type[Model[Any]]) -> list[str]:
    """Return which of the functions that a model's actions stand for do not exist (any more)."""
    named = sorted({function for action in model.actions() for function in action.functions})
    return [function for function in named if not exists(function)]


def exists(function: str) -> bool:
    """Whether a function or class is defined where "path:name" says."""
    path, name = function.split(":")
    source = ROOT / path
    last = name.rpartition(".")[2]
    defined = rf"^\s*(?:(?:def|cdef|cpdef|static)\b[^=\n]*[\s*]{re.escape(last)}\(|class {re.escape(last)}\b)"
    return source.is_file() and re.search(defined, source.read_text(), re.M) is not None
