"""What follows a convolution: by hand, against plain sums and ReLUs, alone and behind every kind of convolution."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from maskrcnn_benchmark.models.layers import FrozenBatchNorm2d, conv_norm
from maskrcnn_benchmark.ops.convolution import conv2d, pointwise
from maskrcnn_benchmark.ops.epilogue import epilogue_, epilogue_composite

OPS = torch.ops.maskrcnn_benchmark
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
FORMATS = [torch.contiguous_format, torch.channels_last]


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("memory_format", FORMATS)
def test_by_hand(memory_format):
    x = torch.tensor([[[[1.0, -2.0]], [[3.0, -4.0]]]]).contiguous(memory_format=memory_format)
    result = epilogue_(x, torch.tensor([0.5, -1.0]), torch.tensor([[[[-2.0, 4.0]], [[1.0, 5.5]]]]), relu=True)
    assert result.tolist() == [[[[0.0, 2.5]], [[3.0, 0.5]]]]
    assert result.data_ptr() == x.data_ptr() and x.tolist() == result.tolist()
    assert epilogue_(torch.tensor([[1.0, -2.0]]), torch.tensor([-3.0, 1.0])).tolist() == [[-2.0, -1.0]]
    assert epilogue_(torch.tensor([[torch.nan, -2.0]]), relu=True)[0, 0].isnan()


@settings(max_examples=60, deadline=None)
@given(
    shape=st.one_of(
        st.tuples(st.integers(0, 3), st.integers(1, 40), st.integers(1, 9), st.integers(1, 9)),
        st.tuples(st.integers(0, 70), st.integers(1, 40)),
    ),
    dtype=st.sampled_from(DTYPES),
    memory_format=st.sampled_from(FORMATS),
    biased=st.booleans(),
    added=st.booleans(),
    relu=st.booleans(),
)
def test_the_kernel_is_the_composite(shape, dtype, memory_format, biased, added, relu):
    """Bit for bit, and rounded once."""
    x, bias = draw(*shape, dtype=dtype), draw(shape[1], seed=1) if biased else None
    x = x.contiguous(memory_format=memory_format) if x.dim() == 4 else x
    addend = draw(*shape, seed=2, dtype=dtype) if added else None
    wanted = x.clone()
    epilogue_composite(wanted, bias, addend, relu)
    exact = x.double() + (0 if bias is None else bias.double().view(-1, *[1] * (x.dim() - 2)))
    exact = exact if addend is None else exact + addend.double()
    exact = exact.relu() if relu else exact
    assert torch.equal(epilogue_(x, bias, addend, relu), wanted)
    torch.testing.assert_close(x.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("shape", [(2, 6, 3, 5), (7, 6)])
def test_gradients(shape, relu):
    leaves = [draw(*n, seed=i, dtype=torch.float64).requires_grad_() for i, n in enumerate((shape, (6,), shape))]
    plain = lambda x, bias, addend: x + bias.view(-1, *[1] * (x.dim() - 2)) + addend  # noqa: E731
    ours = epilogue_(leaves[0] * 1, *leaves[1:], relu)
    theirs = plain(*leaves).relu() if relu else plain(*leaves)
    grad = draw(*shape, seed=9, dtype=torch.float64)
    for mine, wanted in zip(torch.autograd.grad(ours, leaves, grad), torch.autograd.grad(theirs, leaves, grad)):
        torch.testing.assert_close(mine, wanted)
    assert torch.autograd.gradcheck(lambda *x: epilogue_(x[0] * 1, *x[1:], relu), leaves)


def test_what_another_gradient_needs_is_not_overwritten_unnoticed():
    leaf = draw(2, 6).requires_grad_()
    result = epilogue_(leaf.exp(), draw(6), relu=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        result.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("channels", "kernel", "stride", "groups"),
    [(32, 3, 1, 1), (32, 3, 2, 1), (32, 1, 1, 1), (32, 1, 2, 1), (20, 1, 1, 1), (32, 3, 1, 4)],
)
@pytest.mark.parametrize("relu", [False, True])
def test_a_convolutions_addend(channels, kernel, stride, groups, dtype, relu):
    """Behind our kernels and torch's: the result and the gradients of all four."""
    x = draw(2, channels, 25, 23, dtype=dtype).contiguous(memory_format=torch.channels_last)
    weight, bias = draw(64, channels // groups, kernel, kernel, seed=1) / 8, draw(64, seed=2)
    options = ((stride, stride), (kernel // 2, kernel // 2), (1, 1), groups)
    shape = F.conv2d(x, weight.to(dtype), None, *options).shape
    addend, grad = draw(*shape, seed=3, dtype=dtype), draw(*shape, seed=4, dtype=dtype)
    # Ours takes float32 weights beside bfloat16 maps where a kernel serves, torch's only of one dtype
    leaves = [t.to(dtype).requires_grad_() for t in (x, weight, bias, addend)]
    ours = conv2d(leaves[0], leaves[1], leaves[2], *options, relu, leaves[3])
    double = [leaf.detach().double().requires_grad_() for leaf in leaves]
    theirs = F.conv2d(*double[:3], *options) + double[3]
    theirs = theirs * (ours > 0) if relu else theirs  # where rounding decides, ours does
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 5e-2}[dtype]
    torch.testing.assert_close(ours.double(), theirs, rtol=tolerance, atol=tolerance)
    wanted = torch.autograd.grad(theirs, double, grad.double())
    for mine, exact in zip(torch.autograd.grad(ours, leaves, grad), wanted, strict=True):
        assert (mine.double() - exact).abs().max() <= tolerance * exact.abs().max()


def test_a_block_keeps_its_shortcut():
    """The addend is another convolution's input: it must stay as it is."""
    conv, norm = nn.Conv2d(32, 32, 1, bias=False), FrozenBatchNorm2d(32)
    x = draw(1, 32, 9, 9)
    before = x.clone()
    result = conv_norm(x, conv, norm, relu=True, addend=x)
    assert torch.equal(x, before)
    torch.testing.assert_close(result, F.relu(norm(conv(x)) + x))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: epilogue_(torch.zeros(2, 3, 4)), r"input must be \[B, C, H, W\] or \[R, C\], got \[2, 3, 4\]"),
        (lambda: epilogue_(torch.zeros(4, 6)[:, ::2]), r"contiguous or channels-last, got strides \[6, 2\]"),
        (lambda: epilogue_(torch.zeros(2, 3), torch.zeros(2)), r"bias must be \[C\] = \[3\], got \[2\]"),
        (
            lambda: epilogue_(torch.zeros(2, 3), None, torch.zeros(3)),
            r"addend must be as input, \[2, 3\] torch.float32",
        ),
        (lambda: epilogue_(torch.zeros(2, 3), None, torch.zeros(2, 3).half()), r"got \[2, 3\] torch.float16"),
        (
            lambda: pointwise(torch.zeros(4, 32), torch.zeros(8, 32), addend=torch.zeros(4, 32)),
            r"pointwise: addend must be \[4, 8\] torch.float32, got \[4, 32\]",
        ),
    ],
)
def test_wrong_shapes_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_opcheck():
    for x in (draw(2, 6, 5, 4), draw(2, 6, 5, 4).contiguous(memory_format=torch.channels_last), draw(5, 6)):
        torch.library.opcheck(OPS.epilogue_, (x, draw(6), x.clone(), True))
