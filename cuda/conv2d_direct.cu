// Convolutions of few channels on CUDA: those of an image's three channels, and grouped ones. A block quantizes the tile of the
// input under a tile of the output into shared memory, so that codes never pass through global memory, and multiplies it by
// mma.sync where it lies: a word of a fragment is four channels of a pixel, whatever the tap, and its place there is
//
//   tile[row * stride + r * dilation][column * stride + s * dilation][channels / 4]    for word k = (r, s, channels / 4) of an
//   output pixel
//
// so that no matrix of taps is ever written. Sixteen neighbouring output channels share their input channels: they belong to one
// group, or to several, whose weights then are a block-diagonal matrix. A block keeps the weights of its output channels in shared
// memory in the order of the fragments and goes from tile to tile. Bits are those of cpp/cpu/conv2d.cpp. Read next: conv2d.cu.
#include <algorithm>

#include "conv2d.cuh"
#include "device/encode.cuh"
#include "device/machine.cuh"

namespace quant_ops {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / kWarp;
constexpr int kPair = 16;      // columns of two mma, of which a thread gets four neighbours
constexpr int kUnit = 32;      // pixels of a warp at a time
constexpr int kStepWords = 8;  // of k, by one mma
constexpr int kColumns = 64;   // the most of a block
constexpr int kMostBytes = 100 << 10;

struct DirectArgs {
  static constexpr bool kBarriers = true;
  InputParams in;
  int64_t x_stride[4];
  const int8_t* padding;  // as in TileArgs of conv2d_depthwise.cu
  Epilogue out;
  const int8_t* weight;  // [O][row_bytes], of CudaWeights
  int64_t row_bytes, tap_bytes;
  DirectTile t;
  int32_t channels, height, width, out_height, out_width, outputs;
  int32_t s, stride[2], pad[2], dilation[2];
  int32_t words, steps;           // of k: words that exist, steps of eight
  int32_t in_rows, in_columns;    // of the input tile
  int32_t group_columns, joined;  // columns of a group of the weight; groups that are joined in its rows
  FastDiv column_blocks, column_tiles, row_tiles, tile_columns, tile_words, in_width;
  int32_t columns_at, offsets_at, tile_at;  // words of shared memory
  uint32_t tiles, abreast;                  // of pixels; that blocks of the same columns take at the same time
  bool channels_last;                       // of x
  bool whole;                               // fours of channels of x are contiguous and aligned
};

// The block's shared memory. Addresses are made where they are needed, which takes fewer registers than to keep them.
struct Shared {
  const DirectArgs& a;

