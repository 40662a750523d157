"""What a wrong call is: the call, and what its error must say."""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax

import optax_cgfac
from steps import ingredients, problem

Mode = Literal["build", "step", "trace"]


class Given(NamedTuple):
    """What a training step has at hand, as arrays or as tracers."""

    params: Any
    grads: Any
    curvature: optax_cgfac.Curvature
    value: jax.Array
    x: jax.Array
    y: jax.Array
    key: jax.Array


class Case(NamedTuple):
    """A wrong call.

    Attributes:
      done: What was done, for the table.
      error: The exception.
      call: Makes the call.
      expected: Found in the message: what was expected.
      got: Found in the message: what came.
      remedy: Found in the message: what to do. The message ends with it, unless the
        pattern has a group, which is what to use.
      mode: ``"build"`` for calls outside of a step, ``"step"`` for those that must fail
        alike with arrays and with tracers, ``"trace"`` for those before whose error
        much would be computed with arrays.
    """

    done: str
    error: type[Exception]
    call: Callable[[Given], Any]
    expected: str
    got: str
    remedy: str
    mode: Mode

    def run(self, *, traced: bool) -> Any:
        """Makes the call, with tracers in the place of arrays or with arrays."""
        if traced:
            return jax.eval_shape(self.call, given())
        return self.call(given())

    @property
    def ways(self) -> list[bool]:
        """Whether the call is to be traced, for every way to make it."""
        return {"build": [False], "step": [False, True], "trace": [True]}[self.mode]


class Topic(NamedTuple):
    """Wrong calls of one function."""

    title: str
    mode: Mode
    cases: list[Case]

    def add(self, done, error, call, expected, got, remedy, mode: Mode | None = None):
        """Adds a case."""
        mode = self.mode if mode is None else mode
        self.cases.append(Case(done, error, call, expected, got, remedy, mode))


def topic(title: str, mode: Mode) -> Topic:
    return Topic(title, mode, [])


@functools.cache
def given() -> Given:
    of_step = ingredients()
    return Given(
        of_step.params,
        of_step.grads,
        of_step.curvature,
        of_step.value,
        problem().batch["x"],
        problem().batch["y"],
        jax.random.key(0),
    )
