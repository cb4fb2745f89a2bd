"""Arithmetic on weights: the scale of raw features, the line between two models."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from scipy.optimize import minimize_scalar
from torch import Tensor, nn
from torch.nn import functional

from clip_refine.support.errors import ModelError

# --------------------------------------------------------------------------------------------------
# Raw features at the paper's scale: canonical norms for any tower.
#
# The paper's losses see raw features, and its settings belong to OpenAI's models, whose raw norms
# are about 10 on both sides and whose dot products so are about the logit scale times a cosine.
# Here each tower's output layer is multiplied by one number, so that the mean raw norm of both is
# the square root of the logit scale, and divided by it again after training. Unit features never
# notice; but the losses and AdamW, whose steps ignore the gradient's size and so do not fit every
# weight's, see every model at one scale. A model whose output layer was multiplied by any constant
# is therefore refined exactly alike.


PAPER_RATIO = 1.5
"""Norms may differ by this factor from the paper's before they count as far from them."""
FOLD_TOLERANCE = 1e-5
"""Largest relative error of a folded tower's features, in the arithmetic of its own weights."""
_BARE = 8  # bare matrices tried: a few near the root of the model
_LEAVES = 16  # layers tried from the last one back; the output layer is among the last few


@dataclass(frozen=True)
class RawNorms:
    """What the teacher's features measure.

    Attributes:
        image: Mean raw norm of image features.
        text: Mean raw norm of text features.
        logit_scale: The model's own factor on cosines.
    """

    image: float
    text: float
    logit_scale: float

    @property
    def canonical(self) -> float:
        """The norm at which raw dot products are the logit scale times a cosine."""
        return self.logit_scale**0.5

    @property
    def near_the_papers(self) -> bool:
        """Whether both norms are within a factor of 1.5 of the canonical one.

        >>> RawNorms(10.5, 10.1, 100.0).near_the_papers, RawNorms(16.2, 24.0, 100.0).near_the_papers
        (True, False)
        """
        ratios = (self.image / self.canonical, self.text / self.canonical)
        return all(1 / PAPER_RATIO <= ratio <= PAPER_RATIO for ratio in ratios)


class FeatureScale:
    """What a model's towers were multiplied by for training, until `undo`; 1 and 1 at first.

    Attributes:
        image_factor: Of the image tower's raw features.
        text_factor: Of the text tower's.
    """

    def __init__(self) -> None:
        self.image_factor = self.text_factor = 1.0
        self._layers: list[tuple[list[nn.Parameter], float]] = []

    @classmethod
    def canonical(
        cls, model: Any, pixels: Tensor, tokens: Tensor, norms: RawNorms
    ) -> "FeatureScale":
        """Rescale both output layers of `model`, in place, to the canonical norm.

        Args:
            model: A dual encoder and module, in evaluation mode.
            pixels: (B, 3, H, W), a few images, on the model's device.
            tokens: (B, L), a few texts.
            norms: Measured on as many features as is convenient.

        Raises:
            ModelError: A tower does not end in a layer that scales its features.
        """
        image, text = (lambda: model.encode_image(pixels)), (lambda: model.encode_text(tokens))
        image_layer = output_layer(model, image, "image", other=text)
        text_layer = output_layer(model, text, "text", other=image)
        scale = cls()
        scale.image_factor = norms.canonical / norms.image
        scale.text_factor = norms.canonical / norms.text
        scale._layers = [(image_layer, scale.image_factor), (text_layer, scale.text_factor)]
        for parameters, factor in scale._layers:
            _multiply(parameters, factor)
        return scale

    def gap(self, features: Any) -> Tensor:
        """(d,) from the image to the text centroid, of raw features before they were multiplied.

        Args:
            features: With `image_features` and `text_features`, (N, d) each.
        """
        image, text = features.image_features.mean(dim=0), features.text_features.mean(dim=0)
        return self.text_factor * text - self.image_factor * image

    def undo(self) -> None:
        """Give the output layers their own scale back, after training."""
        for parameters, factor in self._layers:
            _multiply(parameters, 1 / factor)
        self._layers = []
        self.image_factor = self.text_factor = 1.0


