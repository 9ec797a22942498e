"""The names of transformers, PEFT and TRL that are private or differ between their versions, each in one place.

`tests/hf/test_hosts.py` uses every one of them on the installed versions, and `make hosts` on the oldest, the newest
and those between that training frameworks pin. What is public and the same in all of them is imported where it is used.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stayaligned.core.extras import require_packages
from stayaligned.core.host_versions import require_versions

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel
    from transformers.core_model_loading import WeightConverter, WeightRenaming

TRAINER_HOOKS = ("_get_train_sampler", "_save_checkpoint", "_save_rng_state", "_load_best_model")
"""Methods of Trainer that Lisa's mixin overrides."""


# ---- transformers: loading rules -----------------------------------------------------------------------------------


class LoadingRules:
    """The rules by which transformers renames and converts the stored tensors of a model.

    Args:
        model: the model, which may be without weights.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        rules = get_model_conversion_mapping(model)
        self._prefix = model.base_model_prefix
        self._renamings: list[WeightRenaming] = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        self._converters: list[WeightConverter] = [rule for rule in rules if isinstance(rule, WeightConverter)]
        self.by_pattern = {pattern: each for each in self._converters for pattern in each.source_patterns}
        """Converters by the patterns of stored names that they read."""

    def rename(self, name: str, known: Mapping[str, Tensor]) -> tuple[str, str | None]:
        """Return the parameter that a stored tensor is loaded into, and the pattern of its converter, if it has one.

        Args:
            name: the stored name.
            known: the model's parameters.
        """
        from transformers.core_model_loading import rename_source_key

        parameters = dict(known)
        renamed, pattern = rename_source_key(name, self._renamings, self._converters, self._prefix, parameters)
        if renamed not in known and name in known:
            renamed, pattern = rename_source_key(name, [], [], self._prefix, parameters)
        return renamed, pattern


def loading_order(name: str) -> Any:
    """Return the key by which transformers sorts stored names before it converts them."""
    from transformers.core_model_loading import dot_natural_key

    return dot_natural_key(name)


def convert_stored(
    converter: WeightConverter, target: str, sources: Sequence[tuple[str, str, Tensor]], model: PreTrainedModel
) -> Mapping[str, Any]:
    """Return what a converter, which is used up, makes of stored tensors, by parameter.

    Args:
        converter: the converter.
        target: the parameter that names the conversion.
        sources: (stored name, pattern, tensor) in loading order.
        model: the model.
    """
    for name, pattern, tensor in sources:
        converter.add_tensor(target, name, pattern, tensor)  # pyright: ignore[reportArgumentType]
    return converter.convert(target, model=model, config=model.config)


def tied_weights(model: PreTrainedModel) -> Mapping[str, str]:
    """Return {parameter: the parameter whose weight it shares}."""
    return model.all_tied_weights_keys


# ---- transformers: generation --------------------------------------------------------------------------------------


def cache_has_only_attention(model: Any) -> bool:
    """Return whether all that `generate` keeps is keys and values, which can go on with some of its rows.

    Models that prepare their inputs themselves may count positions in a way of their own, so they do not.
    """
    from transformers import DynamicCache, GenerationMixin
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    kind = type(model)
    if kind.prepare_inputs_for_generation is not vars(GenerationMixin)["prepare_inputs_for_generation"]:
        return False
    if not kind._supports_default_dynamic_cache():
        return False
    layers = DynamicCache(config=model.config).layers
    return bool(layers) and all(type(layer) in {DynamicLayer, DynamicSlidingWindowLayer} for layer in layers)


# ---- transformers: Trainer -----------------------------------------------------------------------------------------


@contextlib.contextmanager
def loss_scaled(trainer: Any, is_mean_over_step: bool) -> Generator[None]:
    """Tell a Trainer, within the block, whether its loss is already divided by the number of accumulated batches.

    Before transformers 5.19 a Trainer concludes it from whether the loss is its model's or a function's.
    """
    if hasattr(trainer, "loss_is_scaled_for_ga"):
        said: dict[str, Any] = {"loss_is_scaled_for_ga": is_mean_over_step}
    else:
        said = {
            "model_accepts_loss_kwargs": is_mean_over_step,
            "compute_loss_func": trainer.compute_loss if is_mean_over_step else None,
        }
    usual = {name: getattr(trainer, name) for name in said}
    vars(trainer).update(said)
    try:
        yield
    finally:
        vars(trainer).update(usual)


def is_loss_scaled(trainer: Any, count: Any) -> bool:
    """Return whether a Trainer's own loss is already divided by the number of accumulated batches.

    Args:
        trainer: the trainer.
        count: number of label tokens of the optimizer step; None if they are not counted.
    """
    said = getattr(trainer, "loss_is_scaled_for_ga", None)
    if said is not None:
        return bool(said)
    return bool((trainer.model_accepts_loss_kwargs and count is not None) or trainer.compute_loss_func is not None)


def innermost_model(trainer: Any) -> Any:
    """Return a Trainer's model without the wrappers of processes and adapters."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def ignores_token_count(model: Any) -> bool:
    """Return whether a model of transformers takes the number of label tokens of a step and does not divide by it.

    A Trainer then adds the mean losses of accumulated batches. So do Mamba and xLSTM before transformers 5.18.
    """
    forward = inspect.unwrap(type(model).forward)
    code: Any = getattr(forward, "__code__", None)
    if code is None or not type(model).__module__.startswith("transformers.models."):
        return False
    takes_any = any(each.kind is each.VAR_KEYWORD for each in inspect.signature(forward).parameters.values())
    accepts = getattr(model, "accepts_loss_kwargs", takes_any)
    return bool(accepts) and "CrossEntropyLoss" in code.co_names


