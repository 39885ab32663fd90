// Depthwise int8_conv2d on CUDA (groups == C == O): every channel is multiplied by its own weights alone, so that memory sets the
// pace. A block makes a tile of the output. It quantizes the tile of the input under it, with its halo, into shared memory, so that
// codes never pass through global memory. A word there holds one channel of four neighbouring pixels of a row, and dp4a multiplies
// four taps of a row of the kernel at once:
//
//   tile[row][word][channel] = codes of pixels 4 word .. 4 word + 3 of a row     sum += dp4a(four codes from pixel ow * stride on,
//   weights)
//
// Kernels wider than eight taps, strides beyond two and dilation along rows (plan_depthwise) take the plain kernel at the end,
// which reads codes that activations.cu has written. Bits are those of cpp/cpu/conv2d_depthwise.cpp. Read next: conv2d.cu.
#include <algorithm>

#include "conv2d.cuh"
#include "device/encode.cuh"
#include "device/machine.cuh"

namespace quant_ops {
namespace {

constexpr int kQuad = 4;  // pixels of a word, and output pixels of a thread

// ---- tiles ----------------------------------------------------------------------------------------------------------

struct TileArgs {
  static constexpr bool kBarriers = true;
  InputParams in;
  int64_t x_stride[4];
  const int8_t* padding;  // [samples][16]: the zero point's code, of 8-bit x; null: 0
  Epilogue out;
  Epilogue down;         // if results of neighbouring pixels are neighbours: `out` with pixels in place of columns
  const int8_t* weight;  // [R * S][weight_pitch]
  int64_t weight_pitch;
  int32_t channels, height, width, out_height, out_width;
  int32_t r, s, stride[2], pad[2], dilation;  // dilation of the kernel's rows
  int32_t rows, quads, block_channels;        // of the output tile
  int32_t in_rows, in_words, pitch;           // of the input tile; words between neighbours in a row
  FastDiv channel_blocks, column_tiles, row_tiles;
  FastDiv groups, words;  // fours of the tile's channels; words of a row of the input tile
  bool channels_last;     // of x: neighbouring threads take neighbouring channels, else neighbouring pixels
  bool whole;             // channels of x are contiguous, aligned and whole vectors
};

struct TilePlace {
  int64_t sample;
  int32_t channel, oh, ow;  // the first ones of the output tile
};

__device__ __forceinline__ TilePlace tile_place(const TileArgs& a) {
  const int64_t outer = a.channel_blocks.quotient(blockIdx.x), rows = a.column_tiles.quotient(outer);
  const int64_t sample = a.row_tiles.quotient(rows);
  return {sample, static_cast<int32_t>(blockIdx.x - outer * a.channel_blocks.divisor) * a.block_channels,
          static_cast<int32_t>(rows - sample * a.row_tiles.divisor) * a.rows,
          static_cast<int32_t>(outer - rows * a.column_tiles.divisor) * a.quads * kQuad};
}

// The weights as words of four taps of a row: [r][word][channel]. Taps and channels that do not exist are zeros.
template <int kWords>
__device__ __forceinline__ void load_weights(const TileArgs& a, int32_t channel, uint32_t* to) {
  const int32_t total = a.r * kWords * a.block_channels;
  for (int32_t i = static_cast<int32_t>(threadIdx.x); i < total; i += static_cast<int32_t>(blockDim.x)) {
    const int32_t word = i / a.block_channels, c = channel + i - word * a.block_channels;
    const int32_t r = word / kWords, s = word % kWords * kQuad;
    uint32_t taps = 0;
#pragma unroll
    for (int t = 0; t < kQuad; ++t)
      if (s + t < a.s && c < a.channels)
        taps |= uint32_t{static_cast<uint8_t>(a.weight[(r * a.s + s + t) * a.weight_pitch + c])} << 8 * t;
    to[i] = taps;
  }
}

// Four channels of x at each of four neighbouring pixels. Elements that do not exist become those of `zeros`.
template <class X>
struct Elements {
  Vector<X, kFour> pixels[kQuad];

