"""bf16 on a CPU: faster ways through attention and patches are the same functions."""

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from clip_refine.models import OpenClipEncoder, Teacher
from clip_refine.models.encoder import quick_on_cpu
from clip_refine.train.towers import autocast

CPU = torch.device("cpu")


class Called(TorchDispatchMode):
    """Counts the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        self.count[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def gradients(model: OpenClipEncoder, *, bf16: bool) -> tuple[list[Tensor], list[Tensor]]:
    """Features of a few pairs, and the weights' gradients of what they are far from."""
    generator = torch.Generator().manual_seed(0)
    size = model.clip.visual.image_size[0]
    pixels = torch.randn(4, 3, size, size, generator=generator)
    tokens = model.tokenizer(["a red circle", "two", "a photo of a blue square", "one"])
    model.zero_grad()
    with autocast(bf16, CPU):
        features = [model.encode_image(pixels).float(), model.encode_text(tokens).float()]
    (features[0] * features[1].detach() - features[1].square()).sum().backward()
    found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    return [side.detach() for side in features], found


def distance(some: list[Tensor], others: list[Tensor]) -> float:
    """Of all numbers together, as a share of the others' length."""
    a, b = (torch.cat([side.flatten() for side in sides]).double() for sides in (some, others))
    return float((a - b).norm() / b.norm())


def test_float32_stays_as_it_is_bit_by_bit(tiny: OpenClipEncoder):
    plain = gradients(tiny, bf16=False)
    undo = quick_on_cpu(tiny)
    quick = gradients(tiny, bf16=False)
    undo()
    for before, after in zip(plain, quick, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert not any("forward" in vars(module) for module in tiny.modules())


def test_bf16_is_as_near_to_float32_as_pytorchs_own_kernels(tiny: OpenClipEncoder):
    exact, plain = gradients(tiny, bf16=False), gradients(tiny, bf16=True)
    quick_on_cpu(tiny)
    quick = gradients(tiny, bf16=True)
    for truth, theirs, ours in zip(exact, plain, quick, strict=True):
        assert 0 < distance(ours, truth) < 1.2 * distance(theirs, truth)
        assert distance(ours, theirs) < 0.02


@pytest.mark.parametrize("teacher", [False, True])
def test_the_slow_kernels_are_not_called(tiny: OpenClipEncoder, *, teacher: bool):
    with Called() as plain:
        gradients(tiny, bf16=True)
    assert plain.count["convolution_backward"] == 1
    model: Any = Teacher(tiny) if teacher else tiny
    if not teacher:
        quick_on_cpu(tiny)
    size = tiny.clip.visual.image_size[0]
    with Called() as quick, autocast(enabled=True, device=CPU):
        if teacher:
            model.encode_image(torch.zeros(2, 3, size, size))
        else:
            gradients(tiny, bf16=True)
    slow = [name for name in quick.count if "convolution" in name or "flash" in name]
    assert not slow


def test_what_it_does_not_know_goes_pytorchs_way():
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    theirs = copy.deepcopy(attention)
    undo = quick_on_cpu(nn.ModuleList([attention]))
    query, other = torch.randn(2, 3, 8), torch.randn(2, 5, 8)
    hidden = torch.tensor([[False, True, False]] * 2)
    with autocast(enabled=True, device=CPU):
        for arguments, named in (
            ((query, other, other), {"need_weights": False}),
            ((query, query, query), {}),
            ((query, query, query), {"key_padding_mask": hidden, "need_weights": False}),
        ):
            torch.testing.assert_close(attention(*arguments, **named), theirs(*arguments, **named))
    undo()


def test_convolutional_towers_get_their_pixels_channels_last():
    torch.manual_seed(0)
    convolutions = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.GELU(), nn.Conv2d(8, 8, 3, groups=8))
    pixels = torch.randn(2, 3, 16, 16)
    expected = convolutions(pixels)
    undo = quick_on_cpu(convolutions)
    found = convolutions(pixels)
    undo()
    assert found.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(found, expected)
    assert convolutions(pixels).is_contiguous()
