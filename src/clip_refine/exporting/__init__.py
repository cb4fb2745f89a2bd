"""A refined model → the format of another library, checked by loading it back."""

from clip_refine.exporting.road import FORMATS, export

__all__ = ["FORMATS", "export"]
