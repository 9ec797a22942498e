"""Find where a checkpoint stores the parameters of its model, by transformers' own loading rules.

A parameter's name and shape in memory may differ from those on disk: checkpoints of bare models lack a prefix, tied
weights are stored once, and the experts of a mixture are one tensor in memory but many on disk. Transformers' rules
rename and convert the stored tensors. To trace the rows through a conversion, it is applied to small tensors that
number the rows: every conversion that moves whole rows is supported, and every other one is detected.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from stayaligned.core.errors import StayalignedError
from stayaligned.hf.hosts import LoadingRules, convert_stored, loading_order, tied_weights
from stayaligned.weights.checkpoints import Block, Checkpoint, Weight
from stayaligned.weights.lora_layout import name_among
from stayaligned.weights.unsupported import list_names, refuse_quantized

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

_PROBE_COLUMNS = 4
"""Columns of the tensors of row numbers; enough to detect that a conversion moves, merges or splits columns."""
_MOST_BLOCKS = 64
"""Largest number of blocks of a matrix; more means that rows are interleaved, and would be read one by one."""


class _Source(NamedTuple):
    """A stored tensor that a parameter, or part of it, is loaded from."""

    name: str
    pattern: str | None
    """Pattern of the converter for this tensor; None if the tensor is only renamed."""


class StoredWeights:
    """The places where a checkpoint stores the matrices of its model.

    Args:
        checkpoint: the checkpoint.
        model: the checkpoint's model, without weights (`meta_model`) and without adapters.
    """

    def __init__(self, checkpoint: Checkpoint, model: PreTrainedModel) -> None:
        self._checkpoint = checkpoint
        self.model = model
        self.parameters: Mapping[str, Tensor] = model.state_dict()  # on the meta device
        self._tied = tied_weights(model)
        self._rules = LoadingRules(model)
        self._sources = self._grouped_sources()
        self._first = self._first_targets()

    def find(self, parameters: Iterable[str]) -> dict[str, tuple[Weight, ...]]:
        """Return {parameter: its matrix, or the matrix of each expert, as stored}.

        Args:
            parameters: names of parameters with two dimensions, or three (one matrix per expert), in this model or in
                one with the same text model.

        Raises:
            StayalignedError: listing the parameters that are missing, or stored in another layout or shape.
        """
        found: dict[str, tuple[Weight, ...]] = {}
        missing: list[str] = []
        converted: list[str] = []
        for parameter in dict.fromkeys(parameters):
            own = name_among(self.parameters, parameter)
            stored = next((name for name in self._names_of(own) if name in self._first), None) if own else None
            if own is None or stored is None:
                missing.append(parameter)
                continue
            matrices = self._matrices(stored)
            if matrices is None or not self._has_shape(matrices, tuple(self.parameters[own].shape)):
                converted.append(parameter)
            else:
                found[parameter] = matrices
        if missing or converted:
            raise StayalignedError(
                f"{self._checkpoint.directory}: weights can't be read. "
                f"Missing: {list_names(missing)}. Stored in another layout: {list_names(converted)}",
                hint="Give the model that the adapter was trained on, or its ancestor, each with its own config.json. "
                "Weights that are permuted or transposed on loading are not supported.",
            )
        return found

    def _names_of(self, parameter: str) -> list[str]:
        """Return the names under which a parameter may be stored: its own, and those of tied parameters."""
        source = self._tied.get(parameter, parameter)
        return [parameter, source, *(target for target, tied_to in self._tied.items() if tied_to == source)]

    def _grouped_sources(self) -> dict[str, list[_Source]]:
        """Return {parameter: the stored tensors that it is loaded from}, with the first parameter of each conversion.

        Follows `transformers.core_model_loading.convert_and_load_state_dict_in_model`, without the tensors.
        """
        groups: dict[str, list[_Source]] = {}
        for name in sorted(self._checkpoint, key=loading_order):
            renamed, pattern = self._rules.rename(name, self.parameters)
            if renamed in self.parameters:
                groups.setdefault(renamed, []).append(_Source(name, pattern))
        return groups

    def _first_targets(self) -> dict[str, str]:
        """Return {parameter: the key in `_sources` of the conversion that it results from}."""
        firsts = {name: name for name in self._sources}
        for name, sources in self._sources.items():
            if sources[0].pattern is not None:
                replaced, *others = self._rules.by_pattern[sources[0].pattern].target_patterns
                firsts |= {name.replace(replaced, other): name for other in others}
        return firsts

    def _matrices(self, parameter: str) -> tuple[Weight, ...] | None:
        """Return a parameter's matrix, or each expert's; None if loading does not keep its rows whole."""
        first = self._first[parameter]
        sources = self._sources[first]
        if any(len(self._checkpoint.shape(source.name)) not in (2, 3) for source in sources):
            return None
        if all(source.pattern is not None for source in sources):
            return self._trace_conversion(parameter, first, sources)
        if len(sources) > 1:
            return None
        name = sources[0].name
        shape = self._checkpoint.shape(name)
        return tuple((Block(name, expert=e),) for e in range(shape[0])) if len(shape) == 3 else ((Block(name),),)

    def _trace_conversion(self, parameter: str, first: str, sources: Sequence[_Source]) -> tuple[Weight, ...] | None:
        """Return the matrices of a parameter that loading converts, traced by tensors of row numbers."""
        import torch

        units: list[Block] = []
        probes: list[tuple[str, str, Tensor]] = []
        starts: list[int] = []
        row = 0
        for source in sources:
            *leading, _ = shape = self._checkpoint.shape(source.name)
            count = math.prod(leading)
            numbers = torch.arange(row * _PROBE_COLUMNS, (row + count) * _PROBE_COLUMNS, dtype=torch.int32)
            probes.append((source.name, str(source.pattern), numbers.view(*leading, _PROBE_COLUMNS)))
            experts = range(shape[0]) if len(shape) == 3 else (None,)
            units += [Block(source.name, expert=expert, rows=shape[-2]) for expert in experts]
            starts += range(row, row + count, shape[-2])
            row += count
        converter = copy.deepcopy(self._rules.by_pattern[str(sources[0].pattern)])
        try:
            converted = convert_stored(converter, first, probes, self.model)
        except (ValueError, TypeError, LookupError, AttributeError, RuntimeError):
            return None  # the operation needs the weight's own columns
        result = converted.get(parameter)
        if isinstance(result, list):
            result = result[0]
        return None if result is None else _locate_rows(result.to(torch.int64), units, starts)

    def _has_shape(self, matrices: tuple[Weight, ...], shape: tuple[int, ...]) -> bool:
        experts = shape[0] if len(shape) == 3 else 1
        shapes = {self._checkpoint.matrix_shape(weight) for weight in matrices}
        return len(shape) in (2, 3) and len(matrices) == experts and shapes == {shape[-2:]}


def meta_models(checkpoint: Checkpoint) -> list[PreTrainedModel]:
    """Create the checkpoint's language models on the meta device: every module, no weights.

    Returns:
        The causal language model, the model that also reads images, or both, if transformers has both for the
        checkpoint: adapters of either exist.

    Raises:
        StayalignedError: if the configuration is unknown, quantized, or needs code from the checkpoint.
    """
    import torch
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    refuse_quantized(checkpoint)
    try:
        config = AutoConfig.from_pretrained(checkpoint.directory, local_files_only=True, trust_remote_code=False)
        with torch.device("meta"):
            models = [each.from_config(config, trust_remote_code=False) for each in language_model_classes(config)]
    except StrictDataclassError as error:
        raise StayalignedError(
            f"{checkpoint.directory}: config.json: {' '.join(str(error).split())}",
            hint="Set that field to a valid value (such as a kernel that is installed).",
        ) from error
    except (ValueError, KeyError, OSError) as error:
        model_type = checkpoint.config().get("model_type")
        raise StayalignedError(
            f"{checkpoint.directory}: not a language model of transformers ({model_type!r}): {error}",
            hint="Use a model that transformers supports; models with their own code are not loaded.",
        ) from error
    return models if len({type(model) for model in models}) > 1 else models[:1]


def meta_model(checkpoint: Checkpoint) -> PreTrainedModel:
    """Return the first of `meta_models`, which `hf.models.load_model` would load.

    Raises:
        StayalignedError: as `meta_models`.
    """
    return meta_models(checkpoint)[0]


def language_model_classes(config: Any) -> list[Any]:
    """Return transformers' auto classes for a configuration: of language models, then of those with images."""
    import transformers

    known = [
        auto
        for auto, mapping in (
            (transformers.AutoModelForCausalLM, transformers.MODEL_FOR_CAUSAL_LM_MAPPING),
            (transformers.AutoModelForMultimodalLM, transformers.MODEL_FOR_MULTIMODAL_LM_MAPPING),
        )
        if type(config) in mapping and (auto is transformers.AutoModelForCausalLM or not config.is_encoder_decoder)
    ]
    return known or [transformers.AutoModelForCausalLM]


