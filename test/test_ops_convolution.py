"""The 3x3 convolution against float64, torch's direct one and hand-worked values; which convolutions it serves."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck

from maskrcnn_benchmark import ops
from maskrcnn_benchmark.ops.convolution import (
    conv2d,
    conv3x3,
    conv3x3_composite,
    conv3x3_input_gradient_composite,
    conv3x3_weight_gradient_composite,
)

OPS = torch.ops.maskrcnn_benchmark
needs_kernel = pytest.mark.skipif(
    ops.kernel_in_use("conv3x3", "cpu") != "native",
    reason="no kernel for this processor, or MASKRCNN_KERNELS=composite",
)
# Of the largest sum of magnitudes |x| |w|: eight roundings in float32; in bfloat16 those of the factors, of the
# transformed tiles and of the result.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2e-2}


def problem(shape, outputs: int, dtype: torch.dtype, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Input, weight, bias, gradient of the output; the input channels-last, weight and bias float32."""
    generator = torch.Generator().manual_seed(seed)
    batch, channels, height, width = shape
    x = torch.randn(shape, generator=generator).to(dtype).contiguous(memory_format=torch.channels_last)
    weight = torch.randn((outputs, channels, 3, 3), generator=generator)
    bias = torch.randn(outputs, generator=generator)
    return x, weight, bias, torch.randn((batch, outputs, height, width), generator=generator).to(dtype)


def gradients(function, x, weight, bias, grad) -> list[torch.Tensor]:
    """The result and the gradients of all three."""
    leaves = [tensor.clone().requires_grad_() for tensor in (x, weight, bias)]
    result = function(*leaves)
    return [result.detach(), *torch.autograd.grad(result, leaves, grad.to(result.dtype))]


def assert_close(got: list[torch.Tensor], x, weight, bias, grad) -> None:
    """To float64, within TOLERANCE of what each sum adds up."""
    direct = lambda *leaves: F.conv2d(*leaves, padding=1)  # noqa: E731
    double = [tensor.double() for tensor in (x, weight, bias, grad)]
    for value, wanted, scale in zip(
        got, gradients(direct, *double), gradients(direct, *(tensor.abs() for tensor in double)), strict=True
    ):
        assert (value.double() - wanted).abs().max() <= TOLERANCE[x.dtype] * scale.max()


@pytest.mark.parametrize("function", [conv3x3, conv3x3_composite])
def test_by_hand(function):
    """A single one in the input puts the flipped kernel around itself; ones count the pixels within reach."""
    x = torch.zeros(1, 32, 30, 29)
    x[0, 3, 7, 12] = 1
    weight = torch.zeros(32, 32, 3, 3)
    weight[5, 3] = torch.arange(1.0, 10).view(3, 3)
    y = function(x, weight, torch.full((32,), 0.5))
    assert y[0, 5, 6:9, 11:14].tolist() == [[9.5, 8.5, 7.5], [6.5, 5.5, 4.5], [3.5, 2.5, 1.5]]
    assert (y != 0.5).sum() == 9
    counts = function(torch.ones(1, 32, 30, 29), torch.ones(32, 32, 3, 3), None)[0, 0]
    assert (counts[0, 0], counts[0, 5], counts[29, 28], counts[7, 9]) == (4 * 32, 6 * 32, 4 * 32, 9 * 32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("shape", "outputs"),
    [((2, 32, 40, 52), 96), ((2, 96, 33, 31), 32), ((70, 64, 7, 8), 64), ((1, 64, 1, 900), 32), ((1, 32, 900, 1), 32)],
)
def test_result_and_gradients_are_those_of_float64(shape, outputs, dtype):
    given_ = problem(shape, outputs, dtype)
    got = gradients(conv3x3, *given_)
    assert [tensor.dtype for tensor in got] == [dtype, *[dtype], torch.float32, torch.float32]
    assert got[0].is_contiguous(memory_format=torch.channels_last)
    assert_close(got, *given_)


@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(1, 3),
    height=st.integers(1, 40),
    width=st.integers(1, 40),
    channels=st.sampled_from([1, 3, 16, 32, 64]),
    outputs=st.sampled_from([1, 20, 32, 96]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 100),
)
def test_any_shape(batch, height, width, channels, outputs, dtype, seed):
    given_ = problem((batch, channels, height, width), outputs, dtype, seed)
    assert_close(gradients(conv3x3, *given_), *given_)


def test_bfloat16_is_at_most_twice_as_far_off_as_a_direct_convolution():
    x, weight, bias, grad = problem((2, 128, 40, 40), 128, torch.bfloat16)
    exact = gradients(lambda *leaves: F.conv2d(*leaves, padding=1), *(t.double() for t in (x, weight, bias, grad)))
    ours, direct = gradients(conv3x3, x, weight, bias, grad), gradients(conv3x3_composite, x, weight, bias, grad)
    for mine, other, wanted in zip(ours[:2], direct[:2], exact[:2]):
        assert (mine.double() - wanted).square().mean().sqrt() <= 2 * (other.double() - wanted).square().mean().sqrt()
    # The composite returns the gradient of a bfloat16 copy of the weight; ours was never rounded to bfloat16.
    error = (ours[2].double() - exact[2]).square().mean().sqrt() / exact[2].square().mean().sqrt()
    assert error < 2**-7


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_number_of_threads_gives_the_same_bits(dtype):
    given_ = problem((2, 64, 45, 47), 64, dtype)
    several = gradients(conv3x3, *given_)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        alone = gradients(conv3x3, *given_)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(several[:3], alone[:3]))


