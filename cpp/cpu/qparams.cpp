// choose_qparams on the CPU: the scale and zero point of every slice from the range of its data (choose_qparams_of in
// arithmetic.h). Read next: ranges.h.
#include "cpu/ranges.h"

namespace quant_ops {

void choose_qparams_cpu(const ChooseQParams& p) {
  with_float_type(p.x_dtype, [&](auto* x) {
    using X = std::remove_pointer_t<decltype(x)>;
    using T = Compute<X>;
    for_each_range<X>(p.x, p.x_dtype, p.range, [&](int64_t at, const MinMax<T>& r) {
      const auto q = choose_qparams_of<T>(r.min, r.max, r.finite, p.qmin, p.qmax, p.asymmetric);
      static_cast<T*>(p.scale)[at] = q.scale;
      p.zero_point[at] = q.zero_point;
    });
  });
}

}  // namespace quant_ops
