"""LoX: low-rank extrapolation of the alignment before fine-tuning (Perin et al., COLM 2025)."""

from __future__ import annotations

import logging
import math
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from stayaligned.defenses import TrainingDefense, TrainingSetup
from stayaligned.defenses.patching.ancestry import check_ancestry, check_records
from stayaligned.weights.adapters import is_adapter, read_adapter, write_adapter
from stayaligned.weights.checkpoints import open_checkpoint
from stayaligned.weights.concatenation import concatenate, layers_by_module
from stayaligned.weights.deltas import Delta, WeightOverlap, equal_weights_error, pair_weights, stream
from stayaligned.weights.directories import ADAPTER_CONFIG, ADAPTER_WEIGHTS

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import Trainer

    from stayaligned.algorithms.alignment_delta import TruncatedDelta
    from stayaligned.algorithms.safe_lora import LoraFactors

_log = logging.getLogger(__name__)


class LowRankExtrapolation(TrainingDefense):
    """Move the aligned model further from its base, then fine-tune plainly (LoX).

    W ← W + α U_k Σ_k Q_kᵀ in every linear layer, with the k leading singular triplets of V = W_aligned − W_base.

    A LoRA trains on the moved weights. The move becomes a part of the saved adapter, by concatenation: its rank grows
    by k, and it gets every linear layer as a target, so that it works on the aligned model as it is. A full fine-tune
    has the move in its weights.

    Differs from the published code in the matrices: embeddings, the head and stacks of experts are left as they are,
    because a LoRA on linear layers can't hold their move. The code moves every matrix.

    Cost: V's leading triplets in all linear layers, before training and, for a LoRA, once more after it; a LoRA of the
    higher rank. Compare with `sft`; whether the directions matter is shown by `directions: random`.
    """

    name: ClassVar[str] = "lox"
    paper: ClassVar[str] = "https://arxiv.org/abs/2506.15606"
    needs_base: ClassVar[bool] = True

    rank: int = Field(default=6, ge=1)
    """Number k of V's leading directions; 6 is the paper's for Llama-2-7B."""
    alpha: float = Field(default=1.25, ge=0.0, allow_inf_nan=False)
    """Factor α of the extrapolation; 0 is plain fine-tuning."""
    directions: Literal["alignment", "random"] = "alignment"
    """`alignment`: V's. `random`: as many uniformly random directions with V's singular values, the control."""
    seed: int = Field(default=0, ge=0)
    """Seed of the random directions."""

    def make_trainer(self, setup: TrainingSetup) -> Trainer:
        """Move the weights of the setup's model, and build a trainer of its kind for plain fine-tuning.

        Raises:
            StayalignedError: if there is no base, it is of another architecture or not the aligned model's ancestor,
                or the adapter is of a kind that can't hold the move.
        """
        from stayaligned.hf.placement.in_memory import active_adapter, adapter_in_memory, add_to_weights

        model: Any = setup.model
        if hasattr(model, "peft_config"):
            layers_by_module(adapter_in_memory(model, active_adapter(model)))
        add_to_weights(model, self.moves(setup))
        return setup.trainer()

    def after_saving(self, setup: TrainingSetup, directory: Path) -> None:
        """Make the move a part of the saved adapter."""
        if not is_adapter(directory):
            return
        joined = concatenate(read_adapter(directory), self.moves(setup))
        written = directory.with_name(f"{directory.name}-joined")
        written.mkdir()
        write_adapter(joined, written)
        for name in (ADAPTER_WEIGHTS, ADAPTER_CONFIG):
            (written / name).replace(directory / name)
        shutil.rmtree(written)

    def moves(self, setup: TrainingSetup) -> dict[str, LoraFactors]:
        """Return {linear module: the factors of α U_k Σ_k Q_kᵀ}, in fp32.

        Raises:
            StayalignedError: as `make_trainer`.
        """
        from stayaligned.algorithms.alignment_delta import leading_triplets
        from stayaligned.algorithms.safe_lora import LoraFactors
        from stayaligned.hf.placement.layers import linear_weights

        models = setup.require_base(self.name)
        pair = open_checkpoint(models.require_aligned(self.name)), open_checkpoint(models.require_base(self.name))
        weights = {weight.name: weight for weight in linear_weights(*pair)}
        stacked = [name for name in weights if name.endswith("]")]
        if stacked:
            _log.warning("lox leaves %d experts as they are, such as %s", len(stacked), stacked[0])
        plain = {name: weight for name, weight in weights.items() if not name.endswith("]")}
        items = pair_weights(*pair, {name: (weight.stored[0], weight.stored[1]) for name, weight in plain.items()})
        overlaps: dict[str, WeightOverlap] = {}

        def decompose(name: str, differences: list[Delta]) -> LoraFactors | None:
            (found,) = differences
            overlaps.update({} if found.overlap is None else {name: found.overlap})
            if found.rounding or not found.norm:
                return None
            triplets = leading_triplets(found.value.T if plain[name].transposed else found.value, rank=self.rank)
            left, right = self._directions(name, triplets)
            # as much of each factor's size as of the other's, which fp16 needs
            root = triplets.values.sqrt()
            return LoraFactors((right * root).T.contiguous(), left * root * self.alpha, 1.0)

        check_records(*pair, allowed=False)
        found = {name: factors for name, factors in stream(items, decompose) if factors is not None}
        if not found:
            raise equal_weights_error(*pair)
        entries = {name: math.prod(pair[0].matrix_shape(weight.stored[0])) for name, weight in plain.items()}
        check_ancestry(*pair, overlaps, entries=entries, allowed=False)
        return found

    def _directions(self, name: str, triplets: TruncatedDelta) -> tuple[Tensor, Tensor]:
        """Return the output and the input directions of a layer: V's own, or as many random ones."""
        from stayaligned.algorithms.alignment_delta import layer_generator, random_frame

        if self.directions == "alignment":
            return triplets.left, triplets.right
        generator = layer_generator(self.seed, name)
        left, right = (
            random_frame(len(side), side.shape[1], generator).to(side) for side in (triplets.left, triplets.right)
        )
        return left, right
