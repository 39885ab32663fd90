// choose_qparams_affine, quantize_affine and dequantize_affine on the CPU, with torchao's bits (contract/affine.h).
//
// What every element of a block needs, a factor and an offset, is computed once for all blocks. Contiguous runs of dtypes up to
// float32 go to the vector kernels (kernels/generic/affine.h), strided ones are gathered first. Scales of float64, zero points that
// are wider than the rest or have fractions, and codes at the end of what their dtype holds go element by element through double.
#include <type_traits>

#include "contract/affine.h"
#include "cpu/ranges.h"
#include "kernels/log.h"

namespace quant_ops {
namespace {

constexpr int64_t kElementsPerThread = int64_t{1} << 15;
constexpr int64_t kBlocksPerThread = int64_t{1} << 12;

template <bool kQuantize>
AffineBlock block_of(const AffineParams& p, int64_t block) {
  return kQuantize ? quantize_affine_block(p, block) : dequantize_affine_block(p, block);
}

template <bool kQuantize>
AffineDTypes dtypes_of(const AffineParams& p) {
  return kQuantize ? quantize_affine_dtypes(p) : dequantize_affine_dtypes(p);
}

// Whether to_dtype holds the code that elements saturate to: one that torch rounds to a narrow dtype can be beyond it.
bool holds_codes(const AffineParams& p, DType computed_in) {
  const double hi = rounded(p.qmax, computed_in), lo = rounded(p.qmin, computed_in);
  switch (p.to_dtype) {
    case DType::kInt8: return lo >= INT8_MIN && hi <= INT8_MAX;
    case DType::kUInt8: return lo >= 0 && hi <= UINT8_MAX;
    case DType::kInt16: return lo >= INT16_MIN && hi <= INT16_MAX;
    default: return true;  // the kernel wraps
  }
}

// Whether codes are whole numbers before they are cast: a cast does not round them as the kernels do.
bool has_whole_codes(const AffineParams& p) {
  if (p.zero_is_integer || p.domain == ZeroPointDomain::kFloat) return true;
  for (int64_t b = 0; b < p.blocks; ++b) {
    const double zero = load_number(p.zero_point, b, p.zero_dtype);
    if (zero != round_even(zero)) return false;
  }
  return true;
}

template <bool kQuantize>
bool takes_vectors(const AffineParams& p) {
  if (p.scale_dtype == DType::kFloat64 || (p.zero_point != nullptr && p.zero_dtype == DType::kFloat64)) return false;
  const AffineDTypes t = dtypes_of<kQuantize>(p);
  return !kQuantize || (t.product == t.sum && holds_codes(p, t.sum) && has_whole_codes(p));
}

// ---- vector kernels -------------------------------------------------------------------------------------------------

template <bool kQuantize>
class AffineVectors {
 public:
  AffineVectors(const AffineParams& p, const Iteration& it)
      : p_(p), it_(it), padded_(round_up(p.blocks * 4, 64)), scratch_(2 * padded_), table_(kernels()) {
    float *factor = scratch_.at<float>(0), *offset = scratch_.at<float>(padded_);
    parallel_for(p.blocks, kBlocksPerThread, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) {
        const AffineBlock block = block_of<kQuantize>(p, b);
        factor[b] = block.factor == block.factor ? static_cast<float>(block.factor) : NAN;
        offset[b] = block.offset == block.offset ? static_cast<float>(block.offset) : NAN;
      }
    });
    factor_ = factor;
    offset_ = offset;
    const DType computed_in = dtypes_of<kQuantize>(p).sum;
    shared_.from_dtype = p.from_dtype;
    shared_.to_dtype = p.to_dtype;
    shared_.domain = p.domain;
    shared_.narrow = computed_in != DType::kFloat32;
    shared_.lo = static_cast<float>(rounded(p.qmin, computed_in));
    shared_.hi = static_cast<float>(rounded(p.qmax, computed_in));
    shared_.mid = static_cast<float>(mid_point(p.qmin, p.qmax));
  }

  void run() const {
    log_entries({kQuantize ? "quantize_affine" : "dequantize_affine"});
    const bool in_place =
        it_.ndim == 0 || (inner_stride(it_, 0) == 1 && inner_stride(it_, 1) == 1 && is_step(inner_stride(it_, 2)));
    parallel_for(numel(it_), kElementsPerThread,
                 [&](int64_t begin, int64_t end) { in_place ? rows(begin, end) : strided(begin, end); });
  }

 private:
  void call(const AffineRun& run) const { kQuantize ? table_.quantize_affine(run) : table_.dequantize_affine(run); }