  __device__ __forceinline__ uint32_t* words(int32_t at) const { return reinterpret_cast<uint32_t*>(shared_memory()) + at; }
  __device__ __forceinline__ uint32_t* weight() const { return words(0); }  // [pass][step][pair][lane][4]
  __device__ __forceinline__ float* scale() const { return reinterpret_cast<float*>(words(a.columns_at)); }
  __device__ __forceinline__ float* bias() const { return scale() + a.t.columns; }
  __device__ __forceinline__ int32_t* start() const {  // sums without products
    return reinterpret_cast<int32_t*>(words(a.columns_at + 2 * a.t.columns));
  }
  __device__ __forceinline__ int32_t* place() const { return start() + a.t.columns; }  // sample, oh, ow
  __device__ __forceinline__ int32_t* offsets() const {                                // of the words of k from a pixel's first tap
    return reinterpret_cast<int32_t*>(words(a.offsets_at));
  }
  __device__ __forceinline__ uint32_t* tile() const { return words(a.tile_at); }  // [in_rows][in_columns][pitch]
};

struct TilePlace {
  int32_t sample, oh, ow;
};

__device__ __forceinline__ TilePlace tile_place(const DirectArgs& a, uint32_t tile) {
  const int64_t rows = a.column_tiles.quotient(tile), sample = a.row_tiles.quotient(rows);
  return {static_cast<int32_t>(sample), static_cast<int32_t>(rows - sample * a.row_tiles.divisor) * a.t.tile_rows,
          static_cast<int32_t>(tile - rows * a.column_tiles.divisor) * a.t.tile_columns};
}

// ---- weights --------------------------------------------------------------------------------------------------------

// The column of a pair that column `j` of its mma `half` makes: a thread has columns 2 t and 2 t + 1 of both, which become its
// four.
__device__ __forceinline__ int32_t column_of(int32_t half, int32_t j) { return j / 2 * 4 + half * 2 + j % 2; }

// Word `word` of a row of the weight for column o; 0 where there is none.
__device__ __forceinline__ uint32_t weight_word(const DirectArgs& a, int32_t o, int32_t word) {
  if (o >= a.outputs || word >= a.words) return 0;
  const int32_t tap = word / a.t.words, within = word - tap * a.t.words;
  const int32_t group = o / a.group_columns % a.joined, first = group - group % a.t.joined;  // of those that share channels
  const int64_t at = o * a.row_bytes + tap * a.tap_bytes + first * a.t.group_channels + within * 4;
  return load_vector<4>(a.weight + at).words.at[0];
}

__device__ __forceinline__ void load_weights(const DirectArgs& a, const Shared& shared, int32_t column) {
  const int32_t pairs = a.t.pairs, total = a.t.columns * a.steps * kStepWords;
  for (int32_t i = static_cast<int32_t>(threadIdx.x); i < total; i += kThreads) {
    const int32_t lane = i / 4 % kWarp, part = i % 4, block = i / (4 * kWarp);
    const int32_t pair = block % pairs, step = block / pairs % a.steps, pass = block / pairs / a.steps;
    const int32_t o = column + (pass * pairs + pair) * kPair + column_of(part / 2, lane / 4);
    shared.weight()[i] = weight_word(a, o, step * kStepWords + part % 2 * 4 + lane % 4);
  }
  for (int32_t i = static_cast<int32_t>(threadIdx.x); i < a.steps * kStepWords; i += kThreads) {
    const int32_t tap = i / a.t.words, r = tap / a.s, s = tap - r * a.s;
    const int32_t place = (r * a.dilation[0] * a.in_columns + s * a.dilation[1]) * a.t.pitch + i - tap * a.t.words;
    shared.offsets()[i] = i < a.words ? place : 0;
  }
}

// What the epilogue needs of the block's columns for a sample: scales are multiplied and zero points corrected but once.
__device__ __forceinline__ void load_columns(const DirectArgs& a, const Shared& shared, int32_t column, const TilePlace& at) {
  if (threadIdx.x == 0) store_vector<4>(shared.place(), {at.sample, at.oh, at.ow, 0});
  const OutputRow row = output_row(a.out, at.sample * a.out.rows.divisor);
  for (int32_t i = static_cast<int32_t>(threadIdx.x); i < a.t.columns; i += kThreads) {
    const bool exists = column + i < a.outputs;
    const OutputColumns<1> c = output_columns<1>(a.out, column + i, exists ? 1 : 0);
    shared.scale()[i] = row.scale * c.scale[0];
    shared.bias()[i] = c.bias[0];
    shared.start()[i] = static_cast<int32_t>(0u - static_cast<uint32_t>(row.zero) * static_cast<uint32_t>(c.sum[0]));
  }
}

// ---- input ----------------------------------------------------------------------------------------------------------

// Four channels of a pixel; those that do not exist become those of `zeros`.
template <class X>
__device__ __forceinline__ Vector<X, 4> load_four(const DirectArgs& a, const X* sample, int32_t channel, int32_t h, int32_t w,
                                                  const Vector<X, 4>& zeros) {
  const bool pixel =
      static_cast<uint32_t>(h) < static_cast<uint32_t>(a.height) && static_cast<uint32_t>(w) < static_cast<uint32_t>(a.width);
  if (!pixel || channel >= a.channels) return zeros;
  const X* at = sample + h * a.x_stride[2] + w * a.x_stride[3] + channel * a.x_stride[1];
  if (a.whole) return load_vector<4>(at);
  X elements[4];
#pragma unroll
  for (int c = 0; c < 4; ++c) elements[c] = channel + c < a.channels ? at[c * a.x_stride[1]] : zeros.get(c);
  Vector<X, 4> four;
  memcpy(&four.words, elements, sizeof(elements));
  return four;
}

// The input under a tile, as codes, from channel `channel` on. Pixels beside the image have the zero point's code. Channels that do
// not exist have any code: their weights are zeros.
template <class X>
__device__ __forceinline__ void load_input(const DirectArgs& a, const TilePlace& at, int32_t channel, uint32_t* to) {
  constexpr int kAtOnce = 4;
  const CodesOf<X> encode(a.in, at.sample, a.padding != nullptr ? a.padding[at.sample * kVectorBytes] : int8_t{0});
  const Vector<X, 4> zeros = encode.zeros();
  const X* x = static_cast<const X*>(a.in.x) + at.sample * a.x_stride[0];
  const FastDiv &inner = a.channels_last ? a.tile_words : a.in_width, &outer = a.channels_last ? a.in_width : a.tile_words;
  const int32_t top = at.oh * a.stride[0] - a.pad[0], left = at.ow * a.stride[1] - a.pad[1];
  const int32_t total = static_cast<int32_t>(inner.divisor * outer.divisor) * a.in_rows;
  for (int32_t i = static_cast<int32_t>(threadIdx.x); i < total; i += kAtOnce * kThreads) {
    Vector<X, 4> elements[kAtOnce];
    uint32_t* places[kAtOnce];
#pragma unroll
    for (int n = 0; n < kAtOnce; ++n) {
      const int64_t line = inner.quotient(i + n * kThreads), row = outer.quotient(line);
      const int32_t fast = static_cast<int32_t>(i + n * kThreads - line * inner.divisor);
      const int32_t slow = static_cast<int32_t>(line - row * outer.divisor), h = static_cast<int32_t>(row);
      const int32_t column = a.channels_last ? slow : fast, word = a.channels_last ? fast : slow;
      places[n] = to + (h * a.in_columns + column) * a.t.pitch + word;
      elements[n] = zeros;
      if (h < a.in_rows) elements[n] = load_four(a, x, channel + word * 4, top + h, left + column, zeros);
    }
    uint32_t codes[kAtOnce][4];
    encode(elements, codes);
#pragma unroll
    for (int n = 0; n < kAtOnce; ++n)
      if (i + n * kThreads < total) *places[n] = low_bytes(codes[n][0], codes[n][1], codes[n][2], codes[n][3]);
  }
}

// ---- products -------------------------------------------------------------------------------------------------------

// 32 pixels from `first` of the tile on, times the columns of a pass. `window` is the first word of their channels.
template <int kPairs>
struct Unit {
  int32_t sums[2][kPairs][2][4];  // [16 pixels][pair][mma]

