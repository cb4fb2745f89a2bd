"""Names → peers: the one place that knows all of them."""

import difflib
from functools import partial

from torch import Tensor

from clip_refine.errors import ConfigError
from clip_refine.posthoc.chain import Chain, Fit
from clip_refine.posthoc.distribution_normalisation import DistributionNormalisation
from clip_refine.posthoc.mean_centring import MeanCentring
from clip_refine.posthoc.modality_shift import ModalityShift
from clip_refine.posthoc.nearest_neighbour import NearestNeighbourNormalisation
from clip_refine.posthoc.peer import Peer

PEERS: tuple[type[Peer], ...] = (
    MeanCentring,
    DistributionNormalisation,
    NearestNeighbourNormalisation,
    ModalityShift,
)
"""Every peer that is no chain; `kind` is its name."""


def fit_peer(
    name: str,
    image_features: Tensor,
    text_features: Tensor,
    *,
    neighbours: int = 128,
    alpha: float = 0.75,
    strength: float = 1.0,
) -> Peer:
    """Fit a peer, or a chain of them, by name.

    Args:
        name: `mean-centring`, `distribution-normalisation`, `nnn` or `modality-shift`, or several
            joined by `+` in the order in which they are applied, as `mean-centring+nnn`.
        image_features: (N, d), raw or unit, of held-out training pairs.
        text_features: (M, d), raw or unit, of held-out training pairs.
        neighbours: k of `nnn`; the other peers do not look at it.
        alpha: α of `nnn`.
        strength: λ of `modality-shift`.

    Raises:
        ConfigError: There is no such peer, or it cannot stand at its place in the chain.
        ValueError: As the peer's `fit`.

    Example:
        >>> import torch
        >>> fit_peer("modality-shift+nnn", torch.eye(3), torch.eye(3).flip(0)).name
        'modality-shift+nnn'
    """
    check_name(name)
    settings = {"neighbours": neighbours, "alpha": alpha, "strength": strength}
    steps = [_fit_of(kind, **settings) for kind in name.split("+")]
    if len(steps) == 1:
        return steps[0](image_features, text_features)
    return Chain.fit(image_features, text_features, steps=steps)


def check_name(name: str) -> None:
    """Refuse a name that `fit_peer` would refuse, before features are read.

    Raises:
        ConfigError: As `fit_peer`.
    """
    kinds = name.split("+")
    for kind in kinds:
        _check_kind(kind)
    if any(kind in ("nnn", "distribution-normalisation") for kind in kinds[:-1]):
        raise ConfigError(
            f"{name}: nnn and distribution-normalisation give features whose lengths carry "
            "meaning, so either can only be the last of a chain. Put it there."
        )


def _check_kind(kind: str) -> None:
    known = [peer.kind for peer in PEERS]
    if kind in known:
        return
    near = difflib.get_close_matches(kind, known, n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    raise ConfigError(
        f"{kind!r}: there is no such peer.{hint} There are {', '.join(known)}, "
        "alone or joined by +."
    )


def _fit_of(kind: str, *, neighbours: int, alpha: float, strength: float) -> Fit:
    match kind:
        case "mean-centring":
            return MeanCentring.fit
        case "distribution-normalisation":
            return DistributionNormalisation.fit
        case "modality-shift":
            return partial(ModalityShift.fit, strength=strength)
        case _:
            return partial(NearestNeighbourNormalisation.fit, neighbours=neighbours, alpha=alpha)
