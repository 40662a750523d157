"""Nothing changes Flax or a user's module, loads pickles, or writes."""

import ast
import os
import pathlib
import textwrap
import threading

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from flax import nnx

import optax_cgfac
from training import python

X = jnp.ones((4, 3, 5))


class Looking:
    """What another thread sees of Flax and of some modules, at every call."""

    def __init__(self):
        self.modules, self.seen = [], []

    def __call__(self):
        thread = threading.Thread(target=self._look)
        thread.start()
        thread.join()

    def _look(self):
        classes = [
            value
            for library in (nnx, nn)
            for value in vars(library).values()
            if isinstance(value, type)
        ]
        held = [dict(vars(x)) for x in (nnx, nn, *classes, *self.modules)]
        linear = nnx.merge(*nnx.split(nnx.Linear(5, 2, rngs=nnx.Rngs(0))))
        dense, state = nn.Dense(2).init_with_output(jax.random.key(0), X)
        state |= nn.Dense(2).apply(state, X, mutable=True)[1]
        numbers = [float(jnp.sum(y)) for y in (linear(X), dense)]
        kinds = [type(x) for x in (linear, *self.modules)]
        self.seen.append((held, sorted(vars(linear)), sorted(state), numbers, kinds))


def in_nnx(look):
    class Model(nnx.Module):
        def __init__(self):
            self.linear = nnx.Linear(5, 4, rngs=nnx.Rngs(0))
            self.rnn = nnx.RNN(nnx.SimpleCell(4, 3, rngs=nnx.Rngs(1)))

        def __call__(self, x):
            x = self.linear(x)
            look()
            y = self.rnn(x).mean(1)
            look()
            return y

    module = Model()
    look.modules += [m for _, m in nnx.iter_modules(module)]
    return lambda module, x: module(x), module


def in_linen(look):
    class Model(nn.Module):
        rnn: nn.RNN

        @nn.compact
        def __call__(self, x):
            x = nn.Dense(4)(x)
            look()
            y = self.rnn(x).mean(1)
            look()
            return y

    model = Model(nn.RNN(nn.SimpleCell(3)))
    params = model.init(jax.random.key(0), X)["params"]
    look.modules += [model, model.rnn, model.rnn.cell]
    look.seen.clear()
    return lambda params, x: model.apply({"params": params}, x), params


@pytest.mark.parametrize("make", [in_nnx, in_linen])
def test_another_thread_sees_nothing_of_a_capture(make):
    look = Looking()
    model_fn, params = make(look)
    look()
    (before,) = look.seen
    estimator = optax_cgfac.fisher_estimator(model_fn, "squared_error", examples=2)
    curvature = estimator.init(params, X)
    jax.jit(estimator.update)(curvature, params, X, rng=jax.random.key(0))
    optax_cgfac.value_and_grad(lambda p, x: jnp.mean(model_fn(p, x) ** 2))(params, X)
    look()
    assert len(look.seen) > 8
    assert all(seen == before for seen in look.seen)


SCRIPT = """
    import os, pathlib, sys
    import jax, numpy as np
    from optax_cgfac import cgfac, diagnostics, scale_by_cgfac
    from steps import problem

    events, WRITES = [], os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_APPEND
    WATCHED = ("pickle.", "marshal.", "subprocess.", "socket.", "shutil.", "ctypes.")
    CHANGES = ("mkdir", "remove", "rename", "rmdir", "link", "symlink", "truncate")
    CHANGES += ("system", "exec", "fork", "posix_spawn", "spawn", "chmod", "utime")

    def watch(event, args):
        if event == "open":
            path, mode, flags = args
            if flags & WRITES or any(c in (mode or "") for c in "wax+"):
                events.append((event, str(path), mode, flags))
        elif event.startswith(WATCHED) or event in [f"os.{x}" for x in CHANGES]:
            events.append((event, str(args)))

    def train(p, tx):
        step, state = jax.jit(p.step(tx)), p.start(tx)
        for i in range(3):
            state, _ = step(state, p.batch, jax.random.key(i))
        state[2].report()
        jax.block_until_ready(diagnostics(state[1], state[0]))

    p = problem()
    jax.block_until_ready(jax.jit(lambda x: x + 1)(p.batch["x"]))
    sys.addaudithook(watch)
    seen = pathlib.Path.home() / "seen"
    seen.write_text("")
    seen.unlink()
    train(p, cgfac())
    train(p, scale_by_cgfac(0.1))
    print(events)
"""


def test_training_writes_nothing(tmp_path):
    """Python reports every file that is opened, process started and pickle loaded."""
    folders = (
        pathlib.Path(path).parents[1] for path in (__file__, optax_cgfac.__file__)
    )
    output = python(
        "-c",
        textwrap.dedent(SCRIPT),
        PYTHONPATH=os.pathsep.join(map(str, folders)),
        PYTHONDONTWRITEBYTECODE="1",
        JAX_ENABLE_COMPILATION_CACHE="false",
        JAX_DISABLE_MOST_OPTIMIZATIONS="1",
        HOME=str(tmp_path),
    )
    events = ast.literal_eval(output.strip().splitlines()[-1])
    # The two that the script itself caused, to show that they are seen.
    assert [event[0] for event in events] == ["open", "os.remove"], events
    assert list(tmp_path.iterdir()) == []
