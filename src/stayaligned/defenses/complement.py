"""The complement of the alignment subspace. Experimental."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from stayaligned.defenses._projection import ProjectionDefense

if TYPE_CHECKING:
    from stayaligned.algorithms.alignment_delta import AlignmentDelta
    from stayaligned.algorithms.safe_lora import Operator


class Complement(ProjectionDefense):
    """Remove from each update what lies in V's leading directions, so that it can't undo the alignment (experimental).

    ΔW ← (I - U_k U_kᵀ) ΔW (I - Q_k Q_kᵀ), with V's k leading left and right singular vectors, in all layers unless
    `threshold` or `lowest` is given. Rank and file layout stay. Not in the Safe LoRA paper; of the family of null-space
    and gradient projections. Where V = 0 there is nothing to remove, and the update stays.

    On the testbed (docs/safe-lora.md) its front of harm against accuracy lies above those of dropping, shrinking and
    random directions where the alignment was made with full weights. It fails where a LoRA made the alignment, costs
    accuracy on some adapters of q_proj and v_proj only, and an attacker who trains under it undoes it. Not tested:
    alignments made by preferences, tasks that look like the harmful requests, large models.

    Example:
        >>> Complement(side="right").rank
        8
    """

    name: ClassVar[str] = "complement"
    version: ClassVar[int] = 2

    all_layers: bool = True
    """Change every layer; not to be given together with `threshold` or `lowest`."""
    rank: int | None = Field(default=8, ge=1)
    """The k; not to be given together with `energy`."""
    energy: float | None = Field(default=None, gt=0, le=1)
    """The k is the fewest directions that hold this share of ‖V‖²."""
    side: Literal["left", "right", "both"] = "both"
    """`left` removes output directions (edits B), `right` input directions (edits A)."""

    @model_validator(mode="before")
    @classmethod
    def _defaults_yield(cls, data: Any) -> Any:
        # A default stands for "nothing was said"; what was asked for in its stead replaces it.
        if not isinstance(data, dict):
            return data
        selected = data.get("threshold") is not None or data.get("lowest") is not None
        yielding = {"all_layers": False} if selected else {}
        return yielding | ({"rank": None} if data.get("energy") is not None else {}) | data

    @model_validator(mode="after")
    def _one_size(self) -> Self:
        if (self.rank is None) == (self.energy is None):
            raise ValueError("set exactly one of `rank` and `energy`")
        return self

    def operator_for(self, delta: AlignmentDelta) -> Operator:
        """(I - U_k U_kᵀ) · (I - Q_k Q_kᵀ)."""
        from stayaligned.algorithms.safe_lora import Complement as Operation

        return Operation(delta.subspace(rank=self.rank, energy=self.energy), self.side)
