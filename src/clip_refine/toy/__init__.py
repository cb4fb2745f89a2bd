"""The drawn world and its small pre-trained model, which make every verb work offline."""

from clip_refine.toy.world import (
    ToyClasses,
    ToyPairs,
    model_directory,
    toy_tasks,
    toy_train,
    toy_val,
)

__all__ = ["ToyClasses", "ToyPairs", "model_directory", "toy_tasks", "toy_train", "toy_val"]
