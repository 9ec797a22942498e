"""The embedded testbed."""

from stayaligned.testbed.recipe import Recipe
from stayaligned.testbed.store import NAMES, Progress, build, is_reference, reference_key, resolve

__all__ = ["NAMES", "Progress", "Recipe", "build", "is_reference", "reference_key", "resolve"]
