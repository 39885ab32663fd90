// How the kernels of weight_only_linear read a packed weight and make operands of mma of it, and how they finish results.
//
// A warp takes 32 columns and, of a step, 32 k. Lane (g, t) = (lane / 4, lane % 4) has an octet, k 8 t .. 8 t + 7, of columns
// 4 g .. 4 g + 3, which 16-byte loads bring: one for four bits, two for eight. Roles are swapped: columns of the weight are the
// 16-row operand a of mma, rows of x the 8-column operand b. Sums have no order, so that a lane may feed the k it has, alike for
// both operands. Product j of two has columns 4 g + 2 j and 4 g + 2 j + 1 as the rows g and g + 8 of a. So nothing is permuted, and
// in the end a lane has four neighbouring columns of rows 2 t and 2 t + 1: column 2 j + i / 2 and row i % 2 of sums[j][i]. Read
// next: weight_only_gemv.cu.
#pragma once

#include "device/machine.cuh"
#include "weight_only.h"

namespace quant_ops {

constexpr int kStepK = 32;
constexpr int kOctet = 8;
constexpr int kLaneColumns = 4;

// ---- the packed weight ----------------------------------------------------------------------------------------------

// An octet of four columns: for eight bits two words of a column.
template <int kBits>
struct Octets {
  static constexpr int kWords = kBits / 4;
  uint32_t words[kWords][kLaneColumns];
};

// Where a lane reads. Columns that do not exist repeat the first one: nothing becomes of them.
template <int kBits>
struct WeightLane {
  static constexpr int kWords = Octets<kBits>::kWords;
  static constexpr int kStepWords = 4 * kWords;  // of a column
  const int8_t* first;
  int64_t step_bytes;  // eight bits: between words of a column
  int words;           // of a column from the lane's first octet on
  int whole_steps;     // whose octets all exist, for every lane

