"""Safe LoRA (Hsu et al., NeurIPS 2024), in the paper's form and with a true projector."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from stayaligned.defenses._projection import ProjectionDefense

if TYPE_CHECKING:
    from stayaligned.algorithms.alignment_delta import AlignmentDelta
    from stayaligned.algorithms.safe_lora import Operator


class SafeLora(ProjectionDefense):
    """Where an update points away from the alignment direction, keep only what that direction spans (Safe LoRA).

    ΔW ← C ΔW with C = V Vᵀ/‖V‖_F and V = W_aligned - W_base, in the layers with cos(ΔW, CΔW) < τ (arXiv 2405.16833,
    sections 3.2 to 3.4). C is not a projector: it shrinks an update by an amount that depends on ‖V‖_F, which the
    reports show. `operator: orthogonal` is the projector U_k U_kᵀ, with k given by `rank` or by `energy`.

    Differs from the paper's code: weights are paired by name, not by position; the cosine is compared with < (as in
    the paper) and not rounded; C is never formed; the input is left as it is. Where V = 0 the operator is undefined,
    which is an error (there: NaN).

    Example:
        >>> SafeLora(lowest=7).spec()["lowest"]
        7
    """

    name: ClassVar[str] = "safe_lora"
    version: ClassVar[int] = 2
    paper: ClassVar[str] = "arXiv:2405.16833"

    threshold: float | None = Field(default=0.35, allow_inf_nan=False)
    """Change the layers with similarity strictly below this (the paper's τ for Llama-2 on Dialog Summary). Not to be
    given together with `lowest` or `all_layers`."""
    operator: Literal["scaled_gram", "orthogonal"] = "scaled_gram"
    """The paper's C, or the rank-k orthogonal projector."""
    rank: int | None = Field(default=None, ge=1)
    """The projector's k."""
    energy: float | None = Field(default=None, gt=0, le=1)
    """The projector's k is the fewest directions that hold this share of ‖V‖²."""

    @model_validator(mode="before")
    @classmethod
    def _default_threshold_yields(cls, data: Any) -> Any:
        # The default stands for "nothing was said"; a selection that was asked for replaces it.
        if (
            isinstance(data, dict)
            and "threshold" not in data
            and (data.get("lowest") is not None or data.get("all_layers"))
        ):
            return {**data, "threshold": None}
        return data

    @model_validator(mode="after")
    def _rank_with_projector(self) -> Self:
        given = (self.rank is not None) + (self.energy is not None)
        if given != (self.operator == "orthogonal"):
            raise ValueError(
                "`operator: orthogonal` needs exactly one of `rank` and `energy`; scaled_gram takes neither"
            )
        return self

    def operator_for(self, delta: AlignmentDelta) -> Operator | None:
        """C, or U_k U_kᵀ; None where V is zero and spans nothing."""
        from stayaligned.algorithms.safe_lora import Orthogonal, ScaledGram

        if delta.norm == 0:
            return None
        if self.operator == "scaled_gram":
            return ScaledGram(delta)
        return Orthogonal(delta.subspace(rank=self.rank, energy=self.energy))
