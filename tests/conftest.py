"""Settings every test shares: one thread, no network, no time limit on a single hypothesis example."""

import os

from hypothesis import settings

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"

settings.register_profile("shared-cores", deadline=None, database=None)
settings.load_profile("shared-cores")
