"""The bugs of earlier packages, each as a named test that their code would fail.

TQ torch_quantizer, TAO torchao, TQE torch_quant_ext, BDQ BladeDISC torch_quant, QSIM INT-FP-QSim, TORCH torch itself, LIB the CPU
libraries behind it.
"""

import pytest
import reference
import torch

import quant_ops as qo

ONE = torch.tensor(1.0)


def random_int8(*shape):
    return torch.randint(-128, 128, shape, dtype=torch.int8)


def conv(x, weight, **kwargs):
    return qo.int8_conv2d(x, weight, ONE, x_scale=ONE, **kwargs)


def test_tqe_scale_per_channel_is_not_taken_for_per_sample_when_n_equals_c():
    x, scale = torch.randn(4, 4, 3, 3), torch.rand(1, 4, 1, 1) + 0.05
    assert torch.equal(qo.quant_tensor_forward(x, scale, None, -128, 127), reference.quantize(x, scale, None, -128, 127, True))


def test_tqe_vector_scale_follows_broadcasting_not_element_count():
    x, scale = torch.randn(3, 5), torch.rand(5) + 0.05
    assert torch.equal(qo.quant_tensor_forward(x, scale, None, -128, 127), reference.quantize(x, scale, None, -128, 127, True))
    with pytest.raises(ValueError, match="broadcast"):
        qo.quant_tensor_forward(x, torch.rand(3), None, -128, 127)


def test_tqe_int32_zero_point_is_accepted_and_integer_output_is_an_integer_dtype():
    x = torch.randn(2, 3)
    q = qo.quant_tensor_forward(x, torch.tensor(0.1), torch.tensor([3], dtype=torch.int32), 0, 255, True, False)
    assert q.dtype == torch.uint8


def test_tqe_scale_over_several_dimensions_that_do_not_touch():
    x, scale = torch.randn(2, 3, 4, 5), torch.rand(1, 3, 1, 5) + 0.05
    assert torch.equal(qo.quant_tensor_forward(x, scale, None, -128, 127), reference.quantize(x, scale, None, -128, 127, True))


def test_tq_padding_of_height_and_width_are_not_swapped():
    y = conv(torch.randint(-9, 9, (1, 2, 5, 7), dtype=torch.int8), random_int8(3, 2, 1, 1), padding=(1, 2))
    assert y.shape == (1, 3, 7, 11)


def test_tq_padding_of_width_alone_is_kept():
    x, weight = random_int8(1, 2, 5, 7), random_int8(3, 2, 3, 3)
    expected = reference.conv_acc(x, weight, (1, 1), (0, 0, 1, 1), (1, 1), 1)
    assert torch.equal(conv(x, weight, padding=(0, 1)), expected.float())


def test_tq_dilation_counts_in_the_output_size():
    assert conv(random_int8(1, 1, 32, 32), random_int8(1, 1, 3, 3), dilation=2, padding=1).shape == (1, 1, 30, 30)


