"""Nothing loads pickles, runs code out of data, or writes a file."""

import ast
import os
import pathlib
import subprocess
import sys
import textwrap

import pytest

import optax_cgfac

SOURCES = sorted(pathlib.Path(optax_cgfac.__file__).parent.rglob("*.py"))
# What could run code that came as data, or reach files, processes and the network.
MODULES = {
    *("pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"),
    *("subprocess", "multiprocessing", "shutil", "tempfile", "pathlib", "io"),
    *("socket", "ssl", "http", "urllib", "requests", "ctypes", "importlib", "runpy"),
    *("code", "codeop", "pty", "sqlite3", "orbax", "tensorflow"),
}
CALLS = {"eval", "exec", "compile", "open", "input", "breakpoint", "__import__"}
METHODS = {
    *("load", "loads", "save", "savez", "savetxt", "dump", "dumps", "tofile", "memmap"),
    *("write_text", "write_bytes", "fromfile"),
}
OF_OS = {"environ", "cpu_count", "sched_getaffinity", "process_cpu_count"}


def suspects(source):
    """What a module imports or calls of the above."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [x.name for x in node.names]
            found += [name for name in names if name.split(".")[0] in MODULES]
            found += [name for name in names if name.startswith("os.")]
        elif isinstance(node, ast.ImportFrom):
            if (node.module or "").split(".")[0] in MODULES | {"os"}:
                found.append(node.module)
        elif isinstance(node, ast.Name) and node.id in CALLS:
            found.append(node.id)
        elif isinstance(node, ast.Attribute):
            is_os = isinstance(node.value, ast.Name) and node.value.id == "os"
            if node.attr in METHODS or (is_os and node.attr not in OF_OS):
                found.append(node.attr)
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_no_module_can_run_data_or_write(path):
    assert suspects(path.read_text()) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "import os.path as p",
        "from os import system",
        "import os\nos.system('x')",
        "from urllib.request import urlopen",
        "def f():\n    import subprocess",
        "x = eval('1')",
        "run = exec",
        "with open('x') as f: pass",
        "np.load('x', allow_pickle=True)",
        "jnp.save('x', x)",
        "path.write_text('x')",
    ],
)
def test_the_search_finds_what_it_is_for(source):
    assert suspects(source)


SCRIPT = """
    import os, sys
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
    with open("seen", "w"):
        pass
    os.remove("seen")
    train(p, cgfac())
    train(p, scale_by_cgfac(0.1))
    print(events)
"""


def test_training_writes_nothing(tmp_path):
    """Python reports every file that is opened, process started and pickle loaded."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(
            [
                str(pathlib.Path(__file__).parents[1]),
                str(pathlib.Path(optax_cgfac.__file__).parents[1]),
            ]
        ),
        "PYTHONDONTWRITEBYTECODE": "1",
        "JAX_ENABLE_COMPILATION_CACHE": "false",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "HOME": str(tmp_path),
    }
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SCRIPT)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    events = ast.literal_eval(result.stdout.strip().splitlines()[-1])
    # The two that the script itself caused, to show that they are seen.
    assert [event[0] for event in events] == ["open", "os.remove"], events
    assert list(tmp_path.iterdir()) == []