def output_layer(
    model: nn.Module,
    encode: Callable[[], Tensor],
    tower: str,
    *,
    other: Callable[[], Tensor] | None = None,
) -> list[nn.Parameter]:
    """The parameters that scale a tower's features: doubling them doubles every feature exactly.

    Found by trying the layers that the features depend on, from the last one back, so that any
    architecture will do, frozen or not; not those that the `other` tower's features depend on, too,
    since each tower gets a scale of its own. Leaves weights and gradients as they were.
    """
    used = {id(parameter) for parameter in used_parameters(model, encode)}
    if other is not None:
        used -= {id(parameter) for parameter in used_parameters(model, other)}
    with torch.no_grad():  # all through here: kernels may round differently with gradients
        features = encode()
        for parameters in _candidate_layers(model, used):
            _multiply(parameters, 2.0)
            doubled = torch.equal(encode(), 2 * features)
            _multiply(parameters, 0.5)
            if doubled:
                return parameters
    raise ModelError(
        f"the {tower} tower does not end in a layer of its own that scales its features, so they "
        "cannot be brought to the paper's norms. Pass --loss.feature-scale as-is."
    )


@dataclass(frozen=True)
class Head:
    """The linear layer that a tower ends in, as a function of what its trunk gives it."""

    layer: Sequence[Tensor]  # weight, and bias where there is one
    bare: bool  # a matrix P in x @ P, not an nn.Linear's

    def __call__(self, given: Tensor) -> Tensor:
        """(B, d_in) → (B, d)."""
        return given @ self.layer[0] if self.bare else functional.linear(given, *self.layer)

    def copied(self) -> "Head":
        """One with weights of its own, which are not trained."""
        return Head([weight.detach().clone() for weight in self.layer], self.bare)

    def nothing(self) -> list[Tensor]:
        """Weights with which a tower gives what its trunk does: the identity, no bias."""
        eye = torch.eye(self.layer[0].shape[0 if self.bare else 1]).to(self.layer[0])
        return [eye, *(torch.zeros_like(eye[0]) for _ in self.layer[1:])]


WIDEST_TRUNK = 16_384
"""Features below a head; an identity of them is tried in its place, of 1 GiB at that width."""

Heads = tuple[Head, Head]
"""Of images and of texts."""


@torch.no_grad()
def find_head(layer: list[nn.Parameter], encode: Callable[[], Tensor]) -> Head | None:
    """What an `output_layer` does; None where it is no matrix or something comes behind it."""
    generator, dim = torch.Generator().manual_seed(0), encode().shape[-1]
    # with its own weights, a symmetric matrix would not tell rows from columns
    drawn = [torch.randn(p.shape, generator=generator).to(p) for p in layer]
    for bare in (False, True):
        if layer[0].ndim != 2 or layer[0].shape[bare] != dim or len(layer) > 2 - bare:
            continue
        if layer[0].shape[1 - bare] > WIDEST_TRUNK:
            continue
        head = Head(layer, bare)
        trunk, found = (_encoded_with(layer, w, encode) for w in (head.nothing(), drawn))
        if trunk is None or found is None or trunk.shape[-1] != layer[0].shape[1 - bare]:
            continue
        if (found - Head(drawn, bare)(trunk)).norm() <= FOLD_TOLERANCE * found.norm():
            return head
    return None


def _encoded_with(
    layer: list[nn.Parameter], weights: list[Tensor], encode: Callable[[], Tensor]
) -> Tensor | None:
    """Features with other weights in a layer; None where the model does not take their shape."""
    own = [parameter.data for parameter in layer]
    try:
        for parameter, other in zip(layer, weights, strict=True):
            parameter.data = other
        return encode()
    except Exception:  # whatever a model of one's own says to that
        return None
    finally:
        for parameter, weight in zip(layer, own, strict=True):
            parameter.data = weight


def used_parameters(model: nn.Module, encode: Callable[[], Tensor]) -> list[nn.Parameter]:
    """The parameters that features depend on, whether or not they are trained."""
    every = [parameter for parameter in model.parameters() if parameter.is_floating_point()]
    before = [parameter.requires_grad for parameter in every]
    try:
        for parameter in every:
            parameter.requires_grad_(True)
        with torch.enable_grad():
            gradients = torch.autograd.grad(encode().sum(), every, allow_unused=True)
    finally:
        for parameter, trained in zip(every, before, strict=True):
            parameter.requires_grad_(trained)
    return [p for p, gradient in zip(every, gradients, strict=True) if gradient is not None]


