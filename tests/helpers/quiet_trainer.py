"""A Trainer for tests: one epoch on the CPU, and no output."""

import lightning as L


def quiet_trainer(path, *callbacks, **kwargs):
    """Return a Trainer that writes nothing by itself, and what it is told to below ``path``."""
    settings = {
        "accelerator": "cpu",
        "default_root_dir": path,
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return L.Trainer(callbacks=list(callbacks), **{**settings, **kwargs})
