"""Every setting, its default and its range. The defaults are the paper's and live only here.

The same groups and names serve as YAML keys, Python arguments and command-line flags:
`train: {batch_size: 256}`, `TrainConfig(batch_size=256)`, `--train.batch-size 256`.
"""

from clip_refine.config.runs import (
    EvaluateConfig,
    PosthocConfig,
    RefineConfig,
    as_recorded,
    demo_config,
    dump_config,
    explain,
    load_config,
    override,
    refuse_idle,
    with_recipe,
)
from clip_refine.config.settings import (
    DataConfig,
    EvaluationConfig,
    LossConfig,
    ModelConfig,
    PriorConfig,
    TrainConfig,
    check_architecture,
    named_model,
)
from clip_refine.config.suites import Suite, load_suite

__all__ = [
    "DataConfig",
    "EvaluateConfig",
    "EvaluationConfig",
    "LossConfig",
    "ModelConfig",
    "PosthocConfig",
    "PriorConfig",
    "RefineConfig",
    "Suite",
    "TrainConfig",
    "as_recorded",
    "check_architecture",
    "demo_config",
    "dump_config",
    "explain",
    "load_config",
    "load_suite",
    "named_model",
    "override",
    "refuse_idle",
    "with_recipe",
]