@needs_kernel
def test_memory_formats_and_weights_of_lower_precision():
    x, weight, bias, grad = problem((2, 32, 30, 30), 64, torch.bfloat16)
    expected = gradients(conv3x3, x, weight.bfloat16(), bias.bfloat16(), grad)
    assert [tensor.dtype for tensor in expected] == [torch.bfloat16] * 4
    again = gradients(conv3x3, x.contiguous(), weight.bfloat16(), bias.bfloat16(), grad.contiguous())
    assert all(torch.equal(a, b) for a, b in zip(expected, again))
    assert torch.equal(conv3x3(x, weight.contiguous(memory_format=torch.channels_last), bias), conv3x3(x, weight, bias))


def test_only_what_is_wanted_is_computed():
    x, weight, _, grad = problem((1, 32, 30, 30), 32, torch.float32)
    weight.requires_grad_()
    result = conv3x3(x, weight, None)
    result.backward(grad)
    assert x.grad is None and weight.grad.shape == weight.shape
    assert conv3x3(x.detach(), weight.detach()).grad_fn is None


def test_empty_batch():
    x, weight, bias, grad = problem((0, 32, 14, 14), 64, torch.float32)
    assert [tuple(t.shape) for t in gradients(conv3x3, x, weight, bias, grad)] == [
        *((0, 64, 14, 14), (0, 32, 14, 14), (64, 32, 3, 3), (64,))
    ]
    F.relu_(conv3x3(x.requires_grad_(), weight.requires_grad_(), bias)).sum().backward()
    assert not weight.grad.any()


@needs_kernel
@pytest.mark.parametrize(
    ("kernel", "options", "served"),
    [
        (3, {"padding": (1, 1)}, True),
        (3, {"padding": (1, 1), "stride": (2, 2)}, False),
        (3, {"padding": (2, 2), "dilation": (2, 2)}, False),
        (3, {"padding": (0, 0)}, False),
        (3, {"padding": (1, 1), "groups": 2}, False),
        (1, {}, False),
    ],
)
def test_conv2d_takes_the_kernel_where_it_can(kernel, options, served):
    x = torch.randn(1, 64, 32, 32).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(64, 64 // options.get("groups", 1), kernel, kernel, requires_grad=True)
    result = conv2d(x, weight, None, **options)
    assert ("conv3x3" in type(result.grad_fn).__name__) == served
    torch.testing.assert_close(result, F.conv2d(x, weight, None, **options), rtol=1e-4, atol=1e-3)


def test_autocast_chooses_the_precision():
    x, weight, bias, _ = problem((1, 32, 30, 30), 32, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert conv2d(x, weight, bias, padding=(1, 1)).dtype == torch.bfloat16
    assert conv2d(x, weight, bias, padding=(1, 1)).dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input": torch.zeros(32, 8, 8)}, r"input must be \[B, C, H, W\]"),
        ({"weight": torch.zeros(8, 16, 3, 3)}, r"weight \[K, C, 3, 3\]"),
        ({"weight": torch.zeros(8, 32, 1, 1)}, r"weight \[K, C, 3, 3\]"),
        ({"bias": torch.zeros(9)}, r"bias must be \[K\] = \[8\], got \[9\]"),
    ],
)
def test_wrong_shapes_are_named(change, message):
    arguments = {"input": torch.zeros(1, 32, 8, 8), "weight": torch.zeros(8, 32, 3, 3), "bias": torch.zeros(8)}
    with pytest.raises(ValueError, match=message):
        conv3x3(**(arguments | change))


@pytest.mark.parametrize("shape", [(1, 32, 30, 30), (1, 32, 8, 8)])
def test_opcheck(shape):
    x, weight, bias, grad = problem(shape, 32, torch.float32)
    near = {"rtol": 1e-4, "atol": 1e-4}  # torch's own convolution rounds by the memory format it is given
    opcheck(OPS.conv3x3, (x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()), **near)
    opcheck(OPS.conv3x3_input_gradient, (grad, weight.detach()), **near)
    opcheck(OPS.conv3x3_weight_gradient, (grad, x.detach()), **near)


def test_gradient_composites():
    x, weight, bias, grad = problem((2, 5, 9, 8), 7, torch.float64)
    _, for_x, for_weight, _ = gradients(
        lambda *leaves: F.conv2d(*leaves, padding=1), x, weight.double(), bias.double(), grad
    )
    torch.testing.assert_close(conv3x3_input_gradient_composite(grad, weight), for_x, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(conv3x3_weight_gradient_composite(grad, x), for_weight)
