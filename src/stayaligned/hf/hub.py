"""The hub of Hugging Face: whether it has a model that is not in the local cache."""

from __future__ import annotations

from stayaligned.core.errors import StayalignedError

_TIMEOUT = 5.0
"""Seconds to wait for the hub; the host library tries for much longer before it reports an error."""


def require_hub_model(ref: str) -> None:
    """Refuse a model that is neither in the local cache nor, by one quick request, on the hub.

    Without network access (`HF_HUB_OFFLINE`), nothing is requested and nothing refused.

    Args:
        ref: a hub id; no such directory exists.

    Raises:
        StayalignedError: if the hub has no such model, or can't be reached.
    """
    from huggingface_hub import HfApi, constants, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    try:
        if constants.HF_HUB_OFFLINE or isinstance(try_to_load_from_cache(ref, "config.json"), str):
            return
        HfApi().model_info(ref, timeout=_TIMEOUT)
    except (RepositoryNotFoundError, HFValidationError):
        raise StayalignedError(
            f"{ref}: no such directory, and the hub has no such model for you",
            hint="Check the path. For a model on the hub, check its id, and your access: `hf auth login`.",
        ) from None
    except Exception as error:  # the classes depend on the HTTP library that this version of the hub's client uses
        if getattr(error, "response", None) is not None:  # the hub answered; loading reports what
            return
        raise StayalignedError(
            f"{ref}: no such directory, and the hub can't be reached: {str(error) or type(error).__name__}",
            hint="Check the path, or the network. HF_HUB_OFFLINE=1 uses the local cache alone.",
        ) from None