  __device__ __forceinline__ void multiply_all(const DirectArgs& a, const Shared& shared, const uint32_t* window,
                                               const uint32_t* weight, int32_t first, int lane) {
    int32_t pixels[2][2];  // places of their first taps
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int32_t pixel = first + m * 16 + half * 8 + lane / 4, last = a.t.tile_rows * a.t.tile_columns - 1;
        const int32_t exists = pixel < last ? pixel : last, row = static_cast<int32_t>(a.tile_columns.quotient(exists));
        const int32_t column = exists - row * a.t.tile_columns;
        pixels[m][half] = (row * a.stride[0] * a.in_columns + column * a.stride[1]) * a.t.pitch;
      }
#pragma unroll 1
    for (int32_t step = 0; step < a.steps; ++step, weight += kPairs * kWarp * 4) {
      const int32_t *offsets = shared.offsets() + step * kStepWords + lane % 4, low = offsets[0], high = offsets[4];
      uint32_t codes[2][4];
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        codes[m][0] = window[pixels[m][0] + low];
        codes[m][1] = window[pixels[m][1] + low];
        codes[m][2] = window[pixels[m][0] + high];
        codes[m][3] = window[pixels[m][1] + high];
      }
#pragma unroll
      for (int p = 0; p < kPairs; ++p) {
        const auto both = load_vector<4>(weight + (p * kWarp + lane) * 4);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const uint32_t b[2] = {both.words.at[half * 2], both.words.at[half * 2 + 1]};
#pragma unroll
          for (int m = 0; m < 2; ++m) multiply(sums[m][p][half], codes[m], b);
        }
      }
    }
  }

  // `column` is the first of the pass, within the block and in y.
  __device__ __forceinline__ void finish(const DirectArgs& a, const Epilogue& out, const Shared& shared, int32_t block_column,
                                         int32_t column, int32_t first, int lane) {
    const auto place = load_vector<4>(shared.place());
    const int32_t sample = place.get(0), top = place.get(1), left_column = place.get(2);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int m = i / 2, half = i % 2;
      const int32_t pixel = first + i * 8 + lane / 4, row = static_cast<int32_t>(a.tile_columns.quotient(pixel));
      const int32_t oh = top + row, ow = left_column + pixel - row * a.t.tile_columns;
      if (row >= a.t.tile_rows || oh >= a.out_height || ow >= a.out_width) continue;
      const int64_t offset = sample * out.y_sample + (int64_t{oh} * a.out_width + ow) * out.y_row;
#pragma unroll
      for (int p = 0; p < kPairs; ++p) {
        const int32_t own = p * kPair + lane % 4 * kFour, left = a.outputs - column - own;
        if (left <= 0) continue;
        const auto scale = load_vector<kFour>(shared.scale() + block_column + own);
        const auto bias = load_vector<kFour>(shared.bias() + block_column + own);
        OutputColumns<kFour> columns;
#pragma unroll
        for (int c = 0; c < kFour; ++c) {
          columns.scale[c] = scale.get(c);
          columns.bias[c] = bias.get(c);
          columns.sum[c] = 0;
        }
        const auto start = load_vector<kFour>(shared.start() + block_column + own);
        int32_t four[kFour];
#pragma unroll
        for (int c = 0; c < kFour; ++c)  // modulo 2^32
          four[c] = static_cast<int32_t>(static_cast<uint32_t>(start.get(c)) +
                                         static_cast<uint32_t>(sums[m][p][c / 2][half * 2 + c % 2]));
        finish_four(out, {1.0f, 0, offset}, columns, column + own, left < kFour ? left : kFour, four);
      }
    }
  }
};

