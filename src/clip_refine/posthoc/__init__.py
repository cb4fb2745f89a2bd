"""6. Training-free peers: feature transforms fitted on held-out training pairs."""

from clip_refine.posthoc.chain import Chain
from clip_refine.posthoc.distribution_normalisation import DistributionNormalisation
from clip_refine.posthoc.feature_file import FeatureSet, read_features, write_features
from clip_refine.posthoc.kinds import fit_peer
from clip_refine.posthoc.mean_centring import MeanCentring
from clip_refine.posthoc.modality_shift import ModalityShift
from clip_refine.posthoc.nearest_neighbour import NearestNeighbourNormalisation
from clip_refine.posthoc.peer import Peer
from clip_refine.posthoc.store import load_peer, save_peer
from clip_refine.posthoc.verbs import apply_file, fit_file

__all__ = [
    "Chain",
    "DistributionNormalisation",
    "FeatureSet",
    "MeanCentring",
    "ModalityShift",
    "NearestNeighbourNormalisation",
    "Peer",
    "apply_file",
    "fit_file",
    "fit_peer",
    "load_peer",
    "read_features",
    "save_peer",
    "write_features",
]
