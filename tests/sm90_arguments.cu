// What the Hopper kernels are given, for real problems, on the host: CUTLASS's own arguments (pointers, strides, broadcast vectors
// and their defaults) evaluated element by element as CUTLASS defines them, against the plain formula. Swapped tiles compute the
// transpose, so that here is where a row mistaken for a column would show. Nothing is launched. Run by test_cuda_sm90.py.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "engine/sm90/gemm.cuh"

using namespace quant_ops;

static void expect(bool holds, const char* what, const char* kernel, const IgemmProblem& p) {
  if (holds) return;
  std::printf("%s: %s, M N K %lld %lld %lld\n", what, kernel, (long long)p.M, (long long)p.N, (long long)p.K);
  std::exit(1);
}

// Element (m, n) of a broadcast: Stride<bool, _0, _0> walks m, Stride<_0, bool, _0> walks n, null is the default everywhere.
template <class Arguments>
static auto value(const Arguments& v, int64_t m, int64_t) -> std::decay_t<decltype(*v.ptr_col)> {
  return v.ptr_col ? v.ptr_col[int64_t{cute::get<0>(v.dCol)} * m] : v.null_default;
}
template <class Arguments>
static auto value(const Arguments& v, int64_t, int64_t n) -> std::decay_t<decltype(*v.ptr_row)> {
  return v.ptr_row ? v.ptr_row[int64_t{cute::get<1>(v.dRow)} * n] : v.null_default;
}

