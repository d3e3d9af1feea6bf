"""What a run's page shows beside tables: metrics, learning rates and facts, kept in its history."""

import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from recis_lightning import TableReport, report
from recis_lightning.callbacks import MetricReportHook
from tests.helpers.click_data import loader
from tests.helpers.lightning_model import Model
from tests.helpers.quiet_trainer import quiet_trainer


class Halving(Model):
    """Model whose validation logs a known number, and whose dense rate halves in each step."""

    def validation_step(self, batch, batch_idx):
        self.log("auc <b>", torch.tensor(0.25 * self.global_step), batch_size=8)
        self.log("text", 1.0, logger=False, batch_size=8)

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        halve = torch.optim.lr_scheduler.LambdaLR(
            optimizer, [lambda step: 0.5**step, lambda step: 1.0]
        )
        return [optimizer], [{"scheduler": halve, "interval": "step"}]


def fit(path, **kwargs):
    hook = MetricReportHook(2, phases=True, report=path / "report.html")
    checkpoint = ModelCheckpoint(path, filename="last", every_n_train_steps=4)
    trainer = quiet_trainer(
        path,
        hook,
        checkpoint,
        limit_train_batches=4,
        limit_val_batches=1,
        val_check_interval=2,
        enable_checkpointing=True,
        **kwargs,
    )
    trainer.fit(Halving(lr=0.5), loader(batch_size=8), loader(batch_size=8))
    return hook.history, trainer


def test_history_and_page(tmp_path):
    history, trainer = fit(tmp_path)
    assert history.column("validation/auc <b>") == [0.5, 1.0]
    dense, sparse = (name for name in history.names if name.startswith("lr/"))
    assert dense == "lr/SparseDenseOptimizer/pg1"
    assert history.column(dense) == [0.5 * 0.5**2, 0.5 * 0.5**4]
    assert history.column(sparse) == [0.5, 0.5]
    assert history.facts["model.lr"] == "0.5"
    assert history.facts["model class"] == "Halving"
    page = (tmp_path / "report.html").read_text()
    for title in ("Validation: auc &lt;b&gt;", "Learning rates", "Milliseconds of a batch by"):
        assert f"<figcaption>{title}" in page
    assert f"<th>torch</th><td>{torch.__version__}</td>" in page
    assert "This table scrolls sideways" in page
    saved = TableReport.of_checkpoint(tmp_path / "last.ckpt").history
    assert saved.facts == history.facts
    assert saved.column(dense)[-1] == 0.5 * 0.5**4
    shown = report(trainer)
    assert isinstance(shown, TableReport)
    assert "auc &lt;b&gt;" in shown.html()