def load_checkpoint_weights(trainer: Any, checkpoint: Path) -> None:
    """Load the weights of a Trainer's checkpoint into its model."""
    trainer._load_from_checkpoint(str(checkpoint))


def collator_of_known_columns(trainer: Any) -> Callable[[list[Any]], Any]:
    """Return a Trainer's collator, after it drops the columns that the model does not read, if it is to drop them."""
    if not trainer.args.remove_unused_columns:
        return trainer.data_collator
    return trainer._get_collator_with_removed_columns(trainer.data_collator)


def keep_column(trainer: Any, column: str) -> None:
    """Make a Trainer pass a column to its collator that the model does not read."""
    trainer._set_signature_columns_if_needed()
    trainer._signature_columns = [*trainer._signature_columns, column]


def checkpoint_directory(trainer: Any, trial: Any) -> Path:
    """Return the directory that a Trainer writes its next checkpoint to."""
    return Path(trainer._get_output_dir(trial=trial)) / f"checkpoint-{trainer.state.global_step}"


# ---- PEFT ----------------------------------------------------------------------------------------------------------


def is_rejected_target(model: PreTrainedModel, name: str) -> bool:
    """Return whether PEFT refuses a LoRA on modules of this last name in this model."""
    from peft import LoraConfig
    from peft.tuners.tuners_utils import _check_lora_target_modules_mamba  # pyright: ignore[reportPrivateUsage]

    try:
        _check_lora_target_modules_mamba(LoraConfig(), model, name)
    except ValueError:
        return True
    return False


def knows_expert_layouts() -> bool:
    """Return whether PEFT tells stacked experts of the layout (out, in) from (in, out); before 0.19 it does not."""
    from peft.tuners.lora import ParamWrapper

    return "is_transposed" in inspect.getsource(ParamWrapper.update_layer)


# ---- TRL -----------------------------------------------------------------------------------------------------------


def trl_class(trainer: Any) -> str | None:
    """Return the name of TRL's class that a trainer is of, itself or by inheritance; None if it is none of TRL's."""
    return next((base.__name__ for base in type(trainer).__mro__ if base.__module__.startswith("trl.")), None)


def require_trl(user: str, *, otherwise: str) -> None:
    """Check that TRL is installed in a version whose trainers prepare rows as this package expects.

    Args:
        user: what needs it.
        otherwise: what to do without it.

    Raises:
        StayalignedError: if it is missing or another version.
    """
    require_packages({user: ["trl"]})
    require_versions("trl", otherwise=otherwise)


def sft_trainer_class() -> type[Any] | None:
    """Return SFTTrainer if it has been imported, because importing it takes seconds; else None."""
    module = sys.modules.get("trl.trainer.sft_trainer")
    return None if module is None else module.SFTTrainer


class SftRows:
    """What an SFTTrainer has decided about its rows.

    Args:
        trainer: an SFTTrainer.
    """

    def __init__(self, trainer: Any) -> None:
        self.has_images: bool = trainer._is_vision_dataset
        """Whether the user's rows have images."""
        self.reads_images: bool = trainer._is_vlm
        self.are_prepared: bool = trainer._skip_prepare_dataset
        """Whether rows are used as they are."""
        self.tokenizer: Any = trainer._tokenizer
        self.formatting_func: Callable[[Any], Any] | None = trainer._formatting_func
        self._trainer = trainer

    def prepare(self, rows: Any, formatting_func: Callable[[Any], Any] | None, *, completion_only: bool | None) -> Any:
        """Tokenize rows as the trainer's own, and make their labels.

        Args:
            rows: a dataset of the `datasets` library.
            formatting_func: the user's function to apply to them, or None.
            completion_only: whether only completions are learned; None for what the trainer does with its own rows.
        """
        trainer = self._trainer
        # TRL decides once, from the user's first row, whether prompts are masked. Other rows may differ.
        chosen: bool = trainer.completion_only_loss
        if completion_only is not None:
            trainer.completion_only_loss = completion_only
        try:
            return trainer._prepare_dataset(
                rows, trainer.processing_class, trainer.args, trainer.args.packing, formatting_func, "alignment"
            )
        finally:
            trainer.completion_only_loss = chosen


def without_preparation(trainer_class: type[Any]) -> type[Any]:
    """Return a subclass of one of TRL's trainers that takes rows which are tokens already."""

    def prepare(self: Any, dataset: Any, *_args: Any, **_options: Any) -> Any:
        del self
        return dataset

    return type("Encoded", (trainer_class,), {"_prepare_dataset": prepare})
