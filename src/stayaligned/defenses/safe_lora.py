"""Safe LoRA (Hsu et al., NeurIPS 2024): the paper's operator, and an orthogonal projector."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from stayaligned.core.errors import StayalignedError
from stayaligned.core.records import LayerReport
from stayaligned.defenses import DEFENSES, Execution, ModelPair, PatchDefense
from stayaligned.defenses._projection import ProjectionDefense
from stayaligned.defenses.patching.summary import notes_on

if TYPE_CHECKING:
    from peft import PeftModel

    from stayaligned.algorithms.alignment_delta import AlignmentDelta
    from stayaligned.algorithms.safe_lora import ComplementSide, Operator

_log = logging.getLogger(__name__)

OperatorName = Literal["scaled_gram", "orthogonal", "complement"]
"""The operators of the projection defenses; `complement` is that of the defense of this name, the others SafeLora's."""
ControlName = Literal["drop", "drop_other", "shrink", "random"]
"""The controls for a projection defense; `random` is the defense `random_subspace`."""


class SafeLora(ProjectionDefense):
    """Keep only the part along the alignment where an update points away (Safe LoRA).

    ΔW ← C ΔW with C = V Vᵀ/‖V‖_F and V = W_aligned - W_base, in the layers with cos(ΔW, CΔW) < τ (arXiv 2405.16833,
    sections 3.2 to 3.4). C is not a projector: it shrinks an update by an amount that depends on ‖V‖_F, which the
    reports show. `operator: orthogonal` is the projector U_k U_kᵀ, of rank k, given by `rank` or by `energy`.

    Differences from the paper's code: weights are paired by name, not by position; the cosine is compared with < (as
    in the paper) and not rounded; C is never formed; the input is not changed; and layers with a zero update, or where
    V = 0 and C would be NaN, are left unchanged and no rule selects them.

    Example:
        >>> SafeLora(lowest=7).spec()["lowest"]
        7
    """

    name: ClassVar[str] = "safe_lora"
    version: ClassVar[int] = 2
    paper: ClassVar[str] = "https://arxiv.org/abs/2405.16833"

    threshold: float | None = Field(default=0.35, allow_inf_nan=False)
    """Change the layers with similarity strictly below this. Default: the paper's τ for Llama-2 on Dialog Summary.
    Excludes `lowest` and `all_layers`."""
    operator: Literal["scaled_gram", "orthogonal"] = "scaled_gram"
    """The paper's C (`scaled_gram`), or the rank-k orthogonal projector (`orthogonal`)."""
    rank: int | None = Field(default=None, ge=1)
    """Number k of V's leading directions that a rank-k operator uses. Excludes `energy`."""
    energy: float | None = Field(default=None, gt=0, le=1)
    """Let a rank-k operator use the fewest leading directions that hold this share of ‖V‖². Excludes `rank`."""

    @model_validator(mode="before")
    @classmethod
    def _replace_default_threshold(cls, data: Any) -> Any:
        # The default applies only if no other selection is given.
        if (
            isinstance(data, dict)
            and "threshold" not in data
            and (data.get("lowest") is not None or data.get("all_layers"))
        ):
            return {**data, "threshold": None}
        return data

    @model_validator(mode="after")
    def _check_size(self) -> Self:
        given = (self.rank is not None) + (self.energy is not None)
        if given != (self.operator == "orthogonal"):
            raise ValueError(
                "`operator: orthogonal` needs exactly one of `rank` and `energy`; scaled_gram takes neither"
            )
        return self

    def operator_for(self, delta: AlignmentDelta) -> Operator:
        """Return C or U_k U_kᵀ."""
        from stayaligned.algorithms.safe_lora import Orthogonal, ScaledGram

        if self.operator == "scaled_gram":
            return ScaledGram(delta)
        return Orthogonal(delta.subspace(rank=self.rank, energy=self.energy))


