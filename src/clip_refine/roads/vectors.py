"""What `clip-refine posthoc fit` and `apply` do: from files to files."""

from pathlib import Path

from clip_refine.config import PosthocConfig
from clip_refine.support.errors import DataError
from clip_refine.support.folder import check_free
from clip_refine.vectors.files import (
    FeatureSet,
    check_features_path,
    load_peer,
    read_features,
    save_peer,
    write_features,
)
from clip_refine.vectors.transforms import DEFAULTS, Peer, check_name, fit_peer


def fit_file(
    name: str,
    features: Path,
    out: Path,
    settings: PosthocConfig = DEFAULTS,
    *,
    overwrite: bool = False,
) -> Peer:
    """Fit a peer on a file of features and save it."""
    check_name(name)
    check_free(out, overwrite=overwrite)
    found = read_features(features)
    try:
        peer = fit_peer(name, found.image_features, found.text_features, settings)
    except ValueError as error:
        raise DataError(f"{features}: {name} cannot be fitted. {error}.") from error
    save_peer(peer, out, overwrite=overwrite)
    return peer


def apply_file(peer_folder: Path, features: Path, out: Path, *, overwrite: bool = False) -> Peer:
    """Transform a file of features by a saved peer.

    The written features are compared by their dot product as they are; the file's note names the
    peer and how many score columns stand behind the features (2 for `nnn`).
    """
    check_features_path(out, overwrite=overwrite)
    peer = load_peer(peer_folder)
    found = read_features(features)
    try:
        moved = FeatureSet(
            peer.transform_image(found.image_features),
            peer.transform_text(found.text_features),
            found.text_to_image,
        )
    except ValueError as error:
        raise DataError(f"{features}: {peer.name} cannot be applied. {error}.") from error
    note = {
        "peer": peer.name,
        "similarity": "dot product, without scaling to norm 1",
        "score_columns": peer.score_columns,
    }
    write_features(out, moved, note=note, overwrite=overwrite)
    return peer
