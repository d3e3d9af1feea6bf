"""What ranks run in the tests of unequal numbers of batches."""

import lightning as L
import torch
from torch import distributed
from torch.utils.data import DataLoader, IterableDataset

from recis_lightning.callbacks import HashTableFilterHook, UnevenBatches
from tests.helpers.lightning_model import Model
from tests.helpers.quiet_trainer import quiet_trainer
from tests.helpers.rank_trainers import as_torchrun, train_loader


class Stream(IterableDataset):
    """Batches whose number nobody knows."""

    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)


class Careful(Model):
    """A model whose loss is finite without samples, and that notes what Lightning does."""

    def __init__(self, reckless=False):
        super().__init__()
        self.done, self.validated, self.reckless = [], [], reckless

    def training_step(self, batch, batch_idx):
        self.done.append(len(batch["label"]))
        lost = torch.nn.functional.binary_cross_entropy_with_logits(
            self(batch), batch["label"], reduction="sum"
        )
        return lost / (len(batch["label"]) if self.reckless else max(len(batch["label"]), 1))

    def validation_step(self, batch, batch_idx):
        self(batch)
        self.validated[-1] += 1

    def on_validation_epoch_start(self):
        self.validated.append(0)


def _batches(number):
    return [*train_loader(8), *train_loader(8)][:number]


def train(path, numbers, on_uneven, sized, epochs=2, **kwargs):
    """Train and validate with so many batches on each rank; return what this rank did."""
    given = _batches(numbers[distributed.get_rank()])
    model = Careful()
    hooks = [HashTableFilterHook(filter_interval=2)]
    hooks += [] if on_uneven is None else [UnevenBatches(on_uneven)]
    data = DataLoader(given if sized else Stream(given), batch_size=None)
    with as_torchrun() as settings:
        run = quiet_trainer(
            path, *hooks, max_epochs=epochs, use_distributed_sampler=False, **settings, **kwargs
        )
        run.fit(model, data, DataLoader(_batches(1), batch_size=None))
    tower = [value.detach().sum().item() for value in model.tower.parameters()]
    return model.done, model.validated, run.global_step, tower


def all_cases(path):
    """Return what each case did on this rank."""
    return {
        "stop": train(path, (3, 5), None, True),
        "stop, without lengths": train(path, (4, 3), None, False),
        "pad": train(path, (3, 5), "pad", True),
        "pad, without lengths": train(path, (4, 3), "pad", False),
        "pad, none on one rank": train(path, (0, 2), "pad", False, epochs=1),
        "stop, none on one rank": train(path, (0, 2), None, False, epochs=1),
        "accumulated": train(path, (3, 4), "pad", True, accumulate_grad_batches=3),
    }


def reckless(path):
    """A loss that is NaN without samples is refused, and nobody hangs."""
    with as_torchrun() as settings:
        model = Careful(reckless=True)
        given = DataLoader(_batches(1 + distributed.get_rank()), batch_size=None)
        run = quiet_trainer(path, UnevenBatches("pad"), use_distributed_sampler=False, **settings)
        try:
            run.fit(model, given)
        except RuntimeError as error:
            return str(error)
    return ""


def validation_without_batches(path, sized):
    """Rank 1 has nothing to validate or test, from the sanity check on."""
    given = _batches(3 if distributed.get_rank() == 0 else 0)
    model, hook = Careful(), HashTableFilterHook()
    evaluation = DataLoader(given if sized else Stream(given), batch_size=None)
    epochs = []

    class Ends(L.Callback):
        def on_validation_epoch_end(self, *args):
            epochs.append("validation")

    with as_torchrun() as settings:
        run = quiet_trainer(
            path,
            hook,
            Ends(),
            use_distributed_sampler=False,
            num_sanity_val_steps=2,
            **settings,
        )
        run.fit(model, DataLoader(_batches(2), batch_size=None), evaluation)
        run.validate(model, evaluation, verbose=False)
    return model.validated, epochs, run.global_step
