"""The host libraries: the only package that imports transformers, peft, accelerate and trl."""

from stayaligned.core.extras import EXTRAS, require_packages

require_packages({"loading a model, or finding its layers": EXTRAS["models"]})