template <int kKernel, DType kOut>
static void check(std::mt19937_64& random) {
  using G = sm90::Gemm<kKernel, kOut>;
  const char* name = G::kTile.name;
  const auto below = [&](int n) { return static_cast<int64_t>(random() % static_cast<unsigned>(n)); };
  for (int i = 0; i < 64; ++i) {
    IgemmProblem p{};
    p.M = i % 4 == 0 ? 1 : 1 + below(40), p.N = 8 * (1 + below(5)), p.K = 16 * (1 + below(4));
    p.a_stride = p.M > 1 ? p.K + 16 * below(3) : 3, p.b_stride = p.K + 16 * below(3);
    p.y_stride = p.M > 1 ? p.N + 8 * below(3) : 5;
    const int64_t a_stride = p.M > 1 ? p.a_stride : 0, y_stride = p.M > 1 ? p.y_stride : p.N;
    std::vector<int8_t> a(static_cast<size_t>(p.M * (p.K + 32))), b(static_cast<size_t>(p.N * p.b_stride));
    for (int8_t& q : a) q = static_cast<int8_t>(random());
    for (int8_t& q : b) q = static_cast<int8_t>(random());
    const auto floats = [&](int64_t n) {
      std::vector<float> v(static_cast<size_t>(n));
      for (float& x : v) x = static_cast<float>(below(2001) - 1000) / 777 * (below(8) ? 1.0f : 0.0f);  // -0 too
      return v;
    };
    const auto ints = [&](int64_t n) {
      std::vector<int32_t> v(static_cast<size_t>(n));
      for (int32_t& x : v) x = static_cast<int32_t>(below(256)) - 128;
      return v;
    };
    const std::vector<float> row_scale = floats(p.M), column_scale = floats(p.N), bias = floats(p.N);
    const std::vector<int32_t> row_zero = ints(p.M), column_sum = ints(p.N);
    std::vector<float> y(static_cast<size_t>(p.M * (p.N + 24)) + 8);
    p.a = a.data(), p.b = b.data(), p.y = y.data(), p.y_dtype = kOut;
    p.row_scale = row_scale.data(), p.row_step = below(2);
    p.column_scale = column_scale.data(), p.column_step = below(2);
    if (below(2)) p.row_zero = row_zero.data(), p.column_sum = column_sum.data();
    if (below(2)) p.bias = bias.data();
    p.floor = below(2) ? 0.0f : -INFINITY;

    // aligned only by chance here; CUTLASS looks at sizes, TMA at addresses
    const auto args = G::arguments(p);
    expect(G::Adapter::can_implement(args) == cutlass::Status::kSuccess, "CUTLASS takes it", name, p);
    expect(G::Adapter::get_workspace_size(args) == 0, "no workspace", name, p);
    const auto& [first_scale, first_correction, second_scale, second_correction, bias_of, floor] = args.epilogue.thread;
    const auto [m_size, n_size, k_size, l_size] = args.problem_shape;
    expect(int64_t{m_size} * n_size == p.M * p.N && k_size == p.K && l_size == 1, "the problem's size", name, p);
    expect(args.epilogue.ptr_C == nullptr && cute::get<2>(args.epilogue.dD) == 0, "one matrix, nothing added", name, p);
    expect(args.mainloop.ptr_A == (G::kTile.swapped ? p.b : p.a), "the swap", name, p);
    expect(cute::get<0>(args.mainloop.dA) % 16 == 0 && cute::get<0>(args.mainloop.dB) % 16 == 0, "strides of TMA", name, p);

    std::vector<bool> written(y.size());
    for (int64_t m = 0; m < m_size; ++m)
      for (int64_t n = 0; n < n_size; ++n) {
        int32_t acc = 0;
        for (int64_t k = 0; k < k_size; ++k)
          acc += args.mainloop.ptr_A[m * cute::get<0>(args.mainloop.dA) + k * cute::get<1>(args.mainloop.dA)] *
                 args.mainloop.ptr_B[n * cute::get<0>(args.mainloop.dB) + k * cute::get<1>(args.mainloop.dB)];
        const int32_t corrected = acc - value(first_correction, m, n) * value(second_correction, m, n);
        float got = epilogue(corrected, value(first_scale, m, n), value(second_scale, m, n), value(bias_of, m, n), false);
        got = got < floor.floor ? floor.floor : got;

        // where it is stored tells which element it is
        const int64_t offset = m * cute::get<0>(args.epilogue.dD) + n * cute::get<1>(args.epilogue.dD);
        const int64_t row = offset / y_stride, column = offset % y_stride;
        expect(args.epilogue.ptr_D == p.y && row < p.M && column < p.N && !written[static_cast<size_t>(offset)], "in y, once", name,
               p);
        written[static_cast<size_t>(offset)] = true;
        int64_t sum = 0;
        for (int64_t k = 0; k < p.K; ++k) sum += int64_t{p.a[row * a_stride + k]} * p.b[column * p.b_stride + k];
        if (p.row_zero) sum -= int64_t{p.row_zero[row * p.row_step]} * p.column_sum[column];
        const float scale = p.row_scale[row * p.row_step] * p.column_scale[column * p.column_step];
        float wanted = p.bias ? std::fma(static_cast<float>(sum), scale, p.bias[column]) : static_cast<float>(sum) * scale;
        if (p.floor == 0 && wanted < 0) wanted = 0;
        expect(std::memcmp(&got, &wanted, sizeof got) == 0, "the plain formula, bit for bit", name, p);
      }
  }
}

int main() {
  std::mt19937_64 random(1);
  // every tile; the dtype only changes y's alignment
  check<sm90::kernel_named("gemm_s8s8_64x16x256_swapped_sm90a"), DType::kBFloat16>(random);
  check<sm90::kernel_named("gemm_s8s8_64x32x256_swapped_sm90a"), DType::kFloat32>(random);
  check<sm90::kernel_named("gemm_s8s8_64x64x256_swapped_sm90a"), DType::kFloat16>(random);
  check<sm90::kernel_named("gemm_s8s8_64x128x128_sm90a"), DType::kFloat32>(random);
  check<sm90::kernel_named("gemm_s8s8_128x128x128_sm90a"), DType::kFloat16>(random);
  check<sm90::kernel_named("gemm_s8s8_128x256x128_sm90a"), DType::kBFloat16>(random);
  static_assert(sm90::kKernels == 6, "every tile is checked");
  return 0;
}