  __device__ __forceinline__ WeightLane(const WeightOnlyArgs& a, int64_t warp_column, int lane) {
    const int64_t n = warp_column + lane / 4 * kLaneColumns;
    const ColumnWords column = column_words(a.codes, kBits, a.column_bytes, a.padded_n, n < a.padded_n ? n : 0);
    step_bytes = column.step;
    first = column.first + lane % 4 * kWords * word_bytes();
    words = static_cast<int>(a.column_bytes / 4) - lane % 4 * kWords;
    whole_steps = static_cast<int>(a.column_bytes / 4) / kStepWords;
  }
  __device__ __forceinline__ int64_t word_bytes() const {
    return kBits == 4 ? WeightOnlyLayout::kColumnStep * WeightOnlyLayout::kWord : step_bytes;
  }
  // kSteps steps from `step` on: zeros in place of what does not exist.
  template <int kSteps>
  __device__ __forceinline__ void load(int step, Octets<kBits> (&to)[kSteps]) const {
    const int8_t* const at = first + int64_t{step} * kStepWords * word_bytes();
    const int left = words - step * kStepWords;
    if (step + kSteps <= whole_steps) {
#pragma unroll
      for (int w = 0; w < kSteps * kWords; ++w)
        load_once(at + (w / kWords * kStepWords + w % kWords) * word_bytes(), true, to[w / kWords].words[w % kWords]);
    } else {
#pragma unroll
      for (int w = 0; w < kSteps * kWords; ++w) {
        const int word = w / kWords * kStepWords + w % kWords;
        load_once(at + word * word_bytes(), word < left, to[w / kWords].words[w % kWords]);
      }
    }
  }
  // Towards the L2 cache.
  template <int kSteps>
  __device__ __forceinline__ void fetch(int step) const {
#if defined(__CUDA_ARCH__)
    const int8_t* const at = first + int64_t{step} * kStepWords * word_bytes();
#pragma unroll
    for (int w = 0; w < kSteps * kWords; ++w)
      if (step + kSteps <= whole_steps)
        asm volatile("prefetch.global.L2 [%0];" ::"l"(at + (w / kWords * kStepWords + w % kWords) * word_bytes()));
#else
    static_cast<void>(step);
#endif
  }
};

// ---- integer operands -----------------------------------------------------------------------------------------------

// Codes of four bits come 16 times as large, which costs one instruction less.
template <int kBits>
constexpr int kCodeShift = kBits == 4 ? 4 : 0;

// (word & 0xf0f0f0f0) ^ 0x80808080 as one instruction.
__device__ __forceinline__ uint32_t masked_and_flipped(uint32_t word) {
#if defined(__CUDA_ARCH__)
  uint32_t flipped;
  asm("lop3.b32 %0, %1, %2, %3, 0x6a;" : "=r"(flipped) : "r"(word), "r"(0xf0f0f0f0u), "r"(0x80808080u));
  return flipped;
#else
  return (word & 0xf0f0f0f0u) ^ 0x80808080u;
#endif
}

// Operand a of product j.
template <int kBits>
__device__ __forceinline__ void integer_operand(const Octets<kBits>& octets, int j, uint32_t (&a)[4]) {
#pragma unroll
  for (int c = 0; c < 2; ++c) {
    const uint32_t word = octets.words[0][j * 2 + c];
    if constexpr (kBits == 4) {  // a nibble n stands for n - 8
      a[c] = masked_and_flipped(word << 4);
      a[c + 2] = masked_and_flipped(word);
    } else {
      a[c] = word;
      a[c + 2] = octets.words[1][j * 2 + c];
    }
  }
}

// ---- floating operands ----------------------------------------------------------------------------------------------

// Bytes of two words, which are numbered 0 to 7, by the nibbles of `select`, the lowest one first.
__device__ __forceinline__ uint32_t pick_bytes(uint32_t low, uint32_t high, uint32_t select) {
#if defined(__CUDA_ARCH__)
  return __byte_perm(low, high, select);
#else
  const uint64_t both = uint64_t{high} << 32 | low;
  uint32_t picked = 0;
  for (int i = 0; i < 4; ++i) picked |= static_cast<uint32_t>(both >> ((select >> (4 * i) & 7u) * 8) & 0xffu) << (8 * i);
  return picked;
#endif
}

// The codes of an octet of a column as bytes, of four bits plus 8, of eight bits plus 128.
template <int kBits>
__device__ __forceinline__ void unsigned_bytes(const Octets<kBits>& octets, int column, uint32_t (&quads)[2]) {
  if constexpr (kBits == 4) {
    quads[0] = octets.words[0][column] & 0x0f0f0f0fu;
    quads[1] = octets.words[0][column] >> 4 & 0x0f0f0f0fu;
  } else {
    quads[0] = octets.words[0][column] ^ 0x80808080u;
    quads[1] = octets.words[1][column] ^ 0x80808080u;
  }
}
template <int kBits>
constexpr int kByteOffset = kBits == 4 ? 8 : 128;

// An unsigned byte u as the last bits of a float, 2^23 + u.
constexpr uint32_t kFloatOfByte = 0x4b000000u;
__device__ __forceinline__ float float_of_byte(uint32_t quad, int i) {
  return bits_float(pick_bytes(quad, kFloatOfByte, 0x7440u + static_cast<uint32_t>(i)));
}

// Pairs of 16-bit numbers: u + v, of numbers whose sum is one.
template <class X>
__device__ __forceinline__ uint32_t add_pairs(uint32_t u, uint32_t v) {
#if defined(__CUDA_ARCH__)
  uint32_t w;
  if constexpr (std::is_same_v<X, Half>)
    asm("add.f16x2 %0, %1, %2;" : "=r"(w) : "r"(u), "r"(v));
  else
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(w) : "r"(u), "r"(0x3f803f80u), "r"(v));
  return w;
#else
  uint32_t w = 0;
  for (int i = 0; i < 32; i += 16) {
    const float sum = to_compute(X{static_cast<uint16_t>(u >> i)}) + to_compute(X{static_cast<uint16_t>(v >> i)});
    X x;
    from_compute(sum, &x);
    if (to_compute(x) != sum) std::abort();
    w |= uint32_t{x.bits} << i;
  }
  return w;
#endif
}

template <class X>
__device__ __forceinline__ uint32_t pair_of(float value) {
  return rounded_to<X>(value).bits * 0x10001u;
}

