"""Lisa's published training step, rewritten for the current Trainer, as the reference of `lisa.py`.

Two clones of all trainable weights, the proximal term in the loss with one norm a tensor, a new data loader every step
to read its length, and a batch of the user's rows drawn for every step, used or not. For one process without
gradient accumulation, where its phases and its loss equal Lisa's. `num_items_in_batch`, which counts the tokens of the
discarded batch, is not passed on.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import Trainer

from stayaligned import LisaSettings
from stayaligned.algorithms.lisa_schedule import Phase

WARMUP = 0.1
"""Share of the steps before the proximal term is added; fixed in the published code."""


class PublishedTrainer(Trainer):
    """A Trainer with the published step; it takes K1, K2 and ρ from `lisa`, and the alignment rows in their order."""

    def __init__(self, *args: Any, lisa: LisaSettings, alignment_dataset: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.lisa = lisa
        self.steps_of = {Phase.ALIGNMENT: lisa.alignment_steps, Phase.FINETUNING: lisa.finetuning_steps}
        self.phase, self.steps, self.steps_in_phase = Phase.ALIGNMENT, 0, 0
        # The weights at the end of each phase, the anchor of the other phase.
        self.ended_with = {phase: self.copy_of_weights() for phase in Phase}
        batch = self.args.per_device_train_batch_size
        self.alignment_loader = DataLoader(alignment_dataset, batch_size=batch, collate_fn=self.data_collator)
        self.alignment_batches = iter(self.alignment_loader)

    def copy_of_weights(self) -> dict[str, Tensor]:
        return {name: p.data.detach().clone() for name, p in self.model.named_parameters() if p.requires_grad}

    def other_phase(self) -> Phase:
        return Phase.FINETUNING if self.phase is Phase.ALIGNMENT else Phase.ALIGNMENT

    def next_alignment_batch(self) -> Any:
        try:
            return next(self.alignment_batches)
        except StopIteration:
            self.alignment_batches = iter(self.alignment_loader)
            return next(self.alignment_batches)

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        if self.steps and self.steps_in_phase % self.steps_of[self.phase] == 0:
            self.ended_with[self.phase] = self.copy_of_weights()
            self.phase, self.steps_in_phase = self.other_phase(), 0
        if self.phase is Phase.ALIGNMENT:
            inputs = self.next_alignment_batch()
        model.train()
        inputs = self._prepare_inputs(inputs)
        with self.compute_loss_context_manager():
            loss = self.compute_loss(model, inputs)
        if self.steps > WARMUP * len(self.get_train_dataloader()) * self.args.num_train_epochs:
            anchor = self.ended_with[self.other_phase()]
            for name, weight in model.named_parameters():
                if weight.requires_grad and self.lisa.rho > 0:
                    loss = loss + self.lisa.rho / 2 * torch.norm(weight - anchor[name]) ** 2
        self.accelerator.backward(loss)
        self.steps += 1
        self.steps_in_phase += 1
        return loss.detach()
