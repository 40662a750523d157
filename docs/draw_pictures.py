"""Draws the pictures of pictures.md by running its code.

python docs/draw_pictures.py
"""

import pathlib
import re

from matplotlib.axes import Axes

PAGE = pathlib.Path(__file__).parent / "pictures.md"
PARTS = r"```python\n(?P<code>.*?)```|!\[[^]]*\]\((?P<picture>images/[^)]+)\)"


def main():
    names = {"__name__": "pictures"}
    for part in re.finditer(PARTS, PAGE.read_text(), re.DOTALL):
        if part["code"]:
            exec(compile(part["code"], str(PAGE), "exec"), names)
            continue
        path, ax = PAGE.parent / part["picture"], names["ax"]
        assert isinstance(ax, Axes)
        path.parent.mkdir(exist_ok=True)
        ax.figure.savefig(path, dpi=110)
        print(path)


if __name__ == "__main__":
    main()
