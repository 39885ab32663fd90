// Integer products of up to eight rows: the weight is read once, at the speed of the memory, and nothing else takes long.
//
// A block computes 16 columns for all rows; its warps share K. Roles are swapped: the weight's rows are the 16-row operand of
// mma.m16n8k32 and go from memory to registers, the rows of x are the 8-column one. Since a sum has no order, lane (g, t) takes 16
// neighbouring bytes 16 t .. of each 64 of K and feeds them to two multiplications, for both operands alike: every load is 16 bytes
// and nothing is permuted. Floating rows are quantized here, by every block for itself (they are few and come from the L2 cache):
// one launch for a dynamic layer. Bits are those of the other kernels. Read next: epilogue.cuh.
#include "device/epilogue.cuh"
#include "device/machine.cuh"
#include "engine/choose.h"
#include "engine/gemv.h"

namespace quant_ops {
namespace {

constexpr int kThreads = kGemvWarps * kWarp, kWarps = kGemvWarps;
constexpr int kUnroll = 4;  // 64-byte pieces of K that a warp has in flight: 16 rows x 256 bytes
constexpr int kPiece = 64;

struct GemvArgs {
  static constexpr bool kBarriers = true;
  const int8_t* weight;
  int64_t weight_stride;
  int64_t N;
  int M, K, pitch;  // K: a multiple of 16; pitch: bytes between rows in shared memory
  const void* x;
  int64_t x_stride;
  int columns;  // of x; the rest up to K are zeros
  bool asymmetric, vectors;
  Epilogue out;
};

// 16 bytes that no other block reads: past the first cache.
__device__ __forceinline__ void load_once(const int8_t* from, bool valid, uint32_t (&words)[4]) {
#if defined(__CUDA_ARCH__)
  words[0] = words[1] = words[2] = words[3] = 0;
  if (valid)
    asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "l"(from));
#else
  memset(words, 0, sizeof(words));
  if (!valid) return;
  expect_aligned(from, sizeof(words));
  memcpy(words, from, sizeof(words));
#endif
}

// Smallest, largest, and the bits of the largest magnitude of some elements; NaN shows in the last.
struct RowRange {
  float min = 0.0f, max = 0.0f;  // a range contains 0
  uint32_t magnitude = 0;