// Codes less a zero point as numbers of type X (Half, BFloat16), all of them exact. A byte u becomes the last bits of a number, to
// which a negative one is added that depends on the column's zero point:
//   Half                  1024 + u
//   BFloat16, four bits   32 + u, whose last two bits are zeros; for 128 + u not every addend would be a number
//   BFloat16, eight bits  2^23 + u in float32, and the sum is the upper half of a float32
template <class X, int kBits>
struct CodePairs {
  static constexpr bool kHalf = std::is_same_v<X, Half>;
  static constexpr bool kOverFloat = !kHalf && kBits == 8;
  static constexpr bool kShifted = !kHalf && kBits == 4;

  __device__ __forceinline__ static uint32_t addend(int32_t zero) {
    const int32_t base = kHalf ? 1024 : kOverFloat ? 8388608 : 32;
    const float value = -static_cast<float>(base + kByteOffset<kBits> + zero);
    if constexpr (kOverFloat) return float_bits(value);
    return pair_of<X>(value);
  }

  // The octet of a column as two words of bytes that convert() takes.
  __device__ __forceinline__ static void bytes(const Octets<kBits>& octets, int column, uint32_t (&quads)[2]) {
    if constexpr (kShifted) {
      quads[0] = octets.words[0][column] << 2 & 0x3c3c3c3cu;
      quads[1] = octets.words[0][column] >> 2 & 0x3c3c3c3cu;
    } else {
      unsigned_bytes(octets, column, quads);
    }
  }

  // Numbers 0, 1 and 2, 3 of a quad.
  __device__ __forceinline__ static void convert(uint32_t quad, uint32_t addend, uint32_t (&pairs)[2]) {
#pragma unroll
    for (int p = 0; p < 2; ++p) {
      if constexpr (kOverFloat) {
        const float low = float_of_byte(quad, p * 2) + bits_float(addend);
        const float high = float_of_byte(quad, p * 2 + 1) + bits_float(addend);
        pairs[p] = pick_bytes(float_bits(low), float_bits(high), 0x7632u);
      } else {
        const uint32_t numbers = pick_bytes(quad, kHalf ? 0x64646464u : 0x42424242u, p == 0 ? 0x4140u : 0x4342u);
        pairs[p] = add_pairs<X>(numbers, addend);
      }
    }
  }
};

// Operands a of product j, of the octet's first and last four k.
template <class X, int kBits>
__device__ __forceinline__ void float_operands(const Octets<kBits>& octets, int j, const uint32_t (&addends)[kLaneColumns],
                                               uint32_t (&a)[2][4]) {
#pragma unroll
  for (int c = 0; c < 2; ++c) {
    uint32_t quads[2];
    CodePairs<X, kBits>::bytes(octets, j * 2 + c, quads);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t pairs[2];
      CodePairs<X, kBits>::convert(quads[half], addends[j * 2 + c], pairs);
      a[half][c] = pairs[0];
      a[half][c + 2] = pairs[1];
    }
  }
}

// ---- products of a step ---------------------------------------------------------------------------------------------

// X: int8_t for codes, Half or BFloat16. An octet of a row of x is kXWords words.
template <class X>
using SumOf = std::conditional_t<std::is_same_v<X, int8_t>, int32_t, float>;
template <class X>
constexpr int kXWords = kOctet * static_cast<int>(sizeof(X)) / 4;

// Operands a of one step, made once for all rows.
template <class X, int kBits>
struct StepOperands {
  static constexpr int kHalves = std::is_same_v<X, int8_t> ? 1 : 2;
  uint32_t a[2][kHalves][4];

  __device__ __forceinline__ StepOperands(const Octets<kBits>& octets, const uint32_t (&addends)[kLaneColumns]) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      if constexpr (kHalves == 1)
        integer_operand(octets, j, a[j][0]);
      else
        float_operands<X>(octets, j, addends, a[j]);
    }
  }
  // Adds products with eight rows of x, of which the lane has its octet of row g.
  __device__ __forceinline__ void multiply_rows(const uint32_t (&x)[kXWords<X>], SumOf<X> (&sums)[2][4]) const {
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
      const uint32_t b[2] = {x[half * 2], x[half * 2 + 1]};
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        if constexpr (kHalves == 1)
          multiply(sums[j], a[j][half], b);
        else
          multiply<X>(sums[j], a[j][half], b);
      }
    }
  }
};

