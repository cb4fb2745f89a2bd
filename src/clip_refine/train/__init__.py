"""5. One epoch: precision, optimiser, step, log."""

from clip_refine.train.log import StepLog
from clip_refine.train.loop import Trainer, make_optimiser, make_schedule
from clip_refine.train.part import learning_rates, trained_part
from clip_refine.train.towers import (
    StudentTowers,
    TowerPrecision,
    faster_precision,
    prepare_student,
    share_out,
)

__all__ = [
    "StepLog",
    "StudentTowers",
    "TowerPrecision",
    "Trainer",
    "faster_precision",
    "learning_rates",
    "make_optimiser",
    "make_schedule",
    "prepare_student",
    "share_out",
    "trained_part",
]