@pytest.mark.parametrize("groups", [2, 32, 64])
def test_tq_groups_are_not_run_as_a_dense_convolution(groups):
    x, weight = random_int8(2, 64, 6, 6), random_int8(64, 64 // groups, 3, 3)
    assert torch.equal(conv(x, weight, groups=groups), reference.conv_acc(x, weight, (1, 1), (0, 0, 0, 0), (1, 1), groups).float())


def test_tq_channels_need_not_be_multiples_of_anything():
    for c, o in [(1, 1), (3, 5), (31, 33)]:
        x, weight = random_int8(1, c, 4, 4), random_int8(o, c, 3, 3)
        assert torch.equal(conv(x, weight), reference.conv_acc(x, weight, (1, 1), (0, 0, 0, 0), (1, 1), 1).float())


@pytest.mark.parametrize("zero_point", [-128, -1, 127])
def test_tq_onednn_padding_is_the_zero_point_also_at_borders(zero_point):
    x, weight = random_int8(1, 16, 5, 5), random_int8(16, 16, 3, 3)
    expected = reference.conv_acc(x, weight, (1, 1), (2, 2, 2, 2), (1, 1), 1, zero_point)
    y = conv(x, weight, padding=2, x_zero_point=torch.tensor(zero_point))
    assert torch.equal(y, expected.float())


def test_tq_zero_point_correction_is_exact_beyond_float32():
    """zp * sum(w) passes 2^24: a correction in float32 loses units."""
    x, weight = torch.full((1, 4096), 127, dtype=torch.int8), torch.full((1, 4096), 127, dtype=torch.int8)
    weight[0, 0] = 126
    y = qo.int8_linear(x, weight, ONE, x_scale=ONE, x_zero_point=torch.tensor(-128))
    assert y.item() == float(torch.tensor(255 * (4096 * 127 - 1)).float())


def test_tq_relu_comes_after_the_bias():
    y = qo.int8_linear(random_int8(3, 8), random_int8(4, 8), ONE, torch.full((4,), 1e6), x_scale=ONE, relu=True)
    assert (y > 0).all()


def test_tq_half_inputs_are_quantized_in_float32():
    """fp16 division flips about one code in a hundred."""
    x = (torch.randn(100_000) * 3).half()
    q = qo.quant_tensor_forward(x, torch.tensor(0.0237), torch.tensor(5), -128, 127, True, False)
    assert torch.equal(q, (torch.round(x.float() / torch.tensor(0.0237)) + 5).clamp(-128, 127).to(torch.int8))


def test_tq_half_range_channel_does_not_saturate():
    """A non-negative weight channel keeps its largest values."""
    linear = torch.nn.Linear(8, 1, bias=False)
    with torch.no_grad():
        linear.weight.copy_(torch.linspace(0, 1, 8)[None])
    layer = qo.QuantLinear.from_float(linear)
    assert layer.qweight.max() == 127
    torch.testing.assert_close(layer.dequantize().weight, linear.weight, atol=1 / 254, rtol=0)


def test_tao_float16_output_does_not_overflow_before_the_weight_scale():
    x = torch.ones(1, 8192, dtype=torch.float16)
    weight = torch.full((1, 8192), 127, dtype=torch.int8)
    y = qo.int8_linear(x, weight, torch.tensor(0.16 / 127))
    torch.testing.assert_close(y.item(), 1310.72, rtol=1e-3, atol=0)


def test_tao_any_number_of_rows_works():
    weight = random_int8(24, 40)
    for m in range(34):
        a = random_int8(m, 40)
        assert torch.equal(qo.int8_gemm(a, weight), (a.long() @ weight.long().T).int())


def test_tao_inner_and_outer_sizes_need_not_be_multiples_of_eight():
    for k, n in [(1, 1), (7, 9), (9, 7), (1041, 3)]:
        a, b = random_int8(20, k), random_int8(n, k)
        assert torch.equal(qo.int8_gemm(a, b).long(), a.long() @ b.long().T)


def test_bdq_torch_dynamic_quantization_of_a_row_does_not_depend_on_the_batch():
    x = torch.randn(8, 64) * torch.logspace(-3, 3, 8)[:, None]
    layer = qo.QuantLinear.from_float(torch.nn.Linear(64, 16))
    assert torch.equal(layer(x)[:1], layer(x[:1]))


def test_qsim_gradient_passes_inside_the_range_not_inside_one_step():
    x = torch.randn(1000, requires_grad=True)
    qo.quant_tensor_forward(x, torch.tensor(0.1), None, -128, 127).sum().backward()
    assert (x.grad == 1).all()


def test_qsim_per_channel_scale_keeps_the_channel():
    scale, _ = qo.choose_qparams(torch.randn(4, 3, 2, 2), [1, 2, 3], -127, 127)
    assert scale.shape == (4, 1, 1, 1)


def test_qsim_nan_activation_is_contained():
    x = torch.randn(3, 16)
    x[1, 2] = torch.nan
    y = qo.int8_linear(x, random_int8(5, 16), ONE)
    assert y.isnan().any(1).tolist() == [False, True, False]


def test_torch_per_channel_fake_quantize_sends_huge_values_to_qmax():
    x = torch.tensor([[3e38, torch.inf, -3e38]])
    y = qo.quant_tensor_forward(x, torch.tensor([[0.1]]), None, -128, 127)
    assert torch.equal(y, torch.tensor([[127.0, 127.0, -128.0]]) * torch.tensor(0.1))


def test_torch_quotient_is_not_a_product_with_the_reciprocal():
    """127.5 against 127.499992: one code in 200 000 flips."""
    x, scale = torch.randn(400_000) * 4, torch.tensor(0.0317)
    q = qo.quant_tensor_forward(x, scale, None, -128, 127, simulate=False)
    assert torch.equal(q, torch.round(x / scale).clamp(-128, 127).to(torch.int8))


def test_lib_extreme_codes_do_not_saturate_in_the_products(isa):
    """vpmaddubsw would clip 255 * 127 * 2 to 32767, and the sign trick fails at -128."""
    a, b = torch.full((4, 64), 255, dtype=torch.uint8), torch.full((4, 64), 127, dtype=torch.int8)
    assert (qo.int8_gemm(a, b) == 255 * 127 * 64).all()
    low = torch.full((4, 64), -128, dtype=torch.int8)
    assert (qo.int8_gemm(low, low) == 128 * 128 * 64).all()


def test_lib_zero_rows_and_constant_rows_have_usable_scales():
    x = torch.stack([torch.zeros(16), torch.full((16,), 3.0)])
    for asymmetric in (False, True):
        q, scale, zero = qo.quantize_rows(x, asymmetric)
        torch.testing.assert_close((q - zero) * scale, x)


def test_lib_channels_last_with_one_channel():
    x, weight = torch.randn(2, 1, 5, 5), random_int8(3, 1, 3, 3)
    assert torch.equal(qo.int8_conv2d(x.contiguous(memory_format=torch.channels_last), weight, ONE), qo.int8_conv2d(x, weight, ONE))
