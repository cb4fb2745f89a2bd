"""Configuration → objects. The only room that knows both."""

from clip_refine.build.data import build_data, build_held_out, build_tasks
from clip_refine.build.devices import (
    build_accelerator,
    count_free_workers,
    count_workers,
    device_name,
    seeded_generator,
)
from clip_refine.build.interpolation import interpolate_student, set_aside
from clip_refine.build.loading import build_model, model_source
from clip_refine.build.model import (
    build_embedder,
    build_precision,
    build_scale,
    build_student,
    measure_features,
)
from clip_refine.build.pixels import build_reader, default_cache
from clip_refine.build.sources import TOY, absolute_source, open_source, read_all_rows
from clip_refine.build.tokenizer import build_tokenizer
from clip_refine.build.trackers import Tracking, check_tracker, tracking
from clip_refine.build.training import (
    build_batches,
    build_objective,
    build_part,
    build_prior,
    build_trainer,
    count_pairs,
    count_steps,
    epoch_plans,
)

__all__ = [
    "TOY",
    "Tracking",
    "absolute_source",
    "build_accelerator",
    "build_batches",
    "build_data",
    "build_embedder",
    "build_held_out",
    "build_model",
    "build_objective",
    "build_part",
    "build_precision",
    "build_prior",
    "build_reader",
    "build_scale",
    "build_student",
    "build_tasks",
    "build_tokenizer",
    "build_trainer",
    "check_tracker",
    "count_free_workers",
    "count_pairs",
    "count_steps",
    "count_workers",
    "default_cache",
    "device_name",
    "epoch_plans",
    "interpolate_student",
    "measure_features",
    "model_source",
    "open_source",
    "read_all_rows",
    "seeded_generator",
    "set_aside",
    "tracking",
]
