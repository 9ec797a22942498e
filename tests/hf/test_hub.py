"""A name that is neither a directory nor a model on the hub is one quick error."""

from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants
from huggingface_hub.errors import RepositoryNotFoundError

from stayaligned.core.errors import StayalignedError
from stayaligned.hf.hub import require_hub_model


def raising(error: Exception | None) -> Any:
    def model_info(_self: Any, _name: str, **_options: Any) -> None:
        if error is not None:
            raise error

    return model_info


class Answered(OSError):
    response = "500"


NOT_FOUND = RepositoryNotFoundError.__new__(RepositoryNotFoundError)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (NOT_FOUND, "chat: no such directory, and the hub has no such model for you"),
        (ConnectionError("no route"), "chat: no such directory, and the hub can't be reached: no route"),
        (TimeoutError(), "can't be reached: TimeoutError"),
        (Answered("busy"), None),
        (None, None),
    ],
)
def test_a_bare_name_is_looked_up_by_one_request(
    error: Exception | None, said: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", raising(error))
    if said is None:
        require_hub_model("chat")
    else:
        with pytest.raises(StayalignedError, match=said):
            require_hub_model("chat")


def test_offline_nothing_is_requested(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", raising(AssertionError("a request")))
    require_hub_model("chat")
