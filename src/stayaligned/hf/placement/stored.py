"""Where a checkpoint stores the parameters of its model, by transformers' own loading rules.

A parameter's name and shape in memory need not be those on disk: checkpoints of bare models lack a prefix, tied weights
are stored once, and the experts of a mixture are one tensor in memory but many on disk. Transformers' rules rename the
stored tensors and convert them. What a conversion does to the rows is found by carrying it out on small tensors that
number the rows: so any conversion is understood that moves whole rows, and any other is noticed.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from stayaligned.core.errors import StayalignedError
from stayaligned.weights.checkpoints import Block, Checkpoint, Weight
from stayaligned.weights.unsupported import refuse_quantised, some

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel
    from transformers.core_model_loading import WeightConverter

_PROBE_COLUMNS = 4
"""Columns of a tensor that stands for a weight; enough to notice if a conversion moves, merges or splits columns."""
_MOST_BLOCKS = 64
"""A matrix in more pieces than this has its rows interleaved, and would be read one by one."""


class _Source(NamedTuple):
    """A stored tensor that (part of) a parameter is made of."""

    name: str
    pattern: str | None
    """The pattern of the converter that takes it; None if it is only renamed."""


class StoredWeights:
    """Where a checkpoint stores the matrices of a model.

    Args:
        checkpoint: the checkpoint.
        model: its model, without weights (`meta_model`) and without adapters.
    """

    def __init__(self, checkpoint: Checkpoint, model: PreTrainedModel) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        self._checkpoint = checkpoint
        self._model = model
        self._parameters: Mapping[str, Tensor] = model.state_dict()
        self._tied: Mapping[str, str] = model.all_tied_weights_keys
        transforms = get_model_conversion_mapping(model)
        self._renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
        self._converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
        self._by_pattern = {p: converter for converter in self._converters for p in converter.source_patterns}
        self._sources = self._grouped_sources()
        self._first = self._first_targets()

    @property
    def parameters(self) -> Mapping[str, Tensor]:
        """The model's parameters (and buffers), on the meta device."""
        return self._parameters

    def find(self, parameters: Iterable[str]) -> dict[str, tuple[Weight, ...]]:
        """{parameter: its matrix, or each expert's, as they are stored}.

        Args:
            parameters: names of parameters with two dimensions, or three (one matrix per expert).

        Raises:
            StayalignedError: listing the parameters that are not there, or are stored in another layout or shape.
        """
        found: dict[str, tuple[Weight, ...]] = {}
        missing: list[str] = []
        converted: list[str] = []
        for parameter in dict.fromkeys(parameters):
            stored = next((name for name in self._names_of(parameter) if name in self._first), None)
            if stored is None or parameter not in self._parameters:
                missing.append(parameter)
                continue
            matrices = self._matrices(stored)
            if matrices is None or not self._has_shape(matrices, tuple(self._parameters[parameter].shape)):
                converted.append(parameter)
            else:
                found[parameter] = matrices
        if missing or converted:
            raise StayalignedError(
                f"{self._checkpoint.directory}: weights can't be read. "
                f"Missing: {some(missing)}. Stored in another layout: {some(converted)}",
                hint="Is this the model that the adapter was trained on, or its ancestor, with its own config.json? "
                "Weights are read where loading moves whole rows of them, not where it permutes or transposes them.",
            )
        return found

    def _names_of(self, parameter: str) -> list[str]:
        """The names under which it may be stored: its own, and those that it is tied to."""
        source = self._tied.get(parameter, parameter)
        return [parameter, source, *(target for target, tied_to in self._tied.items() if tied_to == source)]

    def _grouped_sources(self) -> dict[str, list[_Source]]:
        """{parameter, the first one where a conversion makes several: what it is made of}.

        Follows `transformers.core_model_loading.convert_and_load_state_dict_in_model`, without the tensors.
        """
        from transformers.core_model_loading import dot_natural_key, rename_source_key

        prefix, known = self._model.base_model_prefix, dict(self._parameters)
        groups: dict[str, list[_Source]] = {}
        for name in sorted(self._checkpoint, key=dot_natural_key):
            renamed, pattern = rename_source_key(name, self._renamings, self._converters, prefix, known)
            if renamed not in known and name in known:
                renamed, pattern = rename_source_key(name, [], [], prefix, known)
            if renamed in known:
                groups.setdefault(renamed, []).append(_Source(name, pattern))
        return groups

    def _first_targets(self) -> dict[str, str]:
        """{parameter: the key in `_sources` of the conversion that makes it}."""
        firsts = {name: name for name in self._sources}
        for name, sources in self._sources.items():
            if sources[0].pattern is not None:
                replaced, *others = self._by_pattern[sources[0].pattern].target_patterns
                firsts |= {name.replace(replaced, other): name for other in others}
        return firsts

    def _matrices(self, parameter: str) -> tuple[Weight, ...] | None:
        """A matrix, or each expert's; None if the rows are not stored as they are in memory."""
        first = self._first[parameter]
        sources = self._sources[first]
        if any(len(self._checkpoint.shape(source.name)) not in (2, 3) for source in sources):
            return None
        if all(source.pattern is not None for source in sources):
            return self._converted(parameter, first, sources)
        if len(sources) > 1:
            return None
        name = sources[0].name
        shape = self._checkpoint.shape(name)
        return tuple((Block(name, expert=e),) for e in range(shape[0])) if len(shape) == 3 else ((Block(name),),)

    def _converted(self, parameter: str, first: str, sources: Sequence[_Source]) -> tuple[Weight, ...] | None:
        """The matrices of a parameter that loading puts together, by converting tensors of row numbers."""
        import torch

        converter: WeightConverter = copy.deepcopy(self._by_pattern[str(sources[0].pattern)])
        units: list[Block] = []
        starts: list[int] = []
        row = 0
        for source in sources:
            *leading, _ = shape = self._checkpoint.shape(source.name)
            count = math.prod(leading)
            numbers = torch.arange(row * _PROBE_COLUMNS, (row + count) * _PROBE_COLUMNS, dtype=torch.int32)
            probe: Any = numbers.view(*leading, _PROBE_COLUMNS)
            converter.add_tensor(first, source.name, str(source.pattern), probe)
            experts = range(shape[0]) if len(shape) == 3 else (None,)
            units += [Block(source.name, expert=expert, rows=shape[-2]) for expert in experts]
            starts += range(row, row + count, shape[-2])
            row += count
        try:
            made = converter.convert(first, model=self._model, config=self._model.config)
        except (ValueError, TypeError, LookupError, AttributeError, RuntimeError):
            return None  # an operation that needs what a probe has not: the weight's own columns
        result = made.get(parameter)
        if isinstance(result, list):
            result = result[0]
        return None if result is None else _weights(result.to(torch.int64), units, starts)

    def _has_shape(self, matrices: tuple[Weight, ...], shape: tuple[int, ...]) -> bool:
        experts = shape[0] if len(shape) == 3 else 1
        shapes = {self._checkpoint.matrix_shape(weight) for weight in matrices}
        return len(shape) in (2, 3) and len(matrices) == experts and shapes == {shape[-2:]}