  __device__ __forceinline__ void load(const TileArgs& a, const X* from, int32_t channel, int32_t h, int32_t w,
                                       const Vector<X, kFour>& zeros) {
    const bool row = static_cast<uint32_t>(h) < static_cast<uint32_t>(a.height);
    from += h * a.x_stride[2] + channel * a.x_stride[1];
#pragma unroll
    for (int p = 0; p < kQuad; ++p) {
      const bool exists = row && static_cast<uint32_t>(w + p) < static_cast<uint32_t>(a.width) && channel < a.channels;
      const X* at = from + (w + p) * a.x_stride[3];
      pixels[p] = zeros;
      if (!exists) continue;
      if (a.whole) {
        pixels[p] = load_vector<kFour>(at);
      } else {
        X elements[kFour];
#pragma unroll
        for (int c = 0; c < kFour; ++c) elements[c] = channel + c < a.channels ? at[c * a.x_stride[1]] : zeros.get(c);
        memcpy(&pixels[p].words, elements, sizeof(elements));
      }
    }
  }
};

// The input under the tile, as codes. Pixels beside the image have the zero point's code. A thread makes kAtOnce words of each of
// four channels, so that enough loads are under way.
template <class X>
__device__ __forceinline__ void load_input(const TileArgs& a, const TilePlace& at, uint32_t* to) {
  constexpr int kAtOnce = 2;
  const CodesOf<X> encode(a.in, at.sample, a.padding != nullptr ? a.padding[at.sample * kVectorBytes] : int8_t{0});
  const Vector<X, kFour> zeros = encode.zeros();
  const X* x = static_cast<const X*>(a.in.x) + at.sample * a.x_stride[0];
  const FastDiv &inner = a.channels_last ? a.groups : a.words, &outer = a.channels_last ? a.words : a.groups;
  const int32_t top = at.oh * a.stride[0] - a.pad[0], left = at.ow * a.stride[1] - a.pad[1];
  const int32_t total = static_cast<int32_t>(inner.divisor * outer.divisor) * a.in_rows, threads = static_cast<int32_t>(blockDim.x);
  for (int32_t i = static_cast<int32_t>(threadIdx.x); i < total; i += kAtOnce * threads) {
    Elements<X> elements[kAtOnce];
    uint32_t* places[kAtOnce];
#pragma unroll
    for (int n = 0; n < kAtOnce; ++n) {
      const int64_t line = inner.quotient(i + n * threads), row = outer.quotient(line);
      const int32_t fast = static_cast<int32_t>(i + n * threads - line * inner.divisor);
      const int32_t slow = static_cast<int32_t>(line - row * outer.divisor), h = static_cast<int32_t>(row);
      const int32_t word = a.channels_last ? slow : fast, channel = (a.channels_last ? fast : slow) * kFour;
      places[n] = to + (h * a.in_words + word) * a.pitch + channel;
      if (h < a.in_rows) elements[n].load(a, x, at.channel + channel, top + h, left + word * kQuad, zeros);
    }
#pragma unroll
    for (int n = 0; n < kAtOnce; ++n) {
      if (i + n * threads >= total) break;
      uint32_t codes[kQuad][kFour], words[kFour];
      encode(elements[n].pixels, codes);
#pragma unroll
      for (int c = 0; c < kFour; ++c) words[c] = low_bytes(codes[0][c], codes[1][c], codes[2][c], codes[3][c]);
      store_vector<kFour>(places[n], words);
    }
  }
}

// Bytes [byte, byte + 4) of a row of words.
template <int kSpan>
__device__ __forceinline__ uint32_t bytes_from(const Vector<uint32_t, 4> (&row)[kSpan], int channel, int byte) {
  const uint32_t low = row[byte / 4].words.at[channel];
  if (byte % 4 == 0) return low;
  const uint32_t high = row[byte / 4 + 1].words.at[channel];
#if defined(__CUDA_ARCH__)
  return __funnelshift_r(low, high, byte % 4 * 8);
#else
  return low >> byte % 4 * 8 | high << (32 - byte % 4 * 8);
#endif
}

// Writes four neighbouring pixels of four channels, of which `pixels` and `count` exist. Sums are corrected, scales whole.
__device__ __forceinline__ void finish_quad(const TileArgs& a, int64_t offset, const OutputColumns<kFour>& columns, int32_t channel,
                                            int count, int pixels, int32_t (&sums)[kQuad][kFour]) {
  if (a.out.y_column == 1) {
#pragma unroll
    for (int p = 0; p < kQuad; ++p) {
      if (p >= pixels) break;
      finish_four(a.out, {1.0f, 0, offset + p * a.out.y_row}, columns, channel, count, sums[p]);
    }
    return;
  }
#pragma unroll
  for (int c = 0; c < kFour; ++c) {
    if (c >= count) break;
    const OutputColumns<kFour> same{{columns.scale[c], columns.scale[c], columns.scale[c], columns.scale[c]},
                                    {columns.bias[c], columns.bias[c], columns.bias[c], columns.bias[c]},
                                    {}};
    int32_t down[kFour] = {sums[0][c], sums[1][c], sums[2][c], sums[3][c]};
    finish_four(a.down, {1.0f, 0, offset + (channel + c) * a.out.y_column}, same, 0, pixels, down);
  }
}

// A thread makes four pixels of four channels at a time.
template <int kWords, int kStride>
__device__ __forceinline__ void multiply_tile(const TileArgs& a, const TilePlace& at, const uint32_t* tile,
                                              const uint32_t* weights) {
  constexpr int kSpan = (3 * kStride + 4 * kWords - 1) / 4 + 1;  // words from the first pixel's first tap to the last one's last
  const int32_t groups = static_cast<int32_t>(a.groups.divisor), places = static_cast<int32_t>(blockDim.x) / groups;
  const int32_t first = static_cast<int32_t>(threadIdx.x) / groups;
  const int32_t own = (static_cast<int32_t>(threadIdx.x) - first * groups) * kFour, channel = at.channel + own;
  if (channel >= a.channels) return;
  const int count = a.channels - channel < kFour ? a.channels - channel : kFour;
  // of one sample, so that scales are multiplied and zero points are corrected but once
  OutputColumns<kFour> columns = output_columns(a.out, channel, count);
  const OutputRow sample = output_row(a.out, at.sample * a.out.rows.divisor);
  uint32_t start[kFour];
#pragma unroll
  for (int c = 0; c < kFour; ++c) {
    start[c] = 0u - static_cast<uint32_t>(sample.zero) * static_cast<uint32_t>(columns.sum[c]);
    columns.scale[c] *= sample.scale;
    columns.sum[c] = 0;
  }
  const int32_t line = a.in_words * a.pitch;
  for (int32_t i = first; i < a.rows * a.quads; i += places) {
    const int32_t row = i / a.quads, quad = i - row * a.quads, oh = at.oh + row, ow = at.ow + quad * kQuad;
    if (oh >= a.out_height || ow >= a.out_width) continue;
    const uint32_t* from = tile + row * a.stride[0] * line + quad * kStride * a.pitch + own;
    int32_t sums[kQuad][kFour];
#pragma unroll
    for (int p = 0; p < kQuad; ++p)
#pragma unroll
      for (int c = 0; c < kFour; ++c) sums[p][c] = static_cast<int32_t>(start[c]);
#pragma unroll 1
    for (int32_t r = 0; r < a.r; ++r, from += a.dilation * line) {
      Vector<uint32_t, 4> codes[kSpan];
#pragma unroll
      for (int w = 0; w < kSpan; ++w) codes[w] = load_vector<4>(from + w * a.pitch);
#pragma unroll
      for (int w = 0; w < kWords; ++w) {
        const auto taps = load_vector<4>(weights + (r * kWords + w) * a.block_channels + own);
#pragma unroll
        for (int p = 0; p < kQuad; ++p)
#pragma unroll
          for (int c = 0; c < kFour; ++c)
            sums[p][c] = dot4(bytes_from(codes, c, p * kStride + w * 4), taps.words.at[c], sums[p][c]);
      }
    }
    const int64_t offset = sample.offset + (int64_t{oh} * a.out_width + ow) * a.out.y_row;
    finish_quad(a, offset, columns, channel, count, a.out_width - ow < kQuad ? a.out_width - ow : kQuad, sums);
  }
}

constexpr int kMostThreads = 256;

// kWords: of four taps, of a row of the kernel.
template <class X, int kWords, int kStride>
__global__ void __launch_bounds__(kMostThreads, kWords* kStride < 4 ? 3 : 2) tile_kernel(const QO_GRID_CONSTANT TileArgs a) {
  uint32_t* weights = reinterpret_cast<uint32_t*>(shared_memory());
  uint32_t* tile = weights + a.r * kWords * a.block_channels;
  const TilePlace at = tile_place(a);
  load_weights<kWords>(a, at.channel, weights);
  load_input<X>(a, at, tile);
  __syncthreads();
  multiply_tile<kWords, kStride>(a, at, tile, weights);
}

// ---- the plain kernel -----------------------------------------------------------------------------------------------

constexpr int kThreads = 256;

struct PlainArgs {
  static constexpr bool kBarriers = false;
  Gather gather;
  Epilogue out;
  const int8_t* weight;  // [R * S][pitch]
  int64_t pitch, M, channels, total;
  int32_t r, s;
  int64_t run;    // output pixels that neighbouring threads take, so that their stores meet
  FastDiv words;  // of four channels
};

// A thread makes four channels of an output pixel.
__global__ void __launch_bounds__(kThreads) plain_kernel(const QO_GRID_CONSTANT PlainArgs a) {
  const Gather& g = a.gather;
  const int64_t step = int64_t{gridDim.x} * kThreads;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < a.total; i += step) {
    const int64_t run = i / a.run, high = a.words.quotient(run), channel = (run - high * a.words.divisor) * kFour;
    const int64_t m = high * a.run + i % a.run;
    if (m >= a.M) continue;
    const GatherRow row = gather_row(g, m, 0);
    const int8_t* weight = a.weight + channel;
    int32_t sums[kFour] = {};
    for (int32_t r = 0; r < a.r; ++r)
      for (int32_t s = 0; s < a.s; ++s, weight += a.pitch) {
        GatherTap tap;
        tap.h = r * g.dilation[0];
        tap.w = s * g.dilation[1];
        tap.offset = tap.h * g.row + tap.w * g.pixel;
        const bool pixel = inside(g, row, tap);
        if (!pixel && g.padding == nullptr) continue;
        const auto codes =
            load_vector<kFour>(pixel ? row.at + tap.offset + channel : g.padding + int64_t{row.sample} * kVectorBytes);
        const auto weights = load_vector<kFour>(weight);
#pragma unroll
        for (int c = 0; c < kFour; ++c) sums[c] += int32_t{codes.get(c)} * weights.get(c);
      }
    const int count = static_cast<int>(a.channels - channel < kFour ? a.channels - channel : kFour);
    if (count > 0) finish_four(a.out, output_row(a.out, m), output_columns(a.out, channel, count), channel, count, sums);
  }
}

void run_plain(const Int8Conv2dParams& p, const Gather& gather, const Epilogue& out, const int8_t* weight, const Launch& at) {
  const int64_t run = out.y_column == 1 ? 1 : 8, M = p.N * p.OH * p.OW, words = (p.C + kFour - 1) / kFour;
  const PlainArgs a{.gather = gather,
                    .out = out,
                    .weight = weight,
                    .pitch = gather.group,
                    .M = M,
                    .channels = p.C,
                    .total = (M + run - 1) / run * run * words,
                    .r = static_cast<int32_t>(p.R),
                    .s = static_cast<int32_t>(p.S),
                    .run = run,
                    .words = FastDiv(words)};
  launch(at, plain_kernel, blocks_for(a.total, kThreads, kMaxGrid), dim3(kThreads), a);
}

// ---- host: the size of a tile ---------------------------------------------------------------------------------------

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t weight_words(const Int8Conv2dParams& p) { return ceil_div(p.S, 4); }

// Rows and words of the input under a tile of the output.
int64_t input_rows(const Int8Conv2dParams& p, int64_t rows) { return (rows - 1) * p.stride[0] + (p.R - 1) * p.dilation[0] + 1; }
int64_t input_words(const Int8Conv2dParams& p, int64_t quads) {
  return (quads - 1) * p.stride[1] + (3 * p.stride[1] + 4 * weight_words(p) - 1) / 4 + 1;
}

// With four words more than channels, vectors of neighbouring words lie in different banks.
int64_t pitch_of(int64_t channels) { return channels + 4; }

int64_t shared_bytes(const Int8Conv2dParams& p, const DepthwiseTile& t) {
  return 4 * (p.R * weight_words(p) * t.channels + input_rows(p, t.rows) * input_words(p, t.quads) * pitch_of(t.channels));
}

// Channels of a tile: a multiple of eight, and as few as possible that do not exist.
int64_t tile_channels(int64_t channels) {
  int64_t best = 32;
  for (int64_t c = 8; c <= 64; c += 8)
    if ((c >= 32 || c >= channels) && ceil_div(channels, c) * c < ceil_div(channels, best) * best) best = c;
  return best;
}

// A whole number of warps, and of threads for the fours of channels.
int64_t threads_of(int64_t channels) { return channels / 4 * (channels > 32 ? 16 : 32); }

// Instructions of a multiprocessor for all tiles that it gets, if it issues those of one thread at a time.
double tile_cost(const Int8Conv2dParams& p, const DepthwiseTile& t, int64_t multiprocessors) {
  constexpr double kStart = 400, kLoad = 10 * 16, kMultiply = 3, kFinish = 16 * 10;
  const int64_t threads = threads_of(t.channels), load_items = input_rows(p, t.rows) * input_words(p, t.quads) * t.channels / 4,
                items = ceil_div(t.rows * t.quads * t.channels / 4, threads);
  const double work = kStart + kLoad * static_cast<double>(ceil_div(load_items, 2 * threads) * 2) +
                      (kMultiply * static_cast<double>(p.R * weight_words(p) * 8) + kFinish) * static_cast<double>(items);
  const int64_t tiles = p.N * ceil_div(p.OH, t.rows) * ceil_div(ceil_div(p.OW, kQuad), t.quads) * ceil_div(p.C, t.channels);
  return work * static_cast<double>(threads) * static_cast<double>(ceil_div(tiles, multiprocessors));
}

using TileKernel = void (*)(TileArgs);
template <class X>
TileKernel tile_kernel_of(int64_t words, int64_t stride) {
  if (words == 1) return stride == 1 ? tile_kernel<X, 1, 1> : tile_kernel<X, 1, 2>;
  return stride == 1 ? tile_kernel<X, 2, 1> : tile_kernel<X, 2, 2>;
}

// Whether elements of x that a thread loads at once are a vector.
bool whole_vectors_of_x(const Int8Conv2dParams& p) {
  const int64_t element = dtype_bytes(p.in.dtype), bytes = kFour * element;
  bool whole = p.x_stride[1] == 1 && p.C % kFour == 0 && is_aligned(p.in.x, bytes);
  for (int d : {0, 2, 3}) whole = whole && p.x_stride[d] * element % bytes == 0;
  return whole;
}

void run_tiles(const Int8Conv2dParams& p, const DepthwiseTile& t, const ConvOperands& operands, const Launch& at) {
  const auto narrow = [](int64_t n) { return static_cast<int32_t>(n); };
  const Epilogue& out = operands.out;
  TileArgs a{};
  a.in = operands.in;
  std::copy_n(p.x_stride, 4, a.x_stride);
  a.padding = operands.gather.padding;
  a.out = a.down = out;
  a.down.y_column = 1;
  a.down.vectors = out.y_row == 1 && p.OW % kQuad == 0 && is_aligned(out.y, kFour * dtype_bytes(out.dtype));
  a.weight = operands.weight;
  a.weight_pitch = operands.gather.group;
  a.channels = narrow(p.C);
  a.height = narrow(p.H);
  a.width = narrow(p.W);
  a.out_height = narrow(p.OH);
  a.out_width = narrow(p.OW);
  a.r = narrow(p.R);
  a.s = narrow(p.S);
  for (int d = 0; d < 2; ++d) {
    a.stride[d] = narrow(p.stride[d]);
    a.pad[d] = narrow(p.pad[d]);
  }
  a.dilation = narrow(p.dilation[0]);
  a.rows = t.rows;
  a.quads = t.quads;
  a.block_channels = t.channels;
  a.in_rows = narrow(input_rows(p, t.rows));
  a.in_words = narrow(input_words(p, t.quads));
  a.pitch = narrow(pitch_of(t.channels));
  a.channel_blocks = FastDiv(ceil_div(p.C, t.channels));
  a.column_tiles = FastDiv(ceil_div(ceil_div(p.OW, kQuad), t.quads));
  a.row_tiles = FastDiv(ceil_div(p.OH, t.rows));
  a.words = FastDiv(a.in_words);
  a.groups = FastDiv(t.channels / kFour);
  a.channels_last = p.x_stride[1] == 1;
  a.whole = whole_vectors_of_x(p);
  const int64_t blocks = p.N * a.row_tiles.divisor * a.column_tiles.divisor * a.channel_blocks.divisor;
  with_input_type(p.in.dtype, [&](auto* x) {
    using X = std::remove_pointer_t<decltype(x)>;
    launch(at, tile_kernel_of<X>(weight_words(p), p.stride[1]), blocks, dim3(static_cast<unsigned>(threads_of(t.channels))), a,
           static_cast<int>(shared_bytes(p, t)));
  });
}

DepthwiseTile choose_tile(const Int8Conv2dParams& p, const GpuLimits& gpu) {
  constexpr int64_t kMostRows = 32, kMostQuads = 32;
  // several blocks on a multiprocessor: some load while others multiply
  const int64_t most_bytes = std::min<int64_t>(gpu.shared_bytes / 4 - 1024, gpu.block_bytes);
  DepthwiseTile best, t;
  double least = 0;
  t.channels = static_cast<int32_t>(tile_channels(p.C));
  const int64_t all_quads = ceil_div(p.OW, kQuad);
  for (int64_t parts = ceil_div(all_quads, kMostQuads), previous = 0; parts <= all_quads;
       parts = parts < 4 ? parts + 1 : parts * 2) {
    t.quads = static_cast<int32_t>(ceil_div(all_quads, parts));
    if (t.quads == previous) continue;
    previous = t.quads;
    for (t.rows = 1; t.rows <= std::min(kMostRows, p.OH); ++t.rows) {
      if (shared_bytes(p, t) > most_bytes) break;
      const double cost = tile_cost(p, t, gpu.multiprocessors);
      if (best.rows == 0 || cost < least) best = t, least = cost;
    }
  }
  return best;
}

}  // namespace

DepthwiseTile plan_depthwise(const Int8Conv2dParams& p, const GpuLimits& gpu) {
  const bool takes = p.S <= 8 && p.stride[1] <= 2 && (p.dilation[1] == 1 || p.S == 1) && p.N * p.OH * p.OW * p.C > 0;
  return takes ? remembered_tile(p, gpu, [&] { return choose_tile(p, gpu); }) : DepthwiseTile{};
}

void run_depthwise(const Int8Conv2dParams& p, const DepthwiseTile& tile, const ConvOperands& operands, const Launch& at) {
  if (tile.rows > 0) return run_tiles(p, tile, operands, at);
  run_plain(p, operands.gather, operands.out, operands.weight, at);
}

}  // namespace quant_ops