// ---- the fold (ops.h) -----------------------------------------------------------------------------------------------

// What the groups of a column have, for one group.
struct FoldColumn {
  float scale;
  int32_t zero;      // integer zero point
  float float_zero;  // or a floating one
  int32_t code_sum;  // of the codes
};

// The sum of the codes of group g of column n, without what was added to codes of four bits.
__device__ __forceinline__ int32_t sum_of_codes(const WeightOnlyArgs& a, int bits, int64_t g, int64_t n) {
  const int32_t sum = a.code_sums[sum_place(bits, a.groups, a.padded_n, g, n)];
  if (bits == 8) return sum;
  const int64_t group = a.groups == 1 ? a.weight_k : int64_t{kStepK} << a.group_shift, left = a.weight_k - g * group;
  return sum - 8 * static_cast<int32_t>(left < group ? left : group);
}

// Whether sums need a correction or have an addend beside them: what fold_group's kPlain leaves out.
__device__ __forceinline__ bool is_plain(const WeightOnlyArgs& a) { return a.row_zero == nullptr && a.row_sum == nullptr; }

// Folds the exact sum of a group into y.
template <bool kPlain>
__device__ __forceinline__ float fold_group(const WeightOnlyArgs& a, int32_t sum, const FoldColumn& column, float row_scale,
                                            int32_t row_zero, int32_t row_sum, float y) {
  uint32_t exact = static_cast<uint32_t>(sum);  // modulo 2^32 in between
  if constexpr (!kPlain)
    exact -= static_cast<uint32_t>(row_zero) * static_cast<uint32_t>(column.code_sum) +
             static_cast<uint32_t>(column.zero) * static_cast<uint32_t>(row_sum);
  y = fused(static_cast<float>(static_cast<int32_t>(exact)), row_scale * column.scale, y);
  if constexpr (!kPlain)
    if (a.float_zero != nullptr) y = fused(static_cast<float>(row_sum), row_scale * column.float_zero, y);
  return y;
}

// ---- results --------------------------------------------------------------------------------------------------------

template <class Use>
__device__ __forceinline__ void with_result_type(DType dtype, const Use& use) {
  switch (dtype) {
    case DType::kFloat32: return use(static_cast<float*>(nullptr));
    case DType::kFloat16: return use(static_cast<Half*>(nullptr));
    default: return use(static_cast<BFloat16*>(nullptr));
  }
}

__device__ __forceinline__ float bias_of(const WeightOnlyArgs& a, int64_t n) {
  return a.bias != nullptr && n < a.N ? a.bias[n] : -0.0f;  // adding -0 changes nothing
}

__device__ __forceinline__ void store_result(const WeightOnlyArgs& a, int64_t m, int64_t n, float value) {
  with_result_type(a.y_dtype, [&](auto* type) {
    using Y = std::remove_pointer_t<decltype(type)>;
    static_cast<Y*>(a.y)[m * a.y_stride + n] = rounded_to<Y>(value);
  });
}

// Where results go, four neighbouring columns from a multiple of four on at a time.
struct ResultTensor {
  void* y;
  DType dtype;
  int64_t stride;
  bool vectors;
};

__device__ __forceinline__ void store_results(const ResultTensor& to, int64_t N, int64_t m, int64_t n,
                                              const float (&values)[kLaneColumns]) {
  with_result_type(to.dtype, [&](auto* type) {
    using Y = std::remove_pointer_t<decltype(type)>;
    Y results[kLaneColumns];
#pragma unroll
    for (int c = 0; c < kLaneColumns; ++c) results[c] = rounded_to<Y>(values[c]);
    Y* const y = static_cast<Y*>(to.y) + m * to.stride + n;
    if (to.vectors && n + kLaneColumns <= N) return store_vector<kLaneColumns>(y, results);
#pragma unroll
    for (int c = 0; c < kLaneColumns; ++c)
      if (n + c < N) y[c] = results[c];
  });
}

}  // namespace quant_ops