  __device__ __forceinline__ void add(float x) {
    min = x < min ? x : min;
    max = x > max ? x : max;
    const uint32_t bits = float_bits(x) & 0x7fffffffu;
    magnitude = bits > magnitude ? bits : magnitude;
  }
  __device__ __forceinline__ void merge(const RowRange& other) {
    min = other.min < min ? other.min : min;
    max = other.max > max ? other.max : max;
    magnitude = other.magnitude > magnitude ? other.magnitude : magnitude;
  }
};

// Calls use(first column, elements) for the thread's share of a row, V at once.
template <class X, class Use>
__device__ __forceinline__ void for_each_vector(const GemvArgs& a, const X* row, const Use& use) {
  constexpr int V = 16 / sizeof(X);
  for (int c = static_cast<int>(threadIdx.x) * V; c < a.K; c += kThreads * V) {
    X elements[V];
    if (a.vectors && c + V <= a.columns) {
      const auto in = load_vector<V>(row + c);
#pragma unroll
      for (int i = 0; i < V; ++i) elements[i] = in.get(i);
    } else {
#pragma unroll
      for (int i = 0; i < V; ++i) elements[i] = c + i < a.columns ? row[c + i] : X{};
    }
    use(c, elements);
  }
}

static_assert(sizeof(RowRange) <= 16 * sizeof(int32_t), "ranges lie where sums will");

template <class X>
struct QuantizedRows {
  // Codes of all rows to shared memory; scale and zero point of each.
  __device__ static void write(const GemvArgs& a, int8_t* codes, float* scale, int32_t* zero, RowRange* partial) {
    constexpr int V = 16 / sizeof(X);
    const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
#pragma unroll 1
    for (int m = 0; m < a.M; ++m) {
      RowRange range;
      for_each_vector(a, static_cast<const X*>(a.x) + m * a.x_stride, [&](int, const X(&elements)[V]) {
#pragma unroll
        for (int i = 0; i < V; ++i) range.add(widen(elements[i]));
      });
#pragma unroll
      for (int mask = kWarp / 2; mask > 0; mask /= 2) {
        RowRange other;
        other.min = __shfl_xor_sync(0xffffffffu, range.min, mask);
        other.max = __shfl_xor_sync(0xffffffffu, range.max, mask);
        other.magnitude = __shfl_xor_sync(0xffffffffu, range.magnitude, mask);
        range.merge(other);
      }
      if (lane == 0) partial[m * kWarps + warp] = range;
    }
    __syncthreads();
    if (static_cast<int>(threadIdx.x) < a.M) {
      RowRange range;
      for (int w = 0; w < kWarps; ++w) range.merge(partial[threadIdx.x * kWarps + w]);
      const bool finite = range.magnitude < 0x7f800000u;
      const float absmax = bits_float(range.magnitude);
      const auto p = a.asymmetric ? choose_qparams_of(range.min, range.max, finite, -128, 127, true)
                                  : choose_qparams_of(-absmax, absmax, finite, -127, 127, false);
      scale[threadIdx.x] = p.scale;
      zero[threadIdx.x] = p.zero_point;
    }
    __syncthreads();
#pragma unroll 1
    for (int m = 0; m < a.M; ++m) {
      const float s = scale[m], reciprocal = safe_reciprocal(s);
      const int32_t z = zero[m], lo = -128 - z, hi = 127 - z;
      for_each_vector(a, static_cast<const X*>(a.x) + m * a.x_stride, [&](int c, const X(&elements)[V]) {
        int8_t q[V];
#pragma unroll
        for (int i = 0; i < V; ++i) {
          const float value = widen(elements[i]);
          const int32_t steps = nearest_int(reciprocal != 0.0f ? mended_quotient(value, s, reciprocal) : quantize_steps(value, s));
          q[i] = static_cast<int8_t>((steps < lo ? lo : steps > hi ? hi : steps) + z);
        }
        store_vector<V>(codes + m * a.pitch + c, q);  // those beyond the columns meet zeros of the weight
      });
    }
  }
};

template <>
struct QuantizedRows<int8_t> {
  __device__ static void write(const GemvArgs& a, int8_t* codes, float* scale, int32_t* zero, RowRange*) {
    for (int m = 0; m < a.M; ++m)
      for_each_vector(a, static_cast<const int8_t*>(a.x) + m * a.x_stride,
                      [&](int c, const int8_t (&elements)[16]) { store_vector<16>(codes + m * a.pitch + c, elements); });
    if (static_cast<int>(threadIdx.x) >= a.M) return;
    const OutputRow row = output_row(a.out, static_cast<int>(threadIdx.x));
    scale[threadIdx.x] = row.scale;
    zero[threadIdx.x] = row.zero;
  }
};

template <class X>
__global__ void __launch_bounds__(kThreads, 3) gemv_kernel(const QO_GRID_CONSTANT GemvArgs a) {
  int8_t* codes = reinterpret_cast<int8_t*>(shared_memory());
  int32_t* parts = reinterpret_cast<int32_t*>(codes + kGemvRows * a.pitch);  // [warps][16][rows]
  float* scale = reinterpret_cast<float*>(parts + kWarps * 16 * kGemvRows);
  int32_t* zero = reinterpret_cast<int32_t*>(scale + kGemvRows);
  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp, g = lane / 4, t = lane % 4;
  const int64_t n = int64_t{blockIdx.x} * 16;

  // the first weights are on their way while rows are quantized
  const int8_t* at[2];
  for (int h = 0; h < 2; ++h) at[h] = a.weight + (n + g + h * 8 < a.N ? n + g + h * 8 : a.N - 1) * a.weight_stride + t * kVectorBytes;
  uint32_t weights[kUnroll][2][4];
  const auto load = [&](int piece) {
#pragma unroll
    for (int u = 0; u < kUnroll; ++u)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int k = (piece + u * kWarps) * kPiece;
        load_once(at[h] + k, k + t * kVectorBytes < a.K, weights[u][h]);
      }
  };
  const int pieces = (a.K + kPiece - 1) / kPiece;
  load(warp);
  // rows that do not exist, and the end of the last piece, are zeros
  for (int i = static_cast<int>(threadIdx.x) * kVectorBytes; i < kGemvRows * a.pitch; i += kThreads * kVectorBytes)
    if (i / a.pitch >= a.M || i % a.pitch >= a.K) store_vector<4>(reinterpret_cast<int32_t*>(codes + i), {0, 0, 0, 0});
  QuantizedRows<X>::write(a, codes, scale, zero, reinterpret_cast<RowRange*>(parts));
  __syncthreads();

