// int8_max_pool2d, int8_avg_pool2d and int8_adaptive_avg_pool2d on the CPU (ops.h has the windows and the formulas), a row of the
// result at a time.
//
// Where channels are neighbours, a kernel takes all channels of a window at once, and of windows that lie inside the image a whole
// row. Where columns are, the rows of a window become one first, by the same kernels, and then the columns; so do the largest of
// few channels, which would not fill a vector.
#include <algorithm>
#include <cstring>

#include "cpu/parallel.h"
#include "cpu/scratch.h"
#include "cpu/staging.h"
#include "kernels/log.h"
#include "kernels/table.h"

namespace quant_ops {
namespace {

constexpr int64_t kTapsPerThread = int64_t{1} << 19;
constexpr int64_t kFewChannels = 63;     // less than the longest vector of codes
constexpr int64_t kSumsTogether = 4096;  // of neighbouring pixels, which are converted at one time

struct Inside {
  int64_t begin, end;
};

// The windows whose taps are all in the image, which are neighbours.
Inside inside_of(const PoolAxis& a) {
  Inside in{0, a.out};
  while (in.begin < in.end && pool_window(a, in.begin).taps < a.kernel) ++in.begin;
  while (in.begin < in.end && pool_window(a, in.end - 1).taps < a.kernel) --in.end;
  return in;
}

// All taps of all windows, about.
int64_t work_of(const PoolShape& s) {
  double work = static_cast<double>(s.N * s.C);
  for (const PoolAxis& a : {s.h, s.w}) {
    const int64_t taps = a.kernel == 0 ? a.size / std::max<int64_t>(1, a.out) + 1 : std::min(a.kernel, a.size);
    work *= static_cast<double>(a.out) * static_cast<double>(taps);
  }
  return static_cast<int64_t>(std::min(work, 0x1p60));
}

// ---- maxima ---------------------------------------------------------------------------------------------------------

class MaxPool {
 public:
  explicit MaxPool(const MaxPoolParams& p)
      : p_(p),
        s_(p.shape),
        channels_(p.shape.y_channels_last),
        few_channels_(channels_ && s_.C <= kFewChannels && s_.x_stride[1] == 1 && s_.x_stride[3] == s_.C),
        inside_(inside_of(p.shape.w)),
        table_(kernels()) {}

  // Of the scratch of one thread: the largest codes of columns, and of a few channels those of neighbouring columns too.
  int64_t line_bytes() const { return few_channels_ ? 2 * s_.w.size * s_.C : channels_ ? 0 : s_.w.size; }

  // Row `row` of the result, counted over all samples, or over all channels of all samples.
  void row(int64_t row, uint8_t* line) const {
    const PoolWindow h = pool_window(s_.h, row % s_.h.out);
    if (few_channels_ && h.taps > 0 && inside_.begin < inside_.end) return of_few_channels(row, h, line);
    channels_ ? of_channels(row, h) : of_columns(row, h, line);
  }

 private:
  int least() const { return p_.dtype == DType::kInt8 ? -128 : 0; }

  MaxRun rows_of(const PoolWindow& h) const {
    return {.dtype = p_.dtype, .rows = h.taps, .row = s_.h.dilation * s_.x_stride[2], .taps = 1, .pixels = 1};
  }

  void of_channels(int64_t row, const PoolWindow& h) const {
    const int64_t sample = row / s_.h.out;
    const uint8_t* const x = static_cast<const uint8_t*>(p_.x) + sample * s_.x_stride[0] + h.first * s_.x_stride[2];
    uint8_t* const y = static_cast<uint8_t*>(p_.y) + row * s_.w.out * s_.C;
    MaxRun run = rows_of(h);
    run.tap = s_.w.dilation * s_.x_stride[3];
    run.n = run.y_pixel = s_.C;
    run.x_pixel = s_.w.stride * s_.x_stride[3];
    for (int64_t ow = 0; ow < s_.w.out; ow += run.pixels) {
      const PoolWindow w = pool_window(s_.w, ow);
      run.pixels = ow == inside_.begin && inside_.end > ow ? inside_.end - ow : 1;
      run.taps = w.taps;
      run.x = x + w.first * s_.x_stride[3];
      run.y = y + ow * s_.C;
      if (h.taps * w.taps == 0)
        std::memset(run.y, least(), static_cast<size_t>(s_.C));
      else
        table_.max_pool(run);
    }
  }

