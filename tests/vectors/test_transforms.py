"""Every peer against a loop over floats, by hand, and by what must hold for any features."""

import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from clip_refine.vectors.transforms import (
    Chain,
    DistributionNormalisation,
    Fold,
    MeanCentring,
    ModalityShift,
    NearestNeighbourNormalisation,
    Peer,
    ReAlign,
    Standardisation,
)
from tests.reference import vectors as reference
from tests.vectors.cases import DIM, FITS, drawn, image_bias, rotation, text_bias, unit

every_peer = pytest.mark.parametrize("name", FITS)


def listed(*features: Tensor) -> list[list[list[float]]]:
    return [unit(matrix).tolist() for matrix in features]


def matrix(rows: list[list[float]]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


class TestAgainstLoops:
    image, text = drawn(0, 5, 7)
    fitted = drawn(1, 9, 11)

    def test_mean_centring(self):
        expected = reference.mean_centring(*listed(self.image, self.text, *self.fitted))
        found = MeanCentring.fit(*self.fitted).similarity(self.image, self.text)
        assert_close(found, matrix(expected), rtol=0, atol=1e-14)

    def test_distribution_normalisation(self):
        expected = reference.distribution_normalisation(
            *listed(self.image, self.text, *self.fitted)
        )
        found = DistributionNormalisation.fit(*self.fitted).similarity(self.image, self.text)
        assert_close(found, matrix(expected), rtol=0, atol=1e-14)

    @pytest.mark.parametrize("strength", [0.3, 1.0, -0.5])
    def test_modality_shift(self, strength: float):
        expected = reference.modality_shift(*listed(self.image, self.text, *self.fitted), strength)
        peer = ModalityShift.fit(*self.fitted, strength=strength)
        assert_close(peer.similarity(self.image, self.text), matrix(expected), rtol=0, atol=1e-14)

    @pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
    def test_fold(self, share: float):
        expected = reference.fold(*listed(self.image, self.text, *self.fitted), share)
        peer = Fold.fit(*self.fitted, share=share)
        assert_close(peer.similarity(self.image, self.text), matrix(expected), rtol=0, atol=1e-14)

    def test_standardise(self):
        expected = reference.standardise(*listed(self.image, self.text, *self.fitted))
        found = Standardisation.fit(*self.fitted).similarity(self.image, self.text)
        assert_close(found, matrix(expected), rtol=0, atol=1e-13)

    def test_realign(self):
        expected = reference.realign(*listed(self.image, self.text, *self.fitted))
        found = ReAlign.fit(*self.fitted).similarity(self.image, self.text)
        assert_close(found, matrix(expected), rtol=0, atol=1e-14)

    @pytest.mark.parametrize("neighbours", [1, 4, 10, 128])
    def test_nnn_in_both_directions(self, neighbours: int):
        image, text, image_references, text_references = listed(self.image, self.text, *self.fitted)
        peer = NearestNeighbourNormalisation.fit(*self.fitted, neighbours=neighbours, alpha=0.75)
        found = peer.similarity(self.image, self.text)
        image_to_text = reference.image_to_text_nnn(image, text, image_references, neighbours, 0.75)
        assert_close(
            found + image_bias(peer, self.image)[:, None], matrix(image_to_text), rtol=0, atol=1e-14
        )
        text_to_image = reference.text_to_image_nnn(image, text, text_references, neighbours, 0.75)
        assert_close(found + text_bias(peer, self.text), matrix(text_to_image), rtol=0, atol=1e-14)
        assert torch.equal(found.argsort(dim=1), matrix(image_to_text).argsort(dim=1))
        assert torch.equal(found.argsort(dim=0), matrix(text_to_image).argsort(dim=0))

    def test_chain(self):
        image, text, fitted_image, fitted_text = listed(self.image, self.text, *self.fitted)
        centred = reference.mean_centring(image, text, fitted_image, fitted_text)
        middle_image, middle_text = (
            reference.centroid(fitted_image),
            reference.centroid(fitted_text),
        )
        references = reference.unit(reference.less(fitted_image, middle_image, 1))
        moved = reference.unit(reference.less(text, middle_text, 1))
        expected = [
            [
                score - reference.bias(item, references, 3, 0.6)
                for score, item in zip(row, moved, strict=True)
            ]
            for row in centred
        ]
        found = FITS["mean-centring+nnn"](*self.fitted).similarity(self.image, self.text)
        difference = found - matrix(expected)
        assert_close(difference, difference[:, :1].expand_as(found), rtol=0, atol=1e-14)


class TestByHand:
    """Images at 0° and 90° in the plane, all texts at 90°."""

    image, text = torch.eye(2), torch.tensor([[0.0, 1.0], [0.0, 4.0]])

    def test_distribution_normalisation(self):
        # means (½, ½) and (0, 1): (¾, −¼)·(0, ½) and (−¼, ¾)·(0, ½)
        found = DistributionNormalisation.fit(self.image, self.text).similarity(
            self.image, self.text[:1]
        )
        assert found.tolist() == [[-0.125], [0.375]]

    def test_modality_shift(self):
        # Δ = (½, −½): the text goes to (¼, ¾)
        peer = ModalityShift.fit(self.image, self.text)
        expected = torch.tensor([[1.0, 3.0]]) / math.sqrt(10)
        assert_close(peer.transform_text(self.text[:1]), expected)

    def test_nnn(self):
        # the text's nearest image scores 1, the images' nearest texts 0 and 1
        peer = NearestNeighbourNormalisation.fit(self.image, self.text, neighbours=1, alpha=0.5)
        assert text_bias(peer, self.text).tolist() == [0.5, 0.5]
        assert image_bias(peer, self.image).tolist() == [0.0, 0.5]
        assert peer.transform_image(self.image).tolist() == [[1, 0, 0, 1], [0, 1, -0.5, 1]]
        assert peer.similarity(self.image, self.text[:1]).tolist() == [[-0.5], [0.0]]


class TestProperties:
    @every_peer
    def test_the_order_fitted_on_does_not_matter(self, name: str):
        fitted, shown = drawn(2, 8, 8), drawn(3, 4, 5)
        order = torch.randperm(8, generator=torch.Generator().manual_seed(0))
        shuffled = FITS[name](fitted[0][order], fitted[1][order])
        assert_close(shuffled.similarity(*shown), FITS[name](*fitted).similarity(*shown))

    @every_peer
    def test_rows_are_transformed_alone_and_in_order(self, name: str):
        image, text = drawn(4, 600, 5)
        peer = FITS[name](*drawn(2, 8, 8))
        assert_close(peer.transform_image(image)[599:], peer.transform_image(image[599:]))
        assert_close(peer.transform_text(text.flip(0)), peer.transform_text(text).flip(0))

    @pytest.mark.parametrize(
        "name", sorted(set(FITS) - {"standardise"})
    )  # it is about each dimension
    def test_a_rotation_of_the_space_changes_no_score(self, name: str):
        fitted, shown, turn = drawn(2, 8, 8), drawn(3, 4, 5), rotation(0)
        turned = FITS[name](fitted[0] @ turn, fitted[1] @ turn)
        found = turned.similarity(shown[0] @ turn, shown[1] @ turn)
        assert_close(found, FITS[name](*fitted).similarity(*shown))

    @every_peer
    def test_lengths_that_go_in_do_not_matter(self, name: str):
        fitted, shown = drawn(2, 8, 8), drawn(3, 4, 5)
        longer = FITS[name](3 * fitted[0], unit(fitted[1]))
        assert_close(
            longer.similarity(unit(shown[0]), 7 * shown[1]), FITS[name](*fitted).similarity(*shown)
        )

    @pytest.mark.parametrize("name", sorted(set(FITS) - {"realign"}))  # moves the texts alone
    def test_modalities_swapped_give_the_transposed_scores(self, name: str):
        fitted, shown = drawn(2, 8, 8), drawn(3, 4, 5)
        swapped = FITS[name](fitted[1], fitted[0]).similarity(shown[1], shown[0])
        assert_close(swapped.T, FITS[name](*fitted).similarity(*shown))

    @every_peer
    def test_what_it_says_of_itself(self, name: str):
        peer = FITS[name](*drawn(2, 8, 9))
        moved = peer.transform_image(drawn(3, 4, 5)[0])
        assert (peer.name, peer.dim, peer.fitted_on) == (name, DIM, (8, 9))
        assert moved.shape == (4, DIM + peer.score_columns)
        is_unit = torch.allclose(moved.norm(dim=1), torch.ones(4, dtype=torch.float64))
        assert peer.returns_unit == is_unit

    @pytest.mark.parametrize(
        "peer",
        [
            ModalityShift.fit(*drawn(2, 8, 8), strength=0),
            NearestNeighbourNormalisation.fit(*drawn(2, 8, 8), alpha=0),
            Fold.fit(*drawn(2, 8, 8), share=0),
            MeanCentring(torch.zeros(DIM), torch.zeros(DIM), 1, 1),
            DistributionNormalisation(torch.zeros(DIM), torch.zeros(DIM), 1, 1),
        ],
        ids=lambda peer: peer.kind,
    )
    def test_nothing_to_correct_leaves_the_cosine(self, peer: Peer):
        image, text = drawn(3, 4, 5)
        assert_close(peer.similarity(image, text), unit(image) @ unit(text).T)

    def test_centring_own_features_leaves_a_small_gap(self):
        image, text = drawn(2, 200, 200)
        before = (unit(image).mean(0) - unit(text).mean(0)).norm()
        for peer in (MeanCentring.fit(image, text), ModalityShift.fit(image, text)):
            means = peer.transform_image(image).mean(0), peer.transform_text(text).mean(0)
            assert (means[0] - means[1]).norm() < 0.15 * before

    def test_a_fold_is_a_projection(self):
        peer = Fold.fit(*drawn(2, 200, 200, torch.float32))
        for modality, mean in (("image", peer.image_mean), ("text", peer.text_mean)):
            fold = peer.matrix(modality)
            assert fold.dtype == torch.float64
            assert_close(fold @ mean, torch.zeros_like(mean), rtol=0, atol=1e-15)
            assert_close(fold @ fold, fold, rtol=0, atol=1e-15)

    def test_a_fold_does_to_raw_features_what_it_does_to_unit_ones(self):
        """unit(W·k·z) = unit(W·z), so it may be fitted on unit ones and stand in the layer."""
        peer, (image, _) = Fold.fit(*drawn(2, 8, 8)), drawn(3, 4, 5)
        assert_close(unit(image @ peer.matrix("image").T), peer.transform_image(unit(image)))

    def test_nearly_constant_along_the_mean_a_fold_is_mean_centring(self):
        """The fitted images' mean is (4, 0, …)/‖·‖ exactly, so both leave what is beside it."""
        rows = torch.cat([torch.eye(5), -torch.eye(5)]).double()
        image = torch.cat([4 * torch.ones(10, 1).double(), rows], dim=1)
        assert_close(
            Fold.fit(image, image).transform_image(image),
            MeanCentring.fit(image, image).transform_image(image),
        )

    def test_a_dimension_that_does_not_vary_is_only_centred(self):
        image = torch.tensor([[3.0, 4.0, 0.0], [4.0, 3.0, 0.0]])
        peer = Standardisation.fit(image, image)
        assert_close(peer.image_deviation, torch.tensor([0.1, 0.1, 1.0]))

    def test_realigned_texts_have_the_mean_and_the_variance_of_the_images(self):
        image, text = drawn(2, 300, 200)
        peer = ReAlign.fit(image, text[:, [1, 0, 2, 3, 4, 5]] + torch.tensor([3, 0, 0, 0, 0, 0]))
        assert torch.equal(peer.transform_image(image), unit(image))
        moved = peer.transform_text(text[:, [1, 0, 2, 3, 4, 5]] + torch.tensor([3, 0, 0, 0, 0, 0]))
        assert (moved.mean(0) - unit(image).mean(0)).norm() < 0.02
        assert_close(moved.var(0).sum(), unit(image).var(0).sum(), rtol=0.02, atol=0)
        assert peer.scale > 1.1

    def test_distribution_normalisation_is_a_bias_of_the_gallery(self):
        (image, text), peer = drawn(3, 4, 5), DistributionNormalisation.fit(*drawn(2, 8, 8))
        difference = peer.similarity(image, text) - unit(image) @ unit(text).T
        of_text = -(unit(text) @ peer.image_mean) / 2
        of_image = -(unit(image) @ peer.text_mean) / 2
        constant = peer.image_mean @ peer.text_mean / 4
        assert_close(difference, of_image[:, None] + of_text + constant)


class TestPrecision:
    @every_peer
    def test_float64_stays_and_less_is_widened(self, name: str):
        peer = FITS[name](*drawn(2, 8, 8))
        expected = peer.similarity(*drawn(3, 4, 5))
        assert expected.dtype == torch.float64
        for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 0.02)):
            narrow = FITS[name](*drawn(2, 8, 8, dtype))
            found = narrow.similarity(*drawn(3, 4, 5, dtype))
            assert found.dtype == torch.float32
            assert_close(found.double(), expected, rtol=0, atol=tolerance)

    @every_peer
    def test_autocast_does_not_reach_the_scores(self, name: str):
        shown = drawn(3, 4, 5, torch.float32)
        expected = FITS[name](*drawn(2, 8, 8, torch.float32)).similarity(*shown)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = FITS[name](*drawn(2, 8, 8, torch.float32)).similarity(*shown)
        assert torch.equal(found, expected)

    @every_peer
    def test_features_are_left_alone(self, name: str):
        fitted, shown = drawn(2, 8, 8), drawn(3, 4, 5)
        FITS[name](*fitted).similarity(*shown)
        assert_close((fitted, shown), (drawn(2, 8, 8), drawn(3, 4, 5)), rtol=0, atol=0)