  int32_t sums[4] = {};
#pragma unroll 1
  for (int piece = warp; piece < pieces; piece += kUnroll * kWarps) {
    if (piece != warp) load(piece);
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (piece + u * kWarps >= pieces) break;
      const auto row =
          load_vector<4>(reinterpret_cast<const uint32_t*>(codes + g * a.pitch + (piece + u * kWarps) * kPiece + t * kVectorBytes));
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint32_t w[4] = {weights[u][0][half * 2], weights[u][1][half * 2], weights[u][0][half * 2 + 1],
                               weights[u][1][half * 2 + 1]};
        const uint32_t x[2] = {row.get(half * 2), row.get(half * 2 + 1)};
        multiply(sums, w, x);
      }
    }
  }

  // the warps' sums, added and finished
  int32_t* mine = parts + warp * 16 * kGemvRows;
#pragma unroll
  for (int r = 0; r < 4; ++r) mine[(c_row(lane) + r / 2 * 8) * kGemvRows + c_column(lane) + r % 2] = sums[r];
  __syncthreads();
  const int m = static_cast<int>(threadIdx.x) / 4, column = static_cast<int>(threadIdx.x) % 4 * kFour;
  if (m >= a.M || n + column >= a.N) return;
  int32_t four[kFour] = {};
  for (int w = 0; w < kWarps; ++w)
#pragma unroll
    for (int c = 0; c < kFour; ++c) four[c] += parts[(w * 16 + column + c) * kGemvRows + m];
  const int count = static_cast<int>(a.N - n - column < kFour ? a.N - n - column : kFour);
  finish_four(a.out, {scale[m], zero[m], m * a.out.y_sample}, output_columns(a.out, n + column, count), n + column, count, four);
}

// `x` holds the rows: codes, or floating elements of dtype X.
template <class X>
void launch_gemv(const IgemmProblem& p, const X* x, int64_t x_stride, int64_t columns, bool asymmetric, const Launch& at) {
  const bool vectors = is_aligned(x, 16) && (p.M == 1 || x_stride * int64_t{sizeof(X)} % 16 == 0);
  const GemvArgs a{.weight = p.b,
                   .weight_stride = p.b_stride,
                   .N = p.N,
                   .M = static_cast<int>(p.M),
                   .K = static_cast<int>(p.K),
                   .pitch = static_cast<int>(gemv_pitch(p.K)),
                   .x = x,
                   .x_stride = x_stride,
                   .columns = static_cast<int>(columns),
                   .asymmetric = asymmetric,
                   .vectors = vectors,
                   .out = epilogue_of(p)};
  launch(at, gemv_kernel<X>, (p.N + kGemvColumns - 1) / kGemvColumns, dim3(kThreads), a, static_cast<int>(gemv_shared_bytes(p.K)));
}

}  // namespace

void run_gemv(const IgemmProblem& p, const Launch& at) { launch_gemv(p, p.a, p.a_stride, p.K, false, at); }

void run_quantizing_gemv(const IgemmProblem& p, const QuantizeRowsParams& rows, const Launch& at) {
  with_float_type(rows.x_dtype, [&](auto* type) {
    using X = std::remove_pointer_t<decltype(type)>;
    if constexpr (!std::is_same_v<X, double>)
      launch_gemv(p, static_cast<const X*>(rows.x), rows.x_stride, rows.columns, rows.asymmetric, at);
  });
}

}  // namespace quant_ops
