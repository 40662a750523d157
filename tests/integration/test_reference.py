"""The reference has every public name, and of each class every public method."""

import importlib
import inspect
import re

import optax_cgfac
import pages

plot = importlib.import_module("optax_cgfac.plot")
ENTRY = re.compile(
    r"^\.\. (currentmodule|autofunction|autoclass):: (\S+)(?:\n   :members: (.*))?$",
    re.MULTILINE,
)


def entries():
    """``{full name: (directive, its members)}`` of docs/api.md."""
    found, module = {}, ""
    page = (pages.ROOT / "docs" / "api.md").read_text("utf-8")
    for kind, name, members in ENTRY.findall(page):
        if kind == "currentmodule":
            module = name
        else:
            full = f"{module}.{name}"
            assert full not in found, f"{full} stands there twice"
            found[full] = kind, set(filter(None, re.split(r",\s*", members)))
    return found


def public():
    """Every public object by its full name."""
    return {
        f"{module.__name__}.{name}": getattr(module, name)
        for module in (optax_cgfac, plot)
        for name in module.__all__
    }


def test_every_public_name_is_there_and_no_other():
    assert set(entries()) == set(public())


def own_methods(cls):
    """Public methods and properties that the package itself gives a class."""
    kinds = (property, staticmethod, classmethod)
    return {
        name
        for name, value in vars(cls).items()
        if not name.startswith("_")
        and (isinstance(value, kinds) or inspect.isfunction(value))
        and getattr(value, "__module__", "optax_cgfac").startswith("optax_cgfac")
    }


def test_every_public_method_is_there():
    for name, value in public().items():
        if inspect.isclass(value):
            assert entries()[name][1] == own_methods(value), name