def _locate_rows(numbers: Tensor, units: Sequence[Block], starts: Sequence[int]) -> tuple[Weight, ...] | None:
    """Return the blocks that numbered rows come from; None if a row is not whole, or there are too many blocks.

    Args:
        numbers: the result of a conversion of tensors whose elements were numbered row by row, (rows, columns) or
            (experts, rows, columns).
        units: the matrices before the conversion, each as a block of all its rows.
        starts: the number of each unit's first row.
    """
    import torch

    if numbers.ndim not in (2, 3) or numbers.shape[-1] != _PROBE_COLUMNS or numbers.numel() == 0:
        return None
    rows = numbers[..., 0] // _PROBE_COLUMNS
    if not torch.equal(numbers, rows.unsqueeze(-1) * _PROBE_COLUMNS + torch.arange(_PROBE_COLUMNS)):
        return None
    bounds = torch.tensor(starts)
    matrices: list[Weight] = []
    for matrix in rows.view(-1, rows.shape[-1]):
        unit = torch.searchsorted(bounds, matrix, right=True) - 1
        breaks = (matrix.diff() != 1) | (unit.diff() != 0)
        firsts = [0, *(breaks.nonzero().flatten() + 1).tolist()]
        if len(firsts) > _MOST_BLOCKS:
            return None
        blocks: list[Block] = []
        for first, after in zip(firsts, [*firsts[1:], len(matrix)], strict=True):
            source = units[int(unit[first])]
            offset, count = int(matrix[first]) - starts[int(unit[first])], after - first
            complete = count == source.rows
            blocks.append(Block(source.name, source.expert, offset, None if complete else count))
        matrices.append(tuple(blocks))
    return tuple(matrices)