  void of_few_channels(int64_t row, const PoolWindow& h, uint8_t* line) const {
    const int64_t C = s_.C, width = s_.w.size * C, tap = s_.w.dilation * C, sample = row / s_.h.out;
    uint8_t* const y = static_cast<uint8_t*>(p_.y) + row * s_.w.out * C;
    uint8_t* const windows = line + width;  // that of the window which begins at each column
    MaxRun run = rows_of(h);
    run.x = static_cast<const uint8_t*>(p_.x) + sample * s_.x_stride[0] + h.first * s_.x_stride[2];
    run.n = width;
    run.y = line;
    table_.max_pool(run);
    run.rows = 1;
    run.tap = tap;
    run.taps = s_.w.kernel;
    run.x = line;
    run.n = width - (s_.w.kernel - 1) * tap;
    run.y = windows;
    table_.max_pool(run);
    run.n = C;
    for (int64_t ow = 0; ow < s_.w.out; ++ow) {
      if (ow >= inside_.begin && ow < inside_.end) {
        copy_bytes(y + ow * C, windows + (ow * s_.w.stride - s_.w.pad) * C, C);
        continue;
      }
      const PoolWindow w = pool_window(s_.w, ow);
      run.taps = w.taps;
      run.x = line + w.first * C;
      run.y = y + ow * C;
      if (w.taps == 0)
        std::memset(run.y, least(), static_cast<size_t>(C));
      else
        table_.max_pool(run);
    }
  }

  void of_columns(int64_t row, const PoolWindow& h, uint8_t* line) const {
    const int64_t plane = row / s_.h.out;
    const uint8_t* const x = static_cast<const uint8_t*>(p_.x) + plane / s_.C * s_.x_stride[0] + plane % s_.C * s_.x_stride[1];
    uint8_t* const y = static_cast<uint8_t*>(p_.y) + row * s_.w.out;
    if (h.taps == 0) {
      std::memset(y, least(), static_cast<size_t>(s_.w.out));
      return;
    }
    MaxRun run = rows_of(h);
    run.x = x + h.first * s_.x_stride[2];
    run.n = s_.w.size;
    run.y = line;
    table_.max_pool(run);
    p_.dtype == DType::kInt8 ? columns(reinterpret_cast<const int8_t*>(line), reinterpret_cast<int8_t*>(y)) : columns(line, y);
  }

  template <class T>
  void columns(const T* line, T* y) const {
    for (int64_t ow = 0; ow < s_.w.out;) {
      const bool inside = ow >= inside_.begin && ow < inside_.end;
      if (inside && s_.w.stride == 1) {
        MaxRun run{.dtype = p_.dtype, .rows = 1, .taps = s_.w.kernel, .tap = s_.w.dilation, .n = inside_.end - ow, .pixels = 1};
        run.x = line + ow - s_.w.pad;
        run.y = y + ow;
        table_.max_pool(run);
        ow = inside_.end;
        continue;
      }
      const PoolWindow w = inside ? PoolWindow{ow * s_.w.stride - s_.w.pad, s_.w.kernel, 0} : pool_window(s_.w, ow);
      T most = static_cast<T>(least());
      for (int64_t t = 0; t < w.taps; ++t) most = std::max(most, line[w.first + t * s_.w.dilation]);
      y[ow++] = most;
    }
  }

  const MaxPoolParams& p_;
  const PoolShape& s_;
  const bool channels_, few_channels_;
  const Inside inside_;
  const KernelTable& table_;
};

// ---- averages -------------------------------------------------------------------------------------------------------

class AvgPool {
 public:
  explicit AvgPool(const AvgPoolParams& p) : p_(p), s_(p.shape), channels_(p.shape.y_channels_last), table_(kernels()) {
    run_.x_dtype = DType::kInt32;
    run_.function = Function::kNone;
    run_.y_dtype = p.out.dtype;
    run_.out_scale = p.out.scale ? *p.out.scale : 1.0f;
    run_.out_zero_point = p.out.zero_point ? *p.out.zero_point : 0;
  }

  // Of the scratch of one thread: the sums of neighbouring pixels, or of the columns and then of a row of the result.
  int64_t sums() const {
    return round_up(channels_ ? std::max(s_.C, std::min(kSumsTogether, s_.w.out * s_.C)) : s_.w.size + s_.w.out, 16);
  }

  void row(int64_t row, int32_t* sums) const {
    const PoolWindow h = pool_window(s_.h, row % s_.h.out);
    channels_ ? of_channels(row, h, sums) : of_columns(row, h, sums);
  }

 private:
  SumRun rows_of(const PoolWindow& h) const { return {.dtype = p_.dtype, .rows = h.taps, .row = s_.x_stride[2], .taps = 1}; }