def apply_safe_lora(
    peft_model: PeftModel,
    base: str | Path | None = None,
    aligned: str | Path | None = None,
    *,
    subspace: str | Path | None = None,
    threshold: float | None = None,
    lowest: int | None = None,
    operator: OperatorName = "scaled_gram",
    rank: int | None = None,
    energy: float | None = None,
    side: ComplementSide | None = None,
    control: ControlName | None = None,
    allow_mismatch: bool = False,
    allow_undecided: bool = False,
    adapter_name: str | None = None,
    new_name: str = "safe_lora",
) -> list[LayerReport]:
    """Project the LoRA of a model in memory: add the projected adapter beside the trained one, and activate it.

    The trained adapter is not changed, so both can be compared (`set_adapter`), and PEFT saves the result:
    `peft_model.save_pretrained(out, selected_adapters=["safe_lora"])`. Base and aligned are streamed from their files;
    neither is loaded. What `project` prints as notes is logged as warnings.

    Args:
        peft_model: a PeftModel with a LoRA that was trained on `aligned`.
        base: the unaligned ancestor: directory or hub id.
        aligned: the model under the adapter: directory or hub id.
        subspace: a subspace file, instead of base and aligned.
        threshold: change the layers with similarity strictly below this.
        lowest: change exactly this many layers, the least similar ones. With neither, every layer is changed.
        operator: `scaled_gram` is the paper's C.
        rank: the number k of directions, for the other operators.
        energy: instead of `rank`, the share of ‖V‖² that the k directions hold.
        side: of the complement, the directions to remove.
        control: apply this control to the selected layers instead.
        allow_mismatch: whether to patch although the models don't seem to belong together or to the adapter.
        allow_undecided: whether to patch although `subspace` leaves open which layers to change.
        adapter_name: the adapter to project; by default the active one.
        new_name: the name of the projected adapter.

    Returns:
        A report for every layer.

    Raises:
        StayalignedError: if the settings, the adapter and the checkpoints don't fit together; the model is then
            unchanged.
    """
    from stayaligned.hf.placement.in_memory import active_adapter, adapter_in_memory, add_adapter

    settings = {"threshold": threshold, "lowest": lowest, "rank": rank, "energy": energy, "side": side}
    try:
        patch: PatchDefense = DEFENSES.parse(projection_spec(operator, settings, control))
    except ValueError as error:
        raise StayalignedError(f"apply_safe_lora: {error}", hint="See `stayaligned show defense safe_lora`.") from None
    if (subspace is None) == (base is None) or (subspace is None and aligned is None):
        raise StayalignedError(
            "apply_safe_lora: the source of the alignment direction is not specified",
            hint="Give base and aligned, or subspace.",
        )
    file = None if subspace is None else Path(subspace)
    models = ModelPair(aligned, base, file, allow_mismatch=allow_mismatch, allow_undecided=allow_undecided)
    if new_name in peft_model.peft_config:
        raise StayalignedError(f"the model already has an adapter {new_name!r}", hint="Choose another new_name.")
    trained = adapter_name or active_adapter(peft_model)
    notes: list[str] = []
    (patched,) = patch.patch_all([adapter_in_memory(peft_model, trained)], models, Execution(note=notes.append))
    add_adapter(peft_model, patched.adapter, new_name, like=trained)
    for note in dict.fromkeys([*patched.notes, *notes, *notes_on(patch, patched.layers)]):
        _log.warning("%s", note)
    return list(patched.layers)


def projection_spec(
    operator: OperatorName, settings: Mapping[str, Any], control: ControlName | None = None
) -> dict[str, Any]:
    """Return the spec of a projection defense, or of a control for it.

    Args:
        operator: the operator of the projection.
        settings: fields of the projection defense. None values are ignored; without `threshold` and `lowest`, every
            layer is selected.
        control: return the spec of this control for the projection.
    """
    given = {key: value for key, value in settings.items() if value is not None}
    if not given.keys() & {"threshold", "lowest"}:
        given["all_layers"] = True
    if operator == "complement":
        spec = {"name": "complement", **given}
    else:
        spec = {"name": "safe_lora", "operator": operator, **given}
    if control is None:
        return spec
    return {"name": "random_subspace" if control == "random" else control, "like": spec}
