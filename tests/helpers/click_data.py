"""Data for tests, without Lightning: a spawned worker imports this and nothing more."""

import torch
from torch.utils.data import DataLoader, Dataset

from recis_lightning import Jagged


class Clicks(Dataset):
    """Samples that any process draws alike: two ids, some tags, a number and a label."""

    def __init__(self, size=64):
        self.size = size

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        user, item = torch.randint(-20 + index // 4, 20 + index, (2,), generator=generator)
        tags = torch.randint(9, (index % 4,), generator=generator)
        return user, item, tags, torch.randn(3, generator=generator), float(index % 3 == 0)


def collate(samples):
    """Put samples together; tags become a ``Jagged``."""
    users, items, tags, numbers, labels = zip(*samples, strict=True)
    offsets = torch.tensor([0, *(len(part) for part in tags)]).cumsum(0)
    return {
        "user": torch.stack(users),
        "item": torch.stack(items),
        "tags": Jagged(torch.cat(tags), offsets),
        "numbers": torch.stack(numbers),
        "label": torch.tensor(labels),
    }


def loader(size=64, batch_size=8, **kwargs):
    return DataLoader(Clicks(size), batch_size, collate_fn=collate, **kwargs)


class Looking(Clicks):
    """A dataset that reads a table in its worker."""

    def __init__(self, table):
        super().__init__(16)
        self.table = table

    def __getitem__(self, index):
        return self.table.embeddings(torch.arange(20_000))[index]


class ResumableLoader:
    """Batches in order, with its position in Lightning's checkpoints.

    Lightning starts a plain DataLoader from its first batch when it resumes in mid-epoch.
    """

    def __init__(self):
        self.batches = list(loader())
        self.position = 0

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        start = self.position % len(self.batches)
        for index in range(start, len(self.batches)):
            self.position = index + 1
            yield self.batches[index]

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state_dict):
        self.position = state_dict["position"]
