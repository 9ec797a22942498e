"""Safe LoRA (Hsu et al., NeurIPS 2024), in the paper's form and with a true projector."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from stayaligned.core.errors import StayalignedError
from stayaligned.core.records import LayerReport
from stayaligned.defenses import DEFENSES, Execution, ModelPair, PatchDefense
from stayaligned.defenses._projection import ProjectionDefense

if TYPE_CHECKING:
    from peft import PeftModel

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


def apply_safe_lora(
    peft_model: PeftModel,
    base: str | Path,
    aligned: str | Path,
    *,
    threshold: float | None = None,
    lowest: int | None = None,
    operator: Literal["scaled_gram", "orthogonal", "complement"] = "scaled_gram",
    rank: int | None = None,
    energy: float | None = None,
    adapter_name: str | None = None,
    new_name: str = "safe_lora",
) -> list[LayerReport]:
    """Safe LoRA on a model in memory: adds the projected adapter beside the trained one, and makes it the active one.

    What was trained stays as it is under its own name, so both can be compared (`set_adapter`), and the result is
    saved by PEFT itself: `peft_model.save_pretrained(out, selected_adapters=["safe_lora"])`. Base and aligned are
    streamed from their files; neither is loaded.

    Args:
        peft_model: a PeftModel with a LoRA that was trained on `aligned`.
        base: the unaligned ancestor: directory or hub id.
        aligned: the model under the adapter: directory or hub id.
        threshold: change the layers with similarity below this.
        lowest: change exactly this many layers, the least similar ones. With neither, all of them.
        operator: `scaled_gram` is the paper's C.
        rank: the k of the other operators.
        energy: instead of `rank`, the share of ‖V‖² that the k directions hold.
        adapter_name: the adapter to project; the active one if not given.
        new_name: the name of the projected adapter.

    Returns:
        A report for every layer.

    Raises:
        StayalignedError: if the settings, the adapter and the checkpoints don't fit together; the model is then as it
            was.
    """
    from stayaligned.hf.placement.in_memory import active_adapter, adapter_in_memory, add_adapter

    spec = projection_spec(operator, {"threshold": threshold, "lowest": lowest}, {"rank": rank, "energy": energy})
    try:
        patch: PatchDefense = DEFENSES.parse(spec)
    except ValueError as error:
        raise StayalignedError(f"apply_safe_lora: {error}", hint="See `stayaligned show defense safe_lora`.") from None
    if new_name in peft_model.peft_config:
        raise StayalignedError(f"the model has an adapter {new_name!r} already", hint="Choose another new_name.")
    trained = adapter_name or active_adapter(peft_model)
    (patched,) = patch.patch_all([adapter_in_memory(peft_model, trained)], ModelPair(aligned, base), Execution())
    add_adapter(peft_model, patched.adapter, new_name, like=trained)
    return list(patched.layers)


def projection_spec(
    operator: str, selection: Mapping[str, Any], settings: Mapping[str, Any], control: str | None = None
) -> dict[str, Any]:
    """The mapping that names a projection defense, or a control for it.

    Args:
        operator: scaled_gram, orthogonal or complement.
        selection: `threshold`, `lowest`; what is None is left out, and with nothing left all layers are meant.
        settings: `rank`, `energy`, `side`; what is None is left out.
        control: drop, shrink or random: that control for the operator, instead of it.
    """
    name = "complement" if operator == "complement" else "safe_lora"
    chosen = {key: value for key, value in selection.items() if value is not None} or {"all_layers": True}
    spec: dict[str, Any] = {"name": name, **chosen, **{k: v for k, v in settings.items() if v is not None}}
    if operator != "complement":
        spec["operator"] = operator
    if control is None:
        return spec
    return {"name": "random_subspace" if control == "random" else control, "like": spec}
