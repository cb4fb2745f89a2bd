"""Looking around: the base model and the refined one side by side on images of one's own."""

from clip_refine.explore.index import Hit, SearchIndex
from clip_refine.explore.open import Explorer, open_explorer

__all__ = ["Explorer", "Hit", "SearchIndex", "open_explorer"]
