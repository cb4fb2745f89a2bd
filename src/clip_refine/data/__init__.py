"""1. Images and captions → batches."""

from clip_refine.data.bad_rows import BadRow, BadRowPolicy
from clip_refine.data.captioned import CaptionedImages
from clip_refine.data.every_caption import EveryCaption
from clip_refine.data.folders import ClassFolders, read_class_folders
from clip_refine.data.loader import (
    EpochPlan,
    PairBatch,
    PairLoader,
    image_batches,
    pair_batches,
)
from clip_refine.data.mixture import Mixture
from clip_refine.data.pairs import ImageCaptions, LabelledImages
from clip_refine.data.pixel_cache import with_cached_pixels
from clip_refine.data.reader import PixelReader
from clip_refine.data.rows import ReadOptions
from clip_refine.data.sources.kinds import recognise
from clip_refine.data.sources.opened import open_pairs
from clip_refine.data.sources.streamed import open_stream
from clip_refine.data.sources.tables import read_table
from clip_refine.data.split import Subset, hold_out
from clip_refine.data.stream_loader import stream_batches
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
    "ReadOptions",
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
