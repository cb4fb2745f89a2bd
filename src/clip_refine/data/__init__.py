"""1. Images and captions → batches."""

from clip_refine.data.labelled import ClassFolders, read_class_folders
from clip_refine.data.loader import (
    EpochPlan,
    PairBatch,
    PairLoader,
    PixelReader,
    image_batches,
    pair_batches,
    stream_batches,
    with_cached_pixels,
)
from clip_refine.data.pairs import (
    BadRow,
    BadRowPolicy,
    CaptionedImages,
    EveryCaption,
    ImageCaptions,
    LabelledImages,
    Mixture,
    Subset,
    hold_out,
)
from clip_refine.data.sources import open_pairs, open_stream, read_table, recognise
from clip_refine.data.streams import PairStream, Stream, StreamMixture

__all__ = [
    "BadRow",
    "BadRowPolicy",
    "CaptionedImages",
    "ClassFolders",
    "EpochPlan",
    "EveryCaption",
    "ImageCaptions",
    "LabelledImages",
    "Mixture",
    "PairBatch",
    "PairLoader",
    "PairStream",
    "PixelReader",
    "Stream",
    "StreamMixture",
    "Subset",
    "hold_out",
    "image_batches",
    "open_pairs",
    "open_stream",
    "pair_batches",
    "read_class_folders",
    "read_table",
    "recognise",
    "stream_batches",
    "with_cached_pixels",
]
