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

// A random problem and the memory of its operands. Addresses are aligned only by chance: CUTLASS looks at sizes, TMA at addresses.
struct Example {
  IgemmProblem p{};
  std::vector<int8_t> a, b;
  std::vector<float> row_scale, column_scale, bias, y;
  std::vector<int32_t> row_zero, column_sum;

  Example(std::mt19937_64& random, bool one_row, DType out) {
    const auto below = [&](int n) { return static_cast<int64_t>(random() % static_cast<unsigned>(n)); };
    p.M = one_row ? 1 : 1 + below(40), p.N = 8 * (1 + below(5)), p.K = 16 * (1 + below(4));
    p.a_stride = p.M > 1 ? p.K + 16 * below(3) : 3, p.b_stride = p.K + 16 * below(3);
    p.y_stride = p.M > 1 ? p.N + 8 * below(3) : 5;
    const auto codes = [&](int64_t n) {
      std::vector<int8_t> v(static_cast<size_t>(n));
      for (int8_t& q : v) q = static_cast<int8_t>(random());
      return v;
    };
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
    a = codes(p.M * (p.K + 32)), b = codes(p.N * p.b_stride);
    row_scale = floats(p.M), column_scale = floats(p.N), bias = floats(p.N), y = floats(p.M * (p.N + 24) + 8);
    row_zero = ints(p.M), column_sum = ints(p.N);
    p.a = a.data(), p.b = b.data(), p.y = y.data(), p.y_dtype = out;
    p.row_scale = row_scale.data(), p.row_step = below(2);
    p.column_scale = column_scale.data(), p.column_step = below(2);
    if (below(2)) p.row_zero = row_zero.data(), p.column_sum = column_sum.data();
    if (below(2)) p.bias = bias.data();
    p.floor = below(2) ? 0.0f : -INFINITY;
  }

  // The plain formula.
  float wanted(int64_t row, int64_t column) const {
    const int64_t a_stride = p.M > 1 ? p.a_stride : 0;
    int64_t sum = 0;
    for (int64_t k = 0; k < p.K; ++k) sum += int64_t{p.a[row * a_stride + k]} * p.b[column * p.b_stride + k];
    if (p.row_zero) sum -= int64_t{p.row_zero[row * p.row_step]} * p.column_sum[column];
    const float scale = p.row_scale[row * p.row_step] * p.column_scale[column * p.column_step];
    const float y = p.bias ? std::fma(static_cast<float>(sum), scale, p.bias[column]) : static_cast<float>(sum) * scale;
    return p.floor == 0 && y < 0 ? 0.0f : y;
  }
};

// Element (m, n) of the product as CUTLASS computes it from its arguments.
template <class Arguments>
static float evaluated(const Arguments& args, int64_t m, int64_t n) {
  const auto& [first_scale, first_correction, second_scale, second_correction, bias_of, floor] = args.epilogue.thread;
  const auto& loop = args.mainloop;
  int32_t acc = 0;
  for (int64_t k = 0; k < cute::get<2>(args.problem_shape); ++k)
    acc += loop.ptr_A[m * cute::get<0>(loop.dA) + k * cute::get<1>(loop.dA)] *
           loop.ptr_B[n * cute::get<0>(loop.dB) + k * cute::get<1>(loop.dB)];
  const int32_t corrected = acc - value(first_correction, m, n) * value(second_correction, m, n);
  const float y = epilogue(corrected, value(first_scale, m, n), value(second_scale, m, n), value(bias_of, m, n), false);
  return y < floor.floor ? floor.floor : y;
}

template <int kKernel, DType kOut>
static void check(std::mt19937_64& random) {
  using G = sm90::Gemm<kKernel, kOut>;
  const char* name = G::kTile.name;
  for (int i = 0; i < 64; ++i) {
    const Example example(random, i % 4 == 0, kOut);
    const IgemmProblem& p = example.p;
    const auto args = G::arguments(p);
    expect(G::Adapter::can_implement(args) == cutlass::Status::kSuccess, "CUTLASS takes it", name, p);
    expect(G::Adapter::get_workspace_size(args) == 0, "no workspace", name, p);
    const auto& [m_size, n_size, k_size, l_size] = args.problem_shape;
    expect(int64_t{m_size} * n_size == p.M * p.N && k_size == p.K && l_size == 1, "the problem's size", name, p);
    expect(args.epilogue.ptr_C == nullptr && cute::get<2>(args.epilogue.dD) == 0, "one matrix, nothing added", name, p);
    expect(args.mainloop.ptr_A == (G::kTile.swapped ? p.b : p.a), "the swap", name, p);
    expect(cute::get<0>(args.mainloop.dA) % 16 == 0 && cute::get<0>(args.mainloop.dB) % 16 == 0, "strides of TMA", name, p);

    const int64_t y_stride = p.M > 1 ? p.y_stride : p.N;
    std::vector<bool> written(example.y.size());
    for (int64_t m = 0; m < m_size; ++m)
      for (int64_t n = 0; n < n_size; ++n) {
        // where it is stored tells which element it is
        const int64_t offset = m * cute::get<0>(args.epilogue.dD) + n * cute::get<1>(args.epilogue.dD);
        const int64_t row = offset / y_stride, column = offset % y_stride;
        expect(args.epilogue.ptr_D == p.y && row < p.M && column < p.N && !written[static_cast<size_t>(offset)], "in y, once", name,
               p);
        written[static_cast<size_t>(offset)] = true;
        const float got = evaluated(args, m, n), wanted = example.wanted(row, column);
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
