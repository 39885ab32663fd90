// Integer products of up to eight rows: the weight is read once, at the speed of the memory, and nothing else takes long.
//
// A block computes 16 columns for all rows, and its warps share K. Roles are swapped: the weight's rows are the 16-row operand of
// mma.m16n8k32 and go from memory to registers, the rows of x are the 8-column operand. Since a sum has no order, lane (g, t) takes
// bytes 16 t .. 16 t + 15 of every 64 of K and feeds them to two multiplications, alike for both operands. So every load is 16
// bytes and nothing is permuted. Every block quantizes floating rows for itself, because they are few and come from the L2 cache: a
// dynamic layer needs one launch. Bits are those of the other kernels. Read next: epilogue.cuh.
#include "device/epilogue.cuh"
#include "device/machine.cuh"
#include "device/range.cuh"
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

// What a block has in shared memory: codes of all rows, and a scale and a zero point of each; sums of all warps.
struct SharedRows {
  int8_t* codes;  // [kGemvRows][pitch]
  int32_t* sums;  // [warps][16][kGemvRows]
  float* scale;
  int32_t* zero_point;
};

__device__ __forceinline__ SharedRows shared_rows(const GemvArgs& a) {
  SharedRows rows;
  rows.codes = reinterpret_cast<int8_t*>(shared_memory());
  rows.sums = reinterpret_cast<int32_t*>(rows.codes + kGemvRows * a.pitch);
  rows.scale = reinterpret_cast<float*>(rows.sums + kWarps * kGemvColumns * kGemvRows);
  rows.zero_point = reinterpret_cast<int32_t*>(rows.scale + kGemvRows);
  return rows;
}

// ---- rows -----------------------------------------------------------------------------------------------------------

// Calls use(first column, elements) for the vectors of a row that are this thread's.
template <class X, class Use>
__device__ __forceinline__ void for_each_vector(const GemvArgs& a, int m, const Use& use) {
  constexpr int V = 16 / sizeof(X);
  const X* const row = static_cast<const X*>(a.x) + m * a.x_stride;
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

// Scale and zero point of each row from its range. The warps' ranges lie where their sums will.
template <class X>
__device__ __forceinline__ void choose_row_params(const GemvArgs& a, const SharedRows& rows) {
  constexpr int V = 16 / sizeof(X);
  static_assert(sizeof(Range<float>) <= kGemvColumns * sizeof(int32_t), "a range takes no more memory than a row's sums");
  Range<float>* const ranges = reinterpret_cast<Range<float>*>(rows.sums);
  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
#pragma unroll 1
  for (int m = 0; m < a.M; ++m) {
    Range<float> range{0.0f, 0.0f};  // contains 0
    for_each_vector<X>(a, m, [&](int, const X(&elements)[V]) {
#pragma unroll
      for (int i = 0; i < V; ++i) range.add(widen(elements[i]));
    });
    range = over_lanes(range, kWarp);
    if (lane == 0) ranges[m * kWarps + warp] = range;
  }
  __syncthreads();
  if (static_cast<int>(threadIdx.x) < a.M) {
    Range<float> range{0.0f, 0.0f};
    for (int w = 0; w < kWarps; ++w) range.merge(ranges[threadIdx.x * kWarps + w]);
    const auto p = choose_qparams_of(range.min, range.max, range.finite(), a.asymmetric ? -128 : -127, 127, a.asymmetric);
    rows.scale[threadIdx.x] = p.scale;
    rows.zero_point[threadIdx.x] = p.zero_point;
  }
  __syncthreads();
}

// Codes of all rows to shared memory, with the scale and zero point of each. Codes beyond the columns meet zeros of the weight.
template <class X>
__device__ __forceinline__ void write_rows(const GemvArgs& a, const SharedRows& rows) {
  constexpr int V = 16 / sizeof(X);
  if constexpr (std::is_same_v<X, int8_t>) {
    for (int m = 0; m < a.M; ++m)
      for_each_vector<X>(a, m, [&](int c, const X(&elements)[V]) { store_vector<V>(rows.codes + m * a.pitch + c, elements); });
    if (static_cast<int>(threadIdx.x) >= a.M) return;
    const OutputRow row = output_row(a.out, static_cast<int>(threadIdx.x));
    rows.scale[threadIdx.x] = row.scale;
    rows.zero_point[threadIdx.x] = row.zero;
  } else {
    choose_row_params<X>(a, rows);
#pragma unroll 1
    for (int m = 0; m < a.M; ++m) {
      const Quantizer quantizer = Quantizer::of(rows.scale[m], rows.zero_point[m], -128, 127);
      for_each_vector<X>(a, m, [&](int c, const X(&elements)[V]) {
        int8_t codes[V];
#pragma unroll
        for (int i = 0; i < V; ++i) codes[i] = static_cast<int8_t>(quantizer(widen(elements[i])));
        store_vector<V>(rows.codes + m * a.pitch + c, codes);
      });
    }
  }
}

// ---- the product ----------------------------------------------------------------------------------------------------

// The lane's bytes of kUnroll pieces of 64 k: of the weight's rows g and g + 8.
struct WeightPieces {
  uint32_t words[kUnroll][2][4];

  __device__ __forceinline__ void load(const GemvArgs& a, const int8_t* const (&at)[2], int t, int piece) {
#pragma unroll
    for (int u = 0; u < kUnroll; ++u)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int k = (piece + u * kWarps) * kPiece;
        load_once(at[h] + k, k + t * kVectorBytes < a.K, words[u][h]);
      }
  }
};

