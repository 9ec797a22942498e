"""Loading of checkpoint weights that the host's Trainer skips because they are stored in another layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stayaligned.hf.hosts import tied_weights
from stayaligned.hf.models import load_model
from stayaligned.weights.checkpoints import Checkpoint


def restore_converted(trainer: Any, checkpoint: Path) -> None:
    """Load the weights of a Trainer's checkpoint that the Trainer skips with a line in its log.

    transformers writes the experts of a mixture one by one, as their publishers do, and stacks them when it loads a
    model. Its Trainer loads by name alone, so a resumed run would continue with the initial experts.

    Args:
        trainer: a transformers.Trainer that has loaded the checkpoint. Adapters, and models under FSDP or DeepSpeed,
            are unchanged.
        checkpoint: the checkpoint's directory.

    Raises:
        StayalignedError: if the checkpoint lacks weights.
    """
    from transformers import PreTrainedModel

    model = trainer.accelerator.unwrap_model(trainer.model)
    if not isinstance(model, PreTrainedModel) or trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        return
    if set(model.state_dict()) - set(tied_weights(model)) <= set(Checkpoint(checkpoint)):
        return
    model.load_state_dict(load_model(checkpoint, dtype=model.dtype).state_dict())