def meta_model(checkpoint: Checkpoint) -> PreTrainedModel:
    """The checkpoint's causal language model on the meta device: every module, no weights.

    Raises:
        StayalignedError: if the configuration is unknown, quantised, or needs code from the checkpoint.
    """
    import torch
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig, AutoModelForCausalLM

    refuse_quantised(checkpoint)
    try:
        config = AutoConfig.from_pretrained(checkpoint.directory, local_files_only=True, trust_remote_code=False)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except StrictDataclassError as error:
        raise StayalignedError(
            f"{checkpoint.directory}: config.json: {' '.join(str(error).split())}",
            hint="Set that field to a value that is possible here (a kernel that is installed, for instance).",
        ) from error
    except (ValueError, KeyError, OSError) as error:
        model_type = checkpoint.config().get("model_type")
        raise StayalignedError(
            f"{checkpoint.directory}: no causal language model of transformers ({model_type!r}): {error}",
            hint="Models with code of their own are not loaded.",
        ) from error


def _weights(numbers: Tensor, units: Sequence[Block], starts: Sequence[int]) -> tuple[Weight, ...] | None:
    """The blocks that numbered rows come from.

    Args:
        numbers: what a conversion made of tensors whose elements were numbered row by row, (rows, columns) or
            (experts, rows, columns).
        units: the matrices that went in, each as a block of all its rows.
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
            whole = count == source.rows
            blocks.append(Block(source.name, source.expert, offset, None if whole else count))
        matrices.append(tuple(blocks))
    return tuple(matrices)