template <int kPairs>
__device__ __forceinline__ void multiply_tile(const DirectArgs& a, const Shared& shared, int32_t column) {
  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
  const int32_t passes = a.t.columns / (kPairs * kPair), units = (a.t.tile_rows * a.t.tile_columns + kUnit - 1) / kUnit;
  for (int32_t i = warp; i < units * passes; i += kWarps) {
    const int32_t unit = i / passes, pass = i - unit * passes, block_column = pass * kPairs * kPair;
    const uint32_t* window = shared.tile() + block_column / a.t.shared_columns * a.t.words;
    Unit<kPairs> u{};
    u.multiply_all(a, shared, window, shared.weight() + pass * kPairs * a.steps * kWarp * 4, unit * kUnit, lane);
    if (a.out.dtype == DType::kBFloat16) {  // the code of the usual type, by itself and so in few lines of the instruction cache
      Epilogue out = a.out;
      out.dtype = DType::kBFloat16;
      u.finish(a, out, shared, block_column, column + block_column, unit * kUnit, lane);
    } else {
      u.finish(a, a.out, shared, block_column, column + block_column, unit * kUnit, lane);
    }
  }
}

template <class X, int kPairs>
__global__ void __launch_bounds__(kThreads, 2) direct_kernel(const QO_GRID_CONSTANT DirectArgs a) {
  const Shared shared{a};
  const uint32_t first = static_cast<uint32_t>(a.column_blocks.quotient(blockIdx.x));
  const int32_t column = static_cast<int32_t>(blockIdx.x - first * a.column_blocks.divisor) * a.t.columns;
  load_weights(a, shared, column);
  for (uint32_t tile = first; tile < a.tiles; tile += a.abreast) {
    const TilePlace at = tile_place(a, tile);
    const int32_t channel = column / a.t.shared_columns * a.t.words * 4;
    if (tile != first) __syncthreads();  // all have read the tile before
    load_columns(a, shared, column, at);
    load_input<X>(a, at, channel, shared.tile());
    __syncthreads();
    multiply_tile<kPairs>(a, shared, column);
  }
}

// ---- host -----------------------------------------------------------------------------------------------------------

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t k_steps(const Int8Conv2dParams& p, const DirectTile& t) { return ceil_div(p.R * p.S * t.words, kStepWords); }
int64_t input_rows(const Int8Conv2dParams& p, int64_t rows) { return (rows - 1) * p.stride[0] + (p.R - 1) * p.dilation[0] + 1; }
int64_t input_columns(const Int8Conv2dParams& p, int64_t columns) {
  return (columns - 1) * p.stride[1] + (p.S - 1) * p.dilation[1] + 1;
}
int64_t fixed_bytes(const Int8Conv2dParams& p, const DirectTile& t) {
  return 4 * (t.columns * k_steps(p, t) * kStepWords + 3 * t.columns + 4 + k_steps(p, t) * kStepWords);
}
int64_t shared_bytes(const Int8Conv2dParams& p, const DirectTile& t) {
  return fixed_bytes(p, t) + 4 * input_rows(p, t.tile_rows) * input_columns(p, t.tile_columns) * t.pitch;
}

