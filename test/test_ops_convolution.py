"""3x3 convolution and pointwise map against float64, torch's own and hand-worked values; what they serve."""

from functools import partial

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
    linear,
    pointwise,
    pointwise_composite,
    pointwise_input_gradient_composite,
    pointwise_weight_gradient_composite,
)

OPS = torch.ops.maskrcnn_benchmark
needs_kernel = pytest.mark.skipif(
    ops.kernel_in_use("conv3x3", "cpu") != "native",
    reason="no kernel for this processor, or MASKRCNN_KERNELS=composite",
)
needs_pointwise = pytest.mark.skipif(
    ops.kernel_in_use("pointwise", "cpu") != "native",
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


@pytest.mark.parametrize("function", [conv3x3, partial(conv3x3_composite, relu=False)])
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
    ours, direct = (
        gradients(conv3x3, x, weight, bias, grad),
        gradients(partial(conv3x3_composite, relu=False), x, weight, bias, grad),
    )
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


@pytest.mark.parametrize(("shape", "relu"), [((1, 32, 30, 30), True), ((1, 32, 8, 8), False)])
def test_opcheck(shape, relu):
    x, weight, bias, grad = problem(shape, 32, torch.float32)
    near = {"rtol": 1e-4, "atol": 1e-4}  # torch's own convolution rounds by the memory format it is given
    opcheck(OPS.conv3x3, (x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_(), relu), **near)
    opcheck(OPS.conv3x3_input_gradient, (grad, weight.detach()), **near)
    opcheck(OPS.conv3x3_weight_gradient, (grad, x.detach()), **near)


def test_gradient_composites():
    x, weight, bias, grad = problem((2, 5, 9, 8), 7, torch.float64)
    _, for_x, for_weight, _ = gradients(
        lambda *leaves: F.conv2d(*leaves, padding=1), x, weight.double(), bias.double(), grad
    )
    torch.testing.assert_close(conv3x3_input_gradient_composite(grad, weight), for_x, rtol=1e-6, atol=1e-6)
    for got, wanted in zip(conv3x3_weight_gradient_composite(grad, x), (for_weight, grad.sum((0, 2, 3)))):
        torch.testing.assert_close(got, wanted)


# ---- the ReLU that either may end in


@pytest.mark.parametrize("function", [conv3x3, pointwise])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_relu(function, dtype):
    """Of the result, and of its gradients; what is not a number stays so."""
    x, weight, bias, grad = problem((2, 64, 33, 35), 32, dtype)
    weight = weight if function is conv3x3 else weight[:, :, :1, :1]
    plain, relu = lambda *leaves: F.relu(function(*leaves)), partial(function, relu=True)
    for got, wanted in zip(gradients(relu, x, weight, bias, grad), gradients(plain, x, weight, bias, grad)):
        assert torch.equal(got, wanted)
    x[0, 0, 5, 5] = torch.nan
    assert function(x, weight, bias, relu=True)[0, :, 5, 5].isnan().all()


# ---- the pointwise map


def rows_and_weights(rows: int, inputs: int, outputs: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(rows, n, generator=generator).to(dtype) for n in (inputs, outputs))
    return x, torch.randn(outputs, inputs, generator=generator), torch.randn(outputs, generator=generator), grad


@settings(max_examples=40, deadline=None)
@given(
    rows=st.one_of(st.integers(1, 20), st.integers(1, 2600)),
    inputs=st.sampled_from([1, 32, 64, 576]),
    outputs=st.sampled_from([1, 20, 32, 544]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    weight_dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_pointwise_of_rows(rows, inputs, outputs, dtype, weight_dtype):
    """Against float64, within the roundings of the factors and of the result."""
    x, weight, bias, grad = rows_and_weights(rows, inputs, outputs, dtype)
    leaves = (x, weight.to(weight_dtype), bias)
    got = gradients(pointwise, *leaves, grad)
    assert [tensor.dtype for tensor in got] == [dtype, dtype, weight_dtype, torch.float32]
    double = [tensor.double() for tensor in (*leaves, grad)]
    scales = gradients(F.linear, *(tensor.abs() for tensor in double))
    for value, wanted, scale in zip(got, gradients(F.linear, *double), scales, strict=True):
        tolerance = max(TOLERANCE[dtype], TOLERANCE[value.dtype])
        assert (value.double() - wanted).abs().max() <= tolerance * scale.max()


def test_pointwise_by_hand():
    """Each output adds its own inputs: sums of 32 small integers are exact in bfloat16's products."""
    x = (torch.arange(40)[:, None] % 4 + torch.arange(32) % 2).bfloat16()  # row r: r % 4 and r % 4 + 1 in turns
    weight = torch.zeros(64, 32)
    weight[3], weight[40, 1::2] = 1, 2
    y = pointwise(x, weight, torch.full((64,), -8.0))
    assert y[5, [3, 40, 41]].tolist() == [16 * 1 + 16 * 2 - 8, 2 * 16 * 2 - 8, -8]
    assert y[36, [3, 40, 41]].tolist() == [16 - 8, 2 * 16 - 8, -8]


@needs_pointwise
def test_pointwise_of_maps_is_that_of_their_pixels():
    x = torch.randn(2, 64, 9, 13).bfloat16()
    weight, bias = torch.randn(96, 64, 1, 1), torch.randn(96)
    wanted = pointwise(x.permute(0, 2, 3, 1).reshape(-1, 64), weight[:, :, 0, 0], bias)
    for given_ in (x, x.contiguous(memory_format=torch.channels_last)):
        result = pointwise(given_, weight, bias)
        assert result.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(result.permute(0, 2, 3, 1).reshape(-1, 96), wanted)
    F.relu_(pointwise(x.requires_grad_(), weight.requires_grad_(), bias)).sum().backward()
    assert x.grad.shape == x.shape and weight.grad.shape == weight.shape


@needs_pointwise
def test_pointwise_is_the_same_in_any_number_of_threads():
    given_ = rows_and_weights(1500, 96, 256, torch.bfloat16)
    several = gradients(pointwise, *given_)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        alone = gradients(pointwise, *given_)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(several, alone))


def test_pointwise_of_nothing():
    x, weight, bias, grad = rows_and_weights(0, 32, 64, torch.bfloat16)
    result, for_x, for_weight, for_bias = gradients(pointwise, x, weight, bias, grad)
    assert result.shape == (0, 64) and for_x.shape == (0, 32) and not for_weight.any() and not for_bias.any()


@needs_pointwise
@pytest.mark.parametrize(
    ("dtype", "kernel", "options", "served"),
    [
        (torch.bfloat16, 1, {}, True),
        (torch.bfloat16, 1, {"stride": (2, 2)}, True),
        (torch.float32, 1, {}, False),
        (torch.bfloat16, 1, {"padding": (1, 1)}, False),
        (torch.bfloat16, 1, {"groups": 2}, False),
        (torch.bfloat16, 5, {}, False),
    ],
)
def test_conv2d_takes_pointwise_where_it_can(dtype, kernel, options, served):
    x = torch.randn(1, 64, 13, 12).to(dtype).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(64, 64 // options.get("groups", 1), kernel, kernel, dtype=dtype, requires_grad=True)
    result = conv2d(x, weight, None, **options)
    assert ("pointwise" in type(result.grad_fn).__name__) == served
    torch.testing.assert_close(result, F.conv2d(x, weight, None, **options), rtol=2e-2, atol=0.2)


def test_linear_follows_autocast():
    x, weight, bias, _ = rows_and_weights(50, 32, 64, torch.float32)
    assert torch.equal(linear(x, weight, bias, relu=True), F.relu(F.linear(x, weight, bias)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = linear(x, weight, bias)
    assert result.dtype == torch.bfloat16
    torch.testing.assert_close(result.float(), F.linear(x, weight, bias), rtol=2e-2, atol=0.2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input": torch.zeros(4, 32, 8)}, r"input must be \[R, C\] or \[B, C, H, W\]"),
        ({"weight": torch.zeros(8, 16)}, r"weight \[K, C\]"),
        ({"weight": torch.zeros(8, 32, 3, 3)}, r"weight \[K, C\]"),
        ({"bias": torch.zeros(9)}, r"bias must be \[K\] = \[8\], got \[9\]"),
    ],
)
def test_wrong_shapes_of_pointwise_are_named(change, message):
    arguments = {"input": torch.zeros(4, 32), "weight": torch.zeros(8, 32), "bias": torch.zeros(8)}
    with pytest.raises(ValueError, match=message):
        pointwise(**(arguments | change))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(40, 32), (2, 32, 5, 7)])
def test_opcheck_of_pointwise(shape, dtype):
    x = torch.randn(shape).to(dtype)
    x = x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x
    weight, bias, relu = torch.randn(64, 32), torch.randn(64), dtype == torch.float32
    grad = pointwise(x, weight, bias).detach()
    near = {"rtol": 2e-2, "atol": 1e-1} if dtype == torch.bfloat16 else {}
    addend = grad.clone().requires_grad_()
    opcheck(OPS.pointwise, (x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_(), addend, relu), **near)
    opcheck(OPS.pointwise_input_gradient, (grad, weight.detach()), **near)
    opcheck(OPS.pointwise_weight_gradient, (grad, x.detach()), **near)


@pytest.mark.parametrize("shape", [(11, 6), (2, 6, 5, 3)])
def test_composites_of_pointwise(shape):
    x, weight, bias = (torch.randn(n, dtype=torch.float64) for n in (shape, (8, 6), (8,)))
    by_torch = F.linear if len(shape) == 2 else lambda x, w, b: F.conv2d(x, w[..., None, None], b)
    grad = torch.randn_like(by_torch(x, weight, bias))
    result, for_x, for_weight, for_bias = gradients(by_torch, x, weight, bias, grad)
    torch.testing.assert_close(pointwise_composite(x, weight, bias, None, False), result)
    torch.testing.assert_close(pointwise_composite(x, weight, bias, grad, True), F.relu(result + grad))
    torch.testing.assert_close(pointwise_input_gradient_composite(grad, weight), for_x)
    torch.testing.assert_close(pointwise_weight_gradient_composite(grad, x), (for_weight, for_bias))
