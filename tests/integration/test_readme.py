"""The README's loop runs as printed, and prints the report that the README shows."""

import pathlib
import re

README = pathlib.Path(__file__).parents[2] / "README.md"


def block(language):
    found = re.findall(
        rf"```{language}\n(.*?)```", README.read_text("utf-8"), re.DOTALL
    )
    assert len(found) == 1, f"the README has {len(found)} blocks of {language}"
    return found[0]


def test_the_loop_runs_and_its_report_is_the_one_shown(capsys):
    names = {}
    exec(compile(block("python"), str(README), "exec"), names)
    printed = capsys.readouterr().out
    assert block("text") in printed
    assert float(names["loss"]) < 0.5
