"""The public names: the type checker's imports and the interpreter's table agree, and every name is there."""

import ast
from pathlib import Path

import pytest

import stayaligned


def test_the_type_checkers_imports_are_the_table_of_the_interpreter() -> None:
    (block,) = [node for node in ast.parse(Path(stayaligned.__file__).read_text()).body if isinstance(node, ast.If)][:1]
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    assert all(alias.asname == alias.name for node in imports for alias in node.names)
    checked = {alias.name: node.module for node in imports for alias in node.names}
    assert checked == stayaligned._MODULES
    assert sorted(stayaligned.__all__) == dir(stayaligned) == sorted(checked)


@pytest.mark.parametrize("name", stayaligned.__all__)
def test_every_public_name_is_importable(name: str) -> None:
    assert getattr(stayaligned, name).__name__ == name if name != "Split" else stayaligned.Split


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'Tsk'"):
        stayaligned.Tsk  # noqa: B018


def test_a_typed_package_says_so() -> None:
    assert Path(stayaligned.__file__).with_name("py.typed").is_file()