// Words between neighbouring pixels of the tile: at least `words`, and those that give the fewest lanes of a fragment one bank.
int32_t pitch_of(const Int8Conv2dParams& p, const DirectTile& t, int32_t words) {
  int32_t best = words;
  int least = 33;
  for (int32_t pitch = words; pitch < words + 5; ++pitch) {
    uint64_t seen[33] = {};
    int count[32] = {}, most = 0, distinct = 0;
    for (int lane = 0; lane < 32; ++lane) {
      const int64_t tap = lane % 4 / t.words;
      const int64_t at = (lane / 4 * p.stride[1] + tap * p.dilation[1]) * pitch + lane % 4 % t.words;
      bool known = false;
      for (int i = 0; i < distinct; ++i) known = known || seen[i] == static_cast<uint64_t>(at);
      if (known) continue;
      seen[distinct++] = static_cast<uint64_t>(at);
      most = std::max(most, ++count[at % 32]);
    }
    if (most < least) least = most, best = pitch;
  }
  return best;
}

// Channels and columns that a block and its passes share; false if this kernel does not take them.
bool share_columns(const Int8Conv2dParams& p, const CudaWeights& w, DirectTile* t) {
  const int64_t n = p.O / p.groups, c = p.C / p.groups;
  t->group_channels = static_cast<int32_t>(c);
  t->joined = 1;
  int64_t shared = ceil_div(n, kPair) * kPair;
  if (p.groups > 1) {
    if (n % kPair != 0 && kPair % n != 0) return false;
    if (n < kPair) t->joined = static_cast<int32_t>(kPair / n);
    if (w.joined_groups % t->joined != 0 || c * t->joined % 4 != 0) return false;
    shared = n * t->joined;
    if (shared > kColumns && shared % kColumns != 0) return false;
  }
  t->words = static_cast<int32_t>(ceil_div(c * t->joined, 4));
  t->columns = static_cast<int32_t>(shared >= kColumns ? kColumns : p.groups == 1 ? shared : kColumns / shared * shared);
  t->columns = static_cast<int32_t>(std::min<int64_t>(t->columns, ceil_div(p.O, shared) * shared));
  t->shared_columns = static_cast<int32_t>(p.groups == 1 ? ceil_div(p.O, kColumns) * kColumns : shared);
  const int64_t pass = std::min<int64_t>(shared, t->columns);
  t->pairs = pass % 64 == 0 ? 4 : pass % 32 == 0 ? 2 : 1;
  return true;
}

// Words of a pixel's channels in the tile.
int64_t window_words(const DirectTile& t) { return std::max(1, t.columns / t.shared_columns) * t.words; }

// Rough instructions of a tile for one of the warps' four schedulers.
double tile_cost(const Int8Conv2dParams& p, const DirectTile& t, int64_t multiprocessors) {
  const int64_t pixels = input_rows(p, t.tile_rows) * input_columns(p, t.tile_columns);
  const double load = 70.0 * static_cast<double>(ceil_div(pixels * window_words(t), kThreads));
  const int64_t passes = t.columns / (t.pairs * kPair), items = ceil_div(t.tile_rows * t.tile_columns, kUnit) * passes;
  const double step = 16.0 + 14.0 * t.pairs, finish = 200.0 * t.pairs;
  const double work =
      300 + load + static_cast<double>(ceil_div(items, kWarps)) * (step * static_cast<double>(k_steps(p, t)) + finish);
  const int64_t tiles = p.N * ceil_div(p.OH, t.tile_rows) * ceil_div(p.OW, t.tile_columns) * ceil_div(p.O, t.columns);
  return work * static_cast<double>(ceil_div(tiles, 2 * multiprocessors));
}

void choose_pixels(const Int8Conv2dParams& p, const GpuLimits& gpu, int64_t most_bytes, DirectTile* best) {
  DirectTile t = *best;
  double least = 0;
  for (int64_t parts = ceil_div(p.OW, 128), previous = 0; parts <= p.OW; parts = parts < 4 ? parts + 1 : parts * 2) {
    t.tile_columns = static_cast<int32_t>(ceil_div(p.OW, parts));
    if (t.tile_columns == previous) continue;
    previous = t.tile_columns;
    for (t.tile_rows = 1; t.tile_rows <= std::min<int64_t>(32, p.OH); ++t.tile_rows) {
      if (shared_bytes(p, t) > most_bytes) break;
      const double cost = tile_cost(p, t, gpu.multiprocessors);
      if (best->tile_rows == 0 || cost < least) *best = t, least = cost;
    }
  }
}

