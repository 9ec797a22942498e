"""Projection of updates onto the complement of the alignment subspace (experimental)."""

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
    `threshold` or `lowest` is given. Rank and file layout do not change. Not in the Safe LoRA paper; it belongs to the
    family of null-space and gradient projections. Where V = 0 the update does not change.

    On the testbed (docs/howto/safe-lora.md) its front of harm against accuracy lies above those of dropping, shrinking
    and random directions where the alignment was trained with full weights. It fails where the alignment was trained as
    a LoRA, costs accuracy on some adapters of q_proj and v_proj only, and an attacker who trains under it undoes it.
    Not tested: alignments trained on preferences, tasks that resemble the harmful requests, large models.

    Example:
        >>> Complement(side="right").rank
        8
    """

    name: ClassVar[str] = "complement"
    version: ClassVar[int] = 2

    all_layers: bool = True
    """Change every layer. Excludes `threshold` and `lowest`."""
    rank: int | None = Field(default=8, ge=1)
    """Number k of V's leading directions to remove. Excludes `energy`."""
    energy: float | None = Field(default=None, gt=0, le=1)
    """Remove the fewest leading directions that hold this share of ‖V‖². Excludes `rank`."""
    side: Literal["left", "right", "both"] = "both"
    """Which directions to remove: `left` are output directions (changes B), `right` input directions (changes A)."""

    @model_validator(mode="before")
    @classmethod
    def _replace_defaults(cls, data: Any) -> Any:
        # A default applies only if no alternative to it is given.
        if not isinstance(data, dict):
            return data
        selected = data.get("threshold") is not None or data.get("lowest") is not None
        replaced = {"all_layers": False} if selected else {}
        return replaced | ({"rank": None} if data.get("energy") is not None else {}) | data

    @model_validator(mode="after")
    def _check_size(self) -> Self:
        if (self.rank is None) == (self.energy is None):
            raise ValueError("set exactly one of `rank` and `energy`")
        return self

    def operator_for(self, delta: AlignmentDelta) -> Operator:
        """Return ΔW ↦ (I - U_k U_kᵀ) ΔW (I - Q_k Q_kᵀ)."""
        from stayaligned.algorithms.safe_lora import ComplementOperator

        return ComplementOperator(delta.subspace(rank=self.rank, energy=self.energy), self.side)
