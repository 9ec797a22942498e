"""The host libraries' notes about kernels that are not installed are shown once per package."""

import io
import logging

import pytest

from stayaligned.hf import quiet

FALLBACK = "`{}` is falling back to its reference PyTorch implementation because `{}` is not installed. Slower."


def test_each_package_that_is_not_installed_is_reported_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quiet, "_logged", {})
    speaker = logging.getLogger("transformers.models.mamba")
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)  # beside the one that transformers has
    logging.getLogger("transformers").addHandler(handler)
    try:
        for functions in (("scan", "update"), ("inner",)):
            with quiet.quiet():
                for function in functions:
                    speaker.warning(FALLBACK.format(function, "mamba_ssm"))
                speaker.warning(FALLBACK.format("conv", "causal-conv1d"))
                speaker.warning("another warning")
        speaker.warning(FALLBACK.format("outside", "mamba_ssm"))
    finally:
        logging.getLogger("transformers").removeHandler(handler)
    assert stream.getvalue().splitlines() == [
        FALLBACK.format("scan", "mamba_ssm"),
        *[FALLBACK.format("conv", "causal-conv1d"), "another warning"] * 2,  # it does not repeat itself
        FALLBACK.format("outside", "mamba_ssm"),
    ]