def _candidate_layers(model: nn.Module, used: set[int]) -> Iterator[list[nn.Parameter]]:
    """Bare matrices of composite modules, shallow ones first, then leaf modules, last ones first.

    A projection that is a bare parameter belongs to the tower itself or to the model, and comes
    before the norm in front of it, which would scale the features, too.
    """
    owners = [(name, m) for name, m in model.named_modules() if list(m.parameters(recurse=False))]
    others = [(name.count("."), m) for name, m in owners if list(m.children())]
    bare = [
        [parameter]
        for _, module in sorted(others, key=lambda pair: pair[0])
        for parameter in module.parameters(recurse=False)
        if parameter.ndim >= 2 and id(parameter) in used
    ]
    leaves = [m for _, m in reversed(owners) if not list(m.children())]
    layers = [list(leaf.parameters(recurse=False)) for leaf in leaves]
    yield from bare[:_BARE]
    yield from [layer for layer in layers if id(layer[0]) in used][:_LEAVES]


# --------------------------------------------------------------------------------------------------
# The mean of a tower's features folded out of its output layer.


def fold_matrix(mean: Tensor, share: float = 1.0) -> Tensor:
    """W = I − share · m mᵀ / ‖m‖²: (d, d) in float64, symmetric, a projection at share 1.

    Features have a nearly constant part along their mean m, so that W takes the mean off almost
    exactly, as a linear map without bias: unit(W·k·z) = unit(W·z), so it may be fitted on unit
    features and holds for raw ones. Subtracting the mean itself cannot be put into weights, since
    the normalisation stands between (docs/method.md).

    >>> fold_matrix(torch.tensor([3.0, 4.0])) @ torch.tensor([3.0, 4.0], dtype=torch.float64)
    tensor([0., 0.], dtype=torch.float64)
    """
    mean = mean.double()
    squared = float(mean.square().sum())
    if not 0 < squared < float("inf"):
        raise ValueError(f"the mean feature has the squared norm {squared}, so it has no direction")
    identity = torch.eye(len(mean), dtype=torch.float64, device=mean.device)
    return identity - share * torch.outer(mean, mean) / squared


def fold_towers(
    model: Any, pixels: Tensor, tokens: Tensor, image_fold: Tensor, text_fold: Tensor
) -> None:
    """Put (d, d) maps into both towers' output layers, checked on a sample on their device."""
    image, text = (lambda: model.encode_image(pixels)), (lambda: model.encode_text(tokens))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    try:
        _fold(model, image, "image", text, image_fold)
        _fold(model, text, "text", image, text_fold)
    except ModelError:
        model.load_state_dict(before)
        raise


@torch.no_grad()
def _fold(
    model: nn.Module,
    encode: Callable[[], Tensor],
    tower: str,
    other: Callable[[], Tensor],
    fold: Tensor,
) -> None:
    features = encode().double()
    if tuple(fold.shape) != (features.shape[1],) * 2:
        raise ModelError(
            f"the {tower} tower's features have dimension {features.shape[1]}, but the map is "
            f"{tuple(fold.shape)}. It belongs to another model."
        )
    what_works = (
        "What works: `vectors refine` and `vectors apply` on stored vectors, and the same map on "
        "each query's; `fold` and `vectors fold` add a layer where an open_clip folder holds one."
    )
    try:
        layer = output_layer(model, encode, tower, other=other)
    except ModelError as error:
        raise ModelError(
            f"the {tower} tower does not end in a linear layer of its own: a residual, a norm or a "
            "layer that both towers share makes its features, and no weights can hold the map. "
            f"{what_works}"
        ) from error
    before = [parameter.clone() for parameter in layer]
    wide = fold.to(features)
    expected = features @ wide.T
    # the features' dimensions are a weight's rows (nn.Linear) or its columns (x @ P)
    for transposed in (False, True):
        for parameter, old in zip(layer, before, strict=True):
            if old.ndim not in (1, 2) or old.shape[-1 if transposed else 0] != len(fold):
                break
            columns = transposed and old.ndim == 2
            parameter.copy_(old.double() @ wide.T if columns else wide @ old.double())
        else:
            error = (encode().double() - expected).norm(dim=1) / features.norm(dim=1)
            if float(error.max()) <= FOLD_TOLERANCE:
                return
        for parameter, old in zip(layer, before, strict=True):
            parameter.copy_(old)
    raise ModelError(
        f"the {tower} tower's last layer, {' and '.join(str(tuple(p.shape)) for p in layer)}, does "
        f"not take the map: it is no linear layer. {what_works}"
    )