class TestRefusals:
    @every_peer
    @pytest.mark.parametrize(
        ("bad", "message"),
        [
            (torch.ones(3), r"image features must be \(rows, dim\) of floating point"),
            (torch.ones(0, DIM), "both at least 1"),
            (torch.ones(2, DIM, dtype=torch.int64), "got .* of torch.int64"),
            (torch.ones(2, DIM).index_fill(0, torch.tensor(1), torch.nan), "row 1 is not finite"),
            (torch.ones(2, DIM).index_fill(0, torch.tensor(0), 0), "row 0 is zero"),
        ],
        ids=["vector", "empty", "whole", "nan", "zero"],
    )
    def test_bad_features(self, name: str, bad: Tensor, message: str):
        with pytest.raises(ValueError, match=message):
            FITS[name](bad, drawn(2, 8, 8)[1])
        with pytest.raises(ValueError, match=message):
            FITS[name](*drawn(2, 8, 8)).transform_image(bad)

    @every_peer
    def test_another_dimension(self, name: str):
        with pytest.raises(ValueError, match="text features must have dimension 6, got 5"):
            FITS[name](drawn(2, 8, 8)[0], torch.ones(8, 5))
        with pytest.raises(ValueError, match="text features must have dimension 6, got 5"):
            FITS[name](*drawn(2, 8, 8)).transform_text(torch.ones(8, 5))

    def test_a_feature_at_the_mean(self):
        one = torch.ones(1, DIM)
        with pytest.raises(ValueError, match="image features less their mean: row 0 is zero"):
            MeanCentring.fit(one, one).transform_image(one)

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"neighbours": 0}, "neighbours must be a whole number of at least 1, got 0"),
            ({"alpha": -1}, "alpha must be at least 0 and finite, got -1"),
            ({"alpha": math.nan}, "alpha must be at least 0 and finite, got nan"),
        ],
        ids=str,
    )
    def test_nnn_out_of_range(self, settings: dict, message: str):
        with pytest.raises(ValueError, match=message):
            NearestNeighbourNormalisation.fit(*drawn(2, 8, 8), **settings)

    def test_shift_out_of_range(self):
        with pytest.raises(ValueError, match="strength must be finite, got inf"):
            ModalityShift.fit(*drawn(2, 8, 8), strength=math.inf)

    def test_nothing_to_realign(self):
        with pytest.raises(ValueError, match="all text features, are one: none vary"):
            ReAlign.fit(drawn(2, 8, 8)[0], torch.ones(3, DIM))

    def test_no_fold(self):
        with pytest.raises(ValueError, match=r"share must be from 0 to 1, got 1\.5"):
            Fold.fit(*drawn(2, 8, 8), share=1.5)
        opposite = torch.cat([torch.eye(3), -torch.eye(3)])
        with pytest.raises(ValueError, match="image_mean is zero, so there is no direction"):
            Fold.fit(opposite, opposite)

    @pytest.mark.parametrize("first", ["nnn", "distribution-normalisation"])
    def test_a_step_after_lengths_that_mean_something(self, first: str):
        with pytest.raises(ValueError, match=f"{first} must be the last step of a chain"):
            Chain.fit(*drawn(2, 8, 8), steps=[FITS[first], MeanCentring.fit])
        with pytest.raises(ValueError, match=f"{first} must be the last step of a chain"):
            Chain((FITS[first](*drawn(2, 8, 8)), MeanCentring.fit(*drawn(2, 8, 8))))

    def test_chains_that_cannot_be(self):
        with pytest.raises(ValueError, match="at least one step"):
            Chain.fit(*drawn(2, 8, 8), steps=[])
        narrow = MeanCentring.fit(torch.eye(2), torch.eye(2))
        with pytest.raises(ValueError, match=r"must have one dimension, got \[2, 6\]"):
            Chain((narrow, MeanCentring.fit(*drawn(2, 8, 8))))
