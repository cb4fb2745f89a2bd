"""1. Images and captions → batches."""

from clip_refine.data.folders import ClassFolders, read_class_folders
from clip_refine.data.loader import EpochPlan, PairBatch, image_batches, pair_batches
from clip_refine.data.pairs import ImageCaptions, LabelledImages
from clip_refine.data.split import Subset, hold_out
from clip_refine.data.tables import ImageFileCaptions, read_table

__all__ = [
    "ClassFolders",
    "EpochPlan",
    "ImageCaptions",
    "ImageFileCaptions",
    "LabelledImages",
    "PairBatch",
    "Subset",
    "hold_out",
    "image_batches",
    "pair_batches",
    "read_class_folders",
    "read_table",
]