  void rows(int64_t begin, int64_t end) const {
    AffineRun run = shared_;
    run.from_row = row_stride(it_, 0);
    run.to_row = row_stride(it_, 1);
    run.block_row = row_stride(it_, 2);
    run.step = inner_stride(it_, 2) == 0 ? 0 : 1;
    for_each_block(it_, begin, end, [&](const int64_t* offset, int64_t rows, int64_t n) {
      run.from = element(p_.from, p_.from_dtype, offset[0]);
      run.to = element(p_.to, p_.to_dtype, offset[1]);
      run.factor = factor_ + offset[2];
      run.offset = offset_ + offset[2];
      run.rows = rows;
      run.n = n;
      call(run);
    });
  }

  void strided(int64_t begin, int64_t end) const {
    const int64_t from_step = inner_stride(it_, 0), to_step = inner_stride(it_, 1), block_step = inner_stride(it_, 2);
    with_storage(p_.from_dtype, [&](auto* from_type) {
      with_storage(p_.to_dtype, [&](auto* to_type) {
        using From = std::remove_pointer_t<decltype(from_type)>;
        using To = std::remove_pointer_t<decltype(to_type)>;
        Stage<From> from;
        Stage<float> factors, offsets;
        To to[kStage];
        AffineRun run = shared_;
        run.to = to;
        run.step = block_step == 0 ? 0 : 1;
        for_each_run(it_, begin, end, [&](const int64_t* offset, int64_t count) {
          for (int64_t i = 0; i < count; i += kStage) {
            const int64_t n = run.n = std::min(kStage, count - i), block = offset[2] + i * block_step;
            run.from = from.contiguous(static_cast<const From*>(p_.from) + offset[0] + i * from_step, from_step, n);
            run.factor = factors.stepping(factor_ + block, block_step, n);
            run.offset = offsets.stepping(offset_ + block, block_step, n);
            call(run);
            scatter(to, to_step, n, static_cast<To*>(p_.to) + offset[1] + i * to_step);
          }
        });
      });
    });
  }

  // Unsigned integers as wide as the dtype's elements: to move them.
  template <class F>
  static void with_storage(DType dtype, const F& f) {
    switch (dtype_bytes(dtype)) {
      case 1: return f(static_cast<uint8_t*>(nullptr));
      case 2: return f(static_cast<uint16_t*>(nullptr));
      default: return f(static_cast<uint32_t*>(nullptr));
    }
  }

  const AffineParams& p_;
  const Iteration& it_;
  const int64_t padded_;
  const Scratch scratch_;
  const KernelTable& table_;
  const float* factor_;
  const float* offset_;
  AffineRun shared_;
};

// ---- element by element ---------------------------------------------------------------------------------------------

template <bool kQuantize>
void element_by_element(const AffineParams& p, const Iteration& it) {
  log_kernel(one_by_one);
  const AffineDTypes t = dtypes_of<kQuantize>(p);
  parallel_for(numel(it), kElementsPerThread, [&](int64_t begin, int64_t end) {
    for_each_run(it, begin, end, [&](const int64_t* offset, int64_t n) {
      AffineBlock block = block_of<kQuantize>(p, offset[2]);
      for (int64_t i = 0; i < n; ++i) {
        if (inner_stride(it, 2) != 0) block = block_of<kQuantize>(p, offset[2] + i * inner_stride(it, 2));
        const double v = load_number(p.from, offset[0] + i * inner_stride(it, 0), p.from_dtype);
        const int64_t at = offset[1] + i * inner_stride(it, 1);
        if constexpr (kQuantize)
          store_wrapped(p.to, at, p.to_dtype, false, quantize_affine_element(v, block, p, t));
        else
          store_rounded(p.to, at, p.to_dtype, dequantize_affine_element(v, block, p, t));
      }
    });
  });
}

template <bool kQuantize>
void run_affine(const AffineParams& p) {
  Iteration it = p.it;
  sort_and_coalesce(&it, 1);
  takes_vectors<kQuantize>(p) ? AffineVectors<kQuantize>(p, it).run() : element_by_element<kQuantize>(p, it);
}

}  // namespace

void quantize_affine_cpu(const AffineParams& p) { run_affine<true>(p); }
void dequantize_affine_cpu(const AffineParams& p) { run_affine<false>(p); }

void choose_qparams_affine_cpu(const ChooseAffineParams& p) {
  with_float_type(p.x_dtype, [&](auto* x) {
    using X = std::remove_pointer_t<decltype(x)>;
    if constexpr (!std::is_same_v<X, double>)
      for_each_range<X>(p.x, p.x_dtype, p.range, [&](int64_t block, const MinMax<float>& r) {
        store_affine_qparams<X>(r.nan ? NAN : r.min, r.nan ? NAN : r.max, p.choice, block);
      });
  });
}

}  // namespace quant_ops
