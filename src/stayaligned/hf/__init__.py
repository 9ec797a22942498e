"""The host libraries: the only package that imports transformers, peft, accelerate and trl.

Importing it checks that they are installed, in versions that it works with.
"""

from stayaligned.core.extras import EXTRAS, require_packages
from stayaligned.core.host_versions import RANGES, require_versions

require_packages({"loading a model, or finding its layers": EXTRAS["models"]})
require_versions(*(package for package in RANGES if package != "trl"))
