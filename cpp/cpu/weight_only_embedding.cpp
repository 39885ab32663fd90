// weight_only_embedding on the CPU (the formula is in ops.h): each index gathers the codes of its column, from the packed weight or
// from the plain one, a run of a group at a time, and dequantizes them. Columns of a packed weight lie side by side, so that a
// lookup reads four bytes of a cache line. Read next: contract/weight_only_layout.h.
#include <algorithm>
#include <cstring>

#include "cpu/parallel.h"
#include "cpu/weight_only.h"
#include "kernels/log.h"

namespace quant_ops {
namespace {

constexpr int64_t kRunCodes = 256;  // on the stack; a multiple of eight k, whose codes lie together
constexpr int64_t kAhead = 32;      // words of the column fetched ahead: each is in another cache line
constexpr int64_t kElementsPerThread = int64_t{1} << 14;

// What the codes of a run are dequantized by: those of four bits are 8 too large in a packed weight.
struct Step {
  float scale;
  int32_t zero;
  float float_zero;
};

class Embedding {
 public:
  explicit Embedding(const WeightOnlyEmbeddingParams& p)
      : p_(p), table_(kernels()), layout_(weight_only_layout(p.N, p.K, p.bits, p.group)) {}

  void look_up(int64_t m) const {
    const int64_t n = p_.index_is_int64 ? static_cast<const int64_t*>(p_.index)[m] : static_cast<const int32_t*>(p_.index)[m];
    ColumnWords words{};
    if (p_.packed) words = column_words(layout_.codes(p_.packed, 0), p_.bits, layout_.column_bytes, layout_.padded_n, n);
    int8_t codes[kRunCodes];
    for (int64_t g = 0; g < layout_.groups; ++g) {
      const Step step = step_of(n, g);
      for (int64_t k = g * layout_.group, count; k < layout_.group_end(g); k += count) {
        count = std::min(kRunCodes, layout_.group_end(g) - k);
        const int8_t* from = codes;
        if (!p_.packed)
          from = p_.weight + n * p_.weight_stride + k;
        else if (p_.bits == 4)
          unpack_nibbles(words, k, count, codes);
        else
          unpack_bytes(words, k, count, codes);
        dequantize(from, count, step, m * p_.K + k);
      }
    }
  }

 private:
  Step step_of(int64_t n, int64_t g) const {
    const int64_t zero_at = n * p_.zero_stride[0] + g * p_.zero_stride[1];
    return {.scale = p_.scale[n * p_.scale_stride[0] + g * p_.scale_stride[1]],
            .zero = (p_.zero_point ? p_.zero_point[zero_at] : 0) + (p_.packed && p_.bits == 4 ? 8 : 0),
            .float_zero = p_.float_zero ? p_.float_zero[zero_at] : 0.0f};
  }

  // Codes k to k + count - 1; k is a multiple of eight.
  static void unpack_nibbles(const ColumnWords& words, int64_t k, int64_t count, int8_t* to) {
    const int8_t* from = words.first + k / 8 * words.step;
    for (int64_t i = 0; i < count; i += 8, from += words.step) {
      uint32_t both;
      std::memcpy(&both, from, sizeof(both));
      __builtin_prefetch(from + kAhead * words.step);
      const uint32_t low = both & 0x0f0f0f0fu, high = both >> 4 & 0x0f0f0f0fu;
      std::memcpy(to + i, &low, sizeof(low));
      std::memcpy(to + i + 4, &high, sizeof(high));
    }
  }
  static void unpack_bytes(const ColumnWords& words, int64_t k, int64_t count, int8_t* to) {
    const int8_t* from = words.first + k / 4 * words.step;
    for (int64_t i = 0; i < count; i += 4, from += words.step) {
      __builtin_prefetch(from + kAhead * words.step);
      std::memcpy(to + i, from, 4);
    }
  }

  void dequantize(const int8_t* codes, int64_t count, const Step& step, int64_t at) const {
    float buffer[kRunCodes + 16];  // `store` reads whole vectors
    float* y = p_.y_dtype == DType::kFloat32 ? static_cast<float*>(p_.y) + at : buffer;
    if (p_.float_zero)
      for (int64_t i = 0; i < count; ++i) y[i] = static_cast<float>(codes[i] - step.zero) * step.scale + step.float_zero;
    else
      for (int64_t i = 0; i < count; ++i) y[i] = static_cast<float>(codes[i] - step.zero) * step.scale;
    if (y != buffer) return;
    table_.store({.from = buffer,
                  .from_stride = 0,
                  .rows = 1,
                  .columns = count,
                  .y = static_cast<uint16_t*>(p_.y) + at,
                  .dtype = p_.y_dtype,
                  .y_stride = 0});
  }

  const WeightOnlyEmbeddingParams& p_;
  const KernelTable& table_;
  const WeightOnlyLayout layout_;
};

}  // namespace

void weight_only_embedding_cpu(const WeightOnlyEmbeddingParams& p) {
  if (p.M == 0 || p.K == 0) return;
  log_entries({"store"});
  const Embedding embedding(p);
  parallel_for(p.M, std::max<int64_t>(1, kElementsPerThread / p.K), [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m) embedding.look_up(m);
  });
}

}  // namespace quant_ops
