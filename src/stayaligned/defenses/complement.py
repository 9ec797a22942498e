"""Projection of updates onto the complement of the alignment subspace (experimental)."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from stayaligned.defenses._projection import SubspaceDefense

if TYPE_CHECKING:
    from stayaligned.algorithms.alignment_delta import AlignmentDelta
    from stayaligned.algorithms.safe_lora import Operator


class Complement(SubspaceDefense):
    """Remove from each update what lies in V's leading directions (experimental).

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

    side: Literal["left", "right", "both"] = "both"
    """Which directions to remove: `left` are output directions (changes B), `right` input directions (changes A)."""

    def operator_for(self, delta: AlignmentDelta) -> Operator:
        """Return ΔW ↦ (I - U_k U_kᵀ) ΔW (I - Q_k Q_kᵀ)."""
        from stayaligned.algorithms.safe_lora import ComplementOperator

        return ComplementOperator(delta.subspace(rank=self.rank, energy=self.energy), self.side)