// Adds a piece's products to the warp's sums. The lane's 16 bytes are the operands of two multiplications.
__device__ __forceinline__ void multiply_piece(const uint32_t (&weight)[2][4], const Vector<uint32_t, 4>& row, int32_t (&sums)[4]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const uint32_t w[4] = {weight[0][half * 2], weight[1][half * 2], weight[0][half * 2 + 1], weight[1][half * 2 + 1]};
    const uint32_t x[2] = {row.get(half * 2), row.get(half * 2 + 1)};
    multiply(sums, w, x);
  }
}

// Adds the warps' sums and finishes them, four columns of a row a thread; n is the block's first column.
__device__ __forceinline__ void finish_rows(const GemvArgs& a, const SharedRows& rows, int64_t n) {
  const int m = static_cast<int>(threadIdx.x) / 4, column = static_cast<int>(threadIdx.x) % 4 * kFour;
  if (m >= a.M || n + column >= a.N) return;
  int32_t four[kFour] = {};
  for (int w = 0; w < kWarps; ++w)
#pragma unroll
    for (int c = 0; c < kFour; ++c) four[c] += rows.sums[(w * kGemvColumns + column + c) * kGemvRows + m];
  const int count = static_cast<int>(a.N - n - column < kFour ? a.N - n - column : kFour);
  finish_four(a.out, {rows.scale[m], rows.zero_point[m], m * a.out.y_sample}, output_columns(a.out, n + column, count), n + column,
              count, four);
}

template <class X>
__global__ void __launch_bounds__(kThreads, 3) gemv_kernel(const QO_GRID_CONSTANT GemvArgs a) {
  const SharedRows rows = shared_rows(a);
  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp, g = lane / 4, t = lane % 4;
  const int64_t n = int64_t{blockIdx.x} * kGemvColumns;

  // Load the first weights while the rows are quantized. Columns that do not exist repeat the last one.
  const int8_t* at[2];
  for (int h = 0; h < 2; ++h)
    at[h] = a.weight + (n + g + h * 8 < a.N ? n + g + h * 8 : a.N - 1) * a.weight_stride + t * kVectorBytes;
  WeightPieces weights;
  weights.load(a, at, t, warp);
  wait_for_kernel_before();

  // Rows that do not exist, and the end of the last piece, are zeros.
  for (int i = static_cast<int>(threadIdx.x) * kVectorBytes; i < kGemvRows * a.pitch; i += kThreads * kVectorBytes)
    if (i / a.pitch >= a.M || i % a.pitch >= a.K) store_vector<4>(reinterpret_cast<int32_t*>(rows.codes + i), {0, 0, 0, 0});
  write_rows<X>(a, rows);
  __syncthreads();

  int32_t sums[4] = {};
  const int pieces = (a.K + kPiece - 1) / kPiece;
#pragma unroll 1
  for (int piece = warp; piece < pieces; piece += kUnroll * kWarps) {
    if (piece != warp) weights.load(a, at, t, piece);
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (piece + u * kWarps >= pieces) break;
      const int8_t* row = rows.codes + g * a.pitch + (piece + u * kWarps) * kPiece + t * kVectorBytes;
      multiply_piece(weights.words[u], load_vector<4>(reinterpret_cast<const uint32_t*>(row)), sums);
    }
  }

  int32_t* mine = rows.sums + warp * kGemvColumns * kGemvRows;
#pragma unroll
  for (int r = 0; r < 4; ++r) mine[(c_row(lane) + r / 2 * 8) * kGemvRows + c_column(lane) + r % 2] = sums[r];
  __syncthreads();
  finish_rows(a, rows, n);
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
  launch(at, gemv_kernel<X>, (p.N + kGemvColumns - 1) / kGemvColumns, dim3(kThreads), a, static_cast<int>(gemv_shared_bytes(p.K)),
         p.early ? Start::kEarly : Start::kInOrder);
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