@torch.no_grad()
def output_projection(
    model: nn.Module, encode: Callable[[], Tensor], tower: str, *, other: Callable[[], Tensor]
) -> Tensor:
    """P (d, d_in) of a tower that ends in P h + b; a ModelError where no layer of its own does."""
    layer = output_layer(model, encode, tower, other=other)
    weight = next((parameter for parameter in layer if parameter.ndim == 2), None)
    expected = encode().clone()
    expected[:, 0] *= 2
    # the features' dimensions are a weight's rows (nn.Linear) or its columns (x @ P)
    for rows in () if weight is None else (weight, weight.T):
        if len(rows) != expected.shape[1]:
            continue
        first = [rows[0], *(parameter[:1] for parameter in layer if parameter.ndim == 1)]
        for numbers in first:
            numbers.mul_(2)
        found = torch.equal(encode(), expected)
        for numbers in first:
            numbers.mul_(0.5)
        if found:
            return rows.clone()
    raise ModelError(f"the {tower} tower's last layer is no linear layer, so it has no projection.")


def fitted_logit_scale(
    student: tuple[Tensor, Tensor], teacher: tuple[Tensor, Tensor], teacher_scale: float
) -> float:
    """The s at which the student's softmax is nearest to the teacher's, both directions.

    argmin over s of the cross-entropy of softmax(s·x yᵀ) to softmax(teacher_scale·x yᵀ), to 1 %.
    Cosines of centred features spread more widely than those of the model they come from, so the
    model's own scale would be too sharp for them.
    """
    cosines, known = (
        functional.normalize(images.double(), dim=1) @ functional.normalize(texts.double(), dim=1).T
        for images, texts in (student, teacher)
    )
    targets = [(teacher_scale * side).softmax(dim=1) for side in (known, known.T)]

    def cross_entropy(log_scale: float) -> float:
        logits = math.exp(log_scale) * cosines
        return -sum(
            float((target * side.log_softmax(dim=1)).sum(dim=1).mean())
            for target, side in zip(targets, (logits, logits.T), strict=True)
        )

    # CLIP-like models have scales from 10 to 120
    found = minimize_scalar(
        cross_entropy,
        bounds=(0.0, math.log(1000.0)),
        method="bounded",
        options={"xatol": 0.005},  # 0.5 % of s
    )
    return math.exp(found.x)


@torch.no_grad()
def set_logit_scale(model: Any, scale: float) -> None:
    """Make `scale` the model's own factor on cosines, as parameter or as its logarithm."""
    own = float(model.logit_scale)
    single = [(n, p) for n, p in model.named_parameters() if p.numel() == 1]
    # one called logit_scale first, should another number be the same by chance
    single.sort(key=lambda named: not named[0].endswith("logit_scale"))
    for _, parameter in single:
        if math.isclose(float(parameter.exp()), own, rel_tol=1e-4):
            parameter.fill_(math.log(scale))
            return
        if math.isclose(float(parameter), own, rel_tol=1e-4):
            parameter.fill_(scale)
            return
    raise ModelError(
        f"{type(model).__name__} has no parameter from which its logit_scale {own:.4g} "
        f"follows, so the fitted scale {scale:.4g} cannot be kept in it."
    )


@torch.no_grad()
def _multiply(parameters: list[nn.Parameter], factor: float) -> None:
    for parameter in parameters:
        parameter.mul_(factor)


# --------------------------------------------------------------------------------------------------
# A point on the line between two models' weights.
#
# Source: Wortsman et al., "Robust fine-tuning of zero-shot models" (WiSE-FT), CVPR 2022, arXiv
# 2109.01903.


def interpolate_weights(
    base: Mapping[str, Tensor], refined: Mapping[str, Tensor], weight: float
) -> dict[str, Tensor]:
    """(1 − weight)·base + weight·refined, computed in float32 at least."""
    if not 0 <= weight <= 1:
        raise ValueError(f"weight must be from 0 to 1, got {weight}")
    shapes = [{name: tensor.shape for name, tensor in side.items()} for side in (base, refined)]
    if shapes[0] != shapes[1]:
        names = [name for name in {**base, **refined} if shapes[0].get(name) != shapes[1].get(name)]
        raise ModelError(
            f"the two models are not of one architecture: {len(names)} weights differ in name or "
            f"shape, the first is {names[0]}."
        )
    mixed = {}
    for name, after in refined.items():
        before = base[name].to(after.device)
        if not (after.isfinite().all() and before.isfinite().all()):
            raise ModelError(
                f"{name}: weights that are not finite, so there is no line between the two models. "
                "Load them again, or choose another checkpoint."
            )
        if not after.is_floating_point() or weight == 1:
            mixed[name] = after.clone()
        elif weight == 0:
            mixed[name] = before.clone()
        else:
            wide = torch.promote_types(after.dtype, torch.float32)
            mixed[name] = torch.lerp(before.to(wide), after.to(wide), weight).to(after.dtype)
    return mixed
