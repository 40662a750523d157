"""Runs the notebooks from top to bottom, in kernels of their own.

    python notebooks/run.py            # all, in full; outputs are written back
    python notebooks/run.py 01 04      # those whose names begin so
    python notebooks/run.py --smoke    # few steps, small sizes; nothing is written back

A cell that raises, or that writes to stderr (a warning does), is an error. Progress
bars are off, and what is written has neither times nor paths of this machine.
"""

import argparse
import os
import pathlib
import sys
import tempfile
import time

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

HERE = pathlib.Path(__file__).resolve().parent
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python", "pygments_lexer": "ipython3"},
}


def execute(notebook, smoke, folder):
    """Runs a notebook, with ``folder`` for whatever it or its kernel writes."""
    environment = {
        "MPLBACKEND": "module://matplotlib_inline.backend_inline",
        "TQDM_DISABLE": "1",
        # Threads of OpenBLAS wait for each other on a machine that does other things.
        "OPENBLAS_NUM_THREADS": "1",
        "IPYTHONDIR": str(folder),
        "PYDEVD_DISABLE_FILE_VALIDATION": "1",  # it warns of frozen modules otherwise
    }
    kept = {k: v for k, v in os.environ.items() if k != "OPTAX_CGFAC_SMOKE"}
    if smoke:
        environment["OPTAX_CGFAC_SMOKE"] = "1"
    client = NotebookClient(
        notebook,
        kernel_name="python3",
        timeout=600,
        record_timing=False,
        coalesce_streams=True,
        # It warns that its connection to this process is not encrypted.
        extra_arguments=["--IPKernelApp.log_level=40"],
        resources={"metadata": {"path": str(folder)}},
    )
    client.execute(env=kept | environment)


def complaints(notebook):
    """Returns what its cells wrote to stderr."""
    return [
        f"cell {cell.id}: {output.text}"
        for cell in notebook.cells
        if cell.cell_type == "code"
        for output in cell.outputs
        if output.output_type == "stream" and output.name == "stderr"
    ]


def clean(notebook):
    """Leaves sources and outputs: no metadata that would differ between machines."""
    notebook.metadata = nbformat.from_dict(METADATA)
    for cell in notebook.cells:
        cell.metadata = nbformat.from_dict({})
        for output in cell.get("outputs", ()):
            if "metadata" in output:
                output.metadata = nbformat.from_dict({})
    nbformat.validate(notebook)


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "names", nargs="*", help="beginnings of names, as 01 (all notebooks)"
    )
    parser.add_argument(
        "--smoke",
        action="store_true",
        help="set OPTAX_CGFAC_SMOKE=1, and write nothing back",
    )
    parser.add_argument(
        "--output", type=pathlib.Path, help="write the results into this folder"
    )
    args = parser.parse_args(argv)
    paths = sorted(
        path
        for path in HERE.glob("*.ipynb")
        if path.name.startswith(tuple(args.names) or "")
    )
    if not paths:
        known = ", ".join(path.name for path in sorted(HERE.glob("*.ipynb")))
        parser.error(f"no notebook begins with {' or '.join(args.names)}; got {known}")
    # The kernel of this environment, not one that the user has installed as python3.
    os.environ["JUPYTER_PREFER_ENV_PATH"] = "1"

    for path in paths:
        notebook = nbformat.read(path, as_version=4)
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            try:
                execute(notebook, args.smoke, folder)
            except CellExecutionError as error:
                sys.exit(f"{path.name}: {error}")
        if found := complaints(notebook):
            sys.exit(f"{path.name} writes to stderr:\n" + "\n".join(found))
        clean(notebook)
        if args.output is not None:
            args.output.mkdir(parents=True, exist_ok=True)
            nbformat.write(notebook, args.output / path.name)
        elif not args.smoke:
            nbformat.write(notebook, path)
        print(f"{path.name}: {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