bool whole_fours_of_x(const Int8Conv2dParams& p) {
  const int64_t element = dtype_bytes(p.in.dtype), bytes = 4 * element;
  bool whole = p.x_stride[1] == 1 && p.C % 4 == 0 && is_aligned(p.in.x, bytes);
  for (int d : {0, 2, 3}) whole = whole && p.x_stride[d] * element % bytes == 0;
  return whole;
}

template <class X>
void (*direct_kernel_of(int pairs))(DirectArgs) {
  return pairs == 4 ? direct_kernel<X, 4> : pairs == 2 ? direct_kernel<X, 2> : direct_kernel<X, 1>;
}

}  // namespace

DirectTile plan_direct(const Int8Conv2dParams& p, const CudaWeights& w, const GpuLimits& gpu) {
  constexpr int64_t kMostChannels = 15, kMostGroupChannels = 64;
  const int64_t c = p.C / p.groups, pixels = p.N * p.OH * p.OW;
  const bool takes = !w.depthwise && c >= 1 && c <= (p.groups == 1 ? kMostChannels : kMostGroupChannels) && w.taps > 1 &&
                     pixels * p.O > 0 && pixels < int64_t{1} << 31;
  if (!takes) return {};
  return remembered_tile(p, gpu, [&] {
    DirectTile t;
    if (!share_columns(p, w, &t)) return DirectTile{};
    t.pitch = pitch_of(p, t, static_cast<int32_t>(window_words(t)));
    choose_pixels(p, gpu, std::min<int64_t>({kMostBytes, gpu.block_bytes, gpu.shared_bytes / 2 - 1024}), &t);
    return t;
  });
}

void run_direct(const Int8Conv2dParams& p, const CudaWeights& w, const DirectTile& t, const ConvOperands& operands,
                const Launch& at) {
  const auto narrow = [](int64_t n) { return static_cast<int32_t>(n); };
  DirectArgs a{};
  a.in = operands.in;
  std::copy_n(p.x_stride, 4, a.x_stride);
  a.padding = operands.gather.padding;
  a.out = operands.out;
  a.weight = operands.weight;
  a.row_bytes = w.row_bytes;
  a.tap_bytes = w.tap_bytes;
  a.t = t;
  a.channels = narrow(p.C);
  a.height = narrow(p.H);
  a.width = narrow(p.W);
  a.out_height = narrow(p.OH);
  a.out_width = narrow(p.OW);
  a.outputs = narrow(p.O);
  a.s = narrow(p.S);
  for (int d = 0; d < 2; ++d) {
    a.stride[d] = narrow(p.stride[d]);
    a.pad[d] = narrow(p.pad[d]);
    a.dilation[d] = narrow(p.dilation[d]);
  }
  a.words = narrow(p.R * p.S * t.words);
  a.steps = narrow(k_steps(p, t));
  a.columns_at = t.columns * a.steps * kStepWords;
  a.offsets_at = a.columns_at + 3 * t.columns + 4;
  a.tile_at = a.offsets_at + a.steps * kStepWords;
  a.in_rows = narrow(input_rows(p, t.tile_rows));
  a.in_columns = narrow(input_columns(p, t.tile_columns));
  a.group_columns = narrow(p.O / p.groups);
  a.joined = narrow(w.joined_groups);
  a.column_blocks = FastDiv(ceil_div(p.O, t.columns));
  a.column_tiles = FastDiv(ceil_div(p.OW, t.tile_columns));
  a.row_tiles = FastDiv(ceil_div(p.OH, t.tile_rows));
  a.tile_columns = FastDiv(t.tile_columns);
  a.tile_words = FastDiv(window_words(t));
  a.in_width = FastDiv(a.in_columns);
  const int64_t tiles = p.N * a.row_tiles.divisor * a.column_tiles.divisor;
  a.tiles = static_cast<uint32_t>(tiles);
  a.channels_last = p.x_stride[1] == 1;
  a.whole = whole_fours_of_x(p);
  a.abreast = static_cast<uint32_t>(std::clamp<int64_t>(2 * multiprocessors() / a.column_blocks.divisor, 1, tiles));
  const int64_t blocks = a.abreast * a.column_blocks.divisor;
  with_input_type(p.in.dtype, [&](auto* x) {
    using X = std::remove_pointer_t<decltype(x)>;
    launch(at, direct_kernel_of<X>(t.pairs), blocks, dim3(kThreads), a, static_cast<int>(shared_bytes(p, t)));
  });
}

}  // namespace quant_ops