  void of_channels(int64_t row, const PoolWindow& h, int32_t* sums) const {
    const int64_t sample = row / s_.h.out, most = std::max<int64_t>(1, kSumsTogether / std::max<int64_t>(1, s_.C));
    const uint8_t* const x = static_cast<const uint8_t*>(p_.x) + sample * s_.x_stride[0] + h.first * s_.x_stride[2];
    SumRun run = rows_of(h);
    run.tap = s_.x_stride[3];
    run.n = s_.C;
    for (int64_t ow = 0; ow < s_.w.out;) {
      const int64_t first = ow;
      const PoolWindow like = pool_window(s_.w, first);
      for (; ow < s_.w.out && ow - first < most; ++ow) {
        const PoolWindow w = pool_window(s_.w, ow);
        if (!alike(w, like)) break;
        run.taps = w.taps;
        run.x = x + w.first * s_.x_stride[3];
        run.sums = sums + (ow - first) * s_.C;
        table_.sum_pool(run);
      }
      finish(h, like, sums, (ow - first) * s_.C, (row * s_.w.out + first) * s_.C);
    }
  }

  void of_columns(int64_t row, const PoolWindow& h, int32_t* line) const {
    const int64_t plane = row / s_.h.out;
    const uint8_t* const x = static_cast<const uint8_t*>(p_.x) + plane / s_.C * s_.x_stride[0] + plane % s_.C * s_.x_stride[1];
    SumRun run = rows_of(h);
    run.x = x + h.first * s_.x_stride[2];
    run.n = s_.w.size;
    run.sums = line;
    table_.sum_pool(run);
    int32_t* const sums = line + s_.w.size;
    for (int64_t ow = 0; ow < s_.w.out;) {
      const int64_t first = ow;
      const PoolWindow like = pool_window(s_.w, first);
      for (; ow < s_.w.out; ++ow) {
        const PoolWindow w = pool_window(s_.w, ow);
        if (!alike(w, like)) break;
        int32_t sum = 0;
        for (int64_t t = 0; t < w.taps; ++t) sum += line[w.first + t];
        sums[ow] = sum;
      }
      finish(h, like, sums + first, ow - first, row * s_.w.out + first);
    }
  }

  static bool alike(const PoolWindow& a, const PoolWindow& b) { return a.taps == b.taps && a.counted == b.counted; }

  // Results at .. at + n - 1 of y from the sums of windows of the same sizes.
  void finish(const PoolWindow& h, const PoolWindow& w, const int32_t* sums, int64_t n, int64_t at) const {
    const int64_t taps = h.taps * w.taps, counted = h.counted * w.counted;
    const int64_t count = p_.divisor != 0 ? p_.divisor : p_.counts_padding ? counted : taps;
    PointwiseRun run = run_;
    run.n = n;
    run.x = sums;
    run.x_scale = *p_.x_scale / static_cast<float>(count);
    run.x_zero_point = static_cast<int32_t>(taps * (p_.x_zero_point ? *p_.x_zero_point : 0));
    run.y = static_cast<char*>(p_.out.y) + at * dtype_bytes(p_.out.dtype);
    table_.pointwise(run);
  }

  const AvgPoolParams& p_;
  const PoolShape& s_;
  const bool channels_;
  const KernelTable& table_;
  PointwiseRun run_{};
};

// row(index, scratch of the thread) for every row of the result.
template <class T, class Row>
void for_each_row(const PoolShape& s, int64_t scratch_elements, const Row& row) {
  if (s.C == 0) return;
  const int64_t rows = s.N * s.h.out * (s.y_channels_last ? 1 : s.C), threads = parallel_threads();
  const int64_t bytes = round_up(scratch_elements * static_cast<int64_t>(sizeof(T)), 64);
  const Scratch scratch(threads * bytes);
  for_each_share(rows, threads, work_of(s), kTapsPerThread, [&](int64_t worker, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) row(i, scratch.at<T>(worker * bytes));
  });
}

}  // namespace

void max_pool2d_cpu(const MaxPoolParams& p) {
  log_entries({"max_pool"});
  const MaxPool pool(p);
  for_each_row<uint8_t>(p.shape, pool.line_bytes(), [&](int64_t i, uint8_t* line) { pool.row(i, line); });
}

void avg_pool2d_cpu(const AvgPoolParams& p) {
  log_entries({"sum_pool", "pointwise"});
  const AvgPool pool(p);
  for_each_row<int32_t>(p.shape, pool.sums(), [&](int64_t i, int32_t* sums) { pool.row(i, sums); });
}

}  // namespace quant_ops
