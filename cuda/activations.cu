// Activations to int8 codes for the integer products: NHWC, with the channels of each group padded, from any strides.
//
//   floating x:  q = clamp(rne(x / scale) + zero_point, -128, 127)      int8 x: itself      uint8 x: x - 128
//
// A row of a linear layer is a sample of one pixel. Zero points of uint8 codes become smaller by 128 as well. The image of codes
// may have a border, of the zero point's code. Channels that are contiguous in x are read along pixels of codes (channels_kernel);
// if pixels are, blocks transpose 64 of them at a time (pixels_kernel); everything else takes any_strides_kernel. Read next:
// Int8Codes in quotient.cuh, conv2d.cu.
#include <algorithm>

#include "device/range.cuh"
#include "launch.h"

namespace quant_ops {
namespace {

constexpr int kThreads = 256;
constexpr int kChannelsThreads = 128;  // of a block of channels_kernel
constexpr int kThreadsPerMultiprocessor = 2048;
constexpr int kTilePixels = 64;                    // of pixels_kernel
constexpr int kTileVectors = 8;                    // likewise, at most; 16 bytes of codes each
constexpr int64_t kMostPixels = int64_t{1} << 30;  // or vectors, whose indices are int32_t

// The pixels of a sample in x and, with their border, in q.
struct Image {
  int32_t height, width, border_h, border_w;
  SmallDiv columns, border_columns, side_columns;  // width, width with the border, columns of the border

  Image(const CodesParams& p)
      : height(static_cast<int32_t>(p.height)),
        width(static_cast<int32_t>(p.width)),
        border_h(static_cast<int32_t>(p.border_h)),
        border_w(static_cast<int32_t>(p.border_w)),
        columns(p.width),
        border_columns(p.width + 2 * p.border_w),
        side_columns(2 * p.border_w) {}
  QO_HD_MEMBER bool has_border() const { return border_h > 0 || border_w > 0; }
  QO_HD_MEMBER int64_t pixels() const { return int64_t{height} * width; }
  QO_HD_MEMBER int64_t pixels_out() const { return (int64_t{height} + 2 * border_h) * (int64_t{width} + 2 * border_w); }

  // Where a pixel of x is in q.
  __device__ __forceinline__ int64_t place(int32_t row, int32_t column) const {
    return int64_t{row + border_h} * (width + 2 * border_w) + column + border_w;
  }
  // Where pixel j of the border is: first the rows above and below, then the columns on both sides.
  __device__ __forceinline__ int64_t border_place(int32_t j) const {
    const int32_t whole = width + 2 * border_w, above = border_h * whole;
    if (j < above) return j;
    if (j < 2 * above) return int64_t{height} * whole + j;
    const int32_t k = j - 2 * above, row = side_columns.quotient(k), column = k - row * side_columns.divisor;
    return int64_t{row + border_h} * whole + (column < border_w ? column : width + column);
  }
};

struct CodesArgs {
  static constexpr bool kBarriers = false;
  CodesParams p;
  Image image;
  int64_t blocks = 0;         // that write codes of x; those behind them write the border
  int64_t border_pixels = 0;  // of a sample
  SmallDiv border_blocks{};   // likewise
  SmallDiv sample_blocks{};   // of codes
  // channels_kernel
  SmallDiv vectors{};  // of a pixel
  // pixels_kernel
  SmallDiv channel_tiles{};        // of a sample's channels
  SmallDiv tile_vectors{}, tap{};  // 16-byte vectors of a tile, bytes of a tap
  bool aligned = false;            // runs of pixels in x
  // any_strides_kernel
  FastDiv pixels{}, inner{}, tap_any{};  // of q; of a thread's index, whose faster part is the pixel or the vector within it
  int64_t total = 0;
  bool pixels_first = false;  // neighbouring threads take neighbouring pixels: columns are contiguous in x
};
// Of kernels whose blocks share their sample.
struct SampleArgs : CodesArgs {
  static constexpr bool kBarriers = true;
};

// ---- elements to codes ----------------------------------------------------------------------------------------------

// The range of a sample and zero from those of its parts. All lanes of a warp take part, and get it.
__device__ __forceinline__ Range<float> range_of_sample(const SampleRanges& r, int64_t sample) {
  const Range<float>* const parts = static_cast<const Range<float>*>(r.parts) + sample * r.count;
  Range<float> range{0.0f, 0.0f};
  const int count = static_cast<int>(r.count);
#pragma unroll 4
  for (int i = static_cast<int>(threadIdx.x % kWarp); i < count; i += kWarp) range.merge(parts[i]);
  range = over_lanes(range, kWarp);
  if (!r.asymmetric) {
    range.max = greater(range.max, -range.min);
    range.min = -range.max;
  }
  return range;
}

__device__ __forceinline__ Quantizer given_quantizer(const CodesParams& p, int64_t sample) {
  return Quantizer::of(p.in.scale[sample * p.in.scale_stride], zero_at(p.in.zero_point, sample * p.in.zero_point_stride), -128,
                       127);
}
template <class X>
__device__ __forceinline__ int8_t given_zero_code(const CodesParams& p, int64_t sample) {
  return static_cast<int8_t>(zero_at(p.in.zero_point, sample * p.in.zero_point_stride) - (std::is_same_v<X, uint8_t> ? 128 : 0));
}

// What quantizes a sample, given or chosen, for all threads of a block. `first` is one of the sample's blocks, which writes what it
// chose.
__device__ __forceinline__ Quantizer sample_quantizer(const CodesParams& p, int64_t sample, bool first) {
  if (p.ranges.count == 0) return given_quantizer(p, sample);
  const Quantizer q = quantizer_of(range_of_sample(p.ranges, sample), p.ranges.asymmetric);
  if (first && threadIdx.x == 0) {
    p.ranges.scale[sample] = q.scale;
    if (p.ranges.zero_point != nullptr) p.ranges.zero_point[sample] = q.zero_point;
  }
  return q;
}

template <class X>
struct ToCodes {
  Int8Codes int8;

  __device__ __forceinline__ ToCodes(const CodesParams& p, int64_t sample) : int8(Int8Codes::of(given_quantizer(p, sample))) {}
  __device__ __forceinline__ ToCodes(const CodesParams& p, int64_t sample, bool first)
      : int8(Int8Codes::of(sample_quantizer(p, sample, first))) {}
  __device__ __forceinline__ int8_t one(X x) const { return static_cast<int8_t>(int8.quantizer(widen(x))); }
  template <int V>
  __device__ __forceinline__ void many(const Vector<X, V>& in, uint32_t (&words)[V]) const {
    make_codes(in, int8, words);
  }
};
template <>
struct ToCodes<int8_t> {
  __device__ __forceinline__ ToCodes(const CodesParams&, int64_t, bool = false) {}
  __device__ __forceinline__ int8_t one(int8_t x) const { return x; }
  template <int V>
  __device__ __forceinline__ void many(const Vector<int8_t, V>& in, uint32_t (&words)[V]) const {
#pragma unroll
    for (int i = 0; i < V; ++i) words[i] = static_cast<uint32_t>(in.get(i));
  }
};
template <>
struct ToCodes<uint8_t> {
  __device__ __forceinline__ ToCodes(const CodesParams&, int64_t, bool = false) {}
  __device__ __forceinline__ int8_t one(uint8_t x) const { return static_cast<int8_t>(x ^ 0x80u); }
  template <int V>
  __device__ __forceinline__ void many(const Vector<uint8_t, V>& in, uint32_t (&words)[V]) const {
#pragma unroll
    for (int i = 0; i < V; ++i) words[i] = in.get(i) ^ 0x80u;
  }
};

// ---- the border -----------------------------------------------------------------------------------------------------

// The code of zero.
template <class X>
__device__ __forceinline__ int8_t zero_code(const CodesParams& p, int64_t sample) {
  if constexpr (sizeof(X) > 1)
    if (p.ranges.count > 0) return static_cast<int8_t>(sample_quantizer(p, sample, false).zero_point);
  return given_zero_code<X>(p, sample);
}

// Block `block` of those for the border, each of one sample; a thread writes 16 bytes of a pixel.
template <class X>
__device__ __forceinline__ void write_border(const CodesArgs& a, int32_t block) {
  const CodesParams& p = a.p;
  const int32_t parts = static_cast<int32_t>(p.pixel / kVectorBytes), sample = a.border_blocks.quotient(block);
  const int32_t i =
      (block - sample * a.border_blocks.divisor) * static_cast<int32_t>(blockDim.x) + static_cast<int32_t>(threadIdx.x);
  const int32_t j = i / parts;
  const int8_t zero = zero_code<X>(p, sample);
  if (j >= a.border_pixels) return;
  const int64_t place = sample * a.image.pixels_out() + a.image.border_place(j);
  int8_t codes[kVectorBytes];
#pragma unroll
  for (int b = 0; b < kVectorBytes; ++b) codes[b] = zero;
  store_vector<kVectorBytes>(p.q + place * p.pixel + (i - j * parts) * kVectorBytes, codes);
}

// ---- channels are contiguous in x -----------------------------------------------------------------------------------

// A thread takes kUnroll vectors of 16 bytes of a sample of x, or zeros for channels that only the codes have. kDense: x is as q.
template <class X, int kUnroll, bool kDense>
__global__ void __launch_bounds__(kChannelsThreads) channels_kernel(const QO_GRID_CONSTANT SampleArgs a) {
  constexpr int V = 16 / sizeof(X);
  const CodesParams& p = a.p;
  let_next_kernel_start();
  const int32_t block = static_cast<int32_t>(blockIdx.x);
  if (block >= a.blocks) return write_border<X>(a, block - static_cast<int32_t>(a.blocks));
  const int32_t sample = a.sample_blocks.quotient(block), in_sample = block - sample * a.sample_blocks.divisor;
  const X* const x = static_cast<const X*>(p.in.x) + sample * p.stride[0];
  int8_t* const q = p.q + sample * a.image.pixels_out() * p.pixel;
  const int32_t vectors = a.vectors.divisor, end = a.image.height * a.image.width * vectors;
  const int32_t first = in_sample * (kChannelsThreads * kUnroll) + static_cast<int32_t>(threadIdx.x);
  Vector<X, V> in[kUnroll];
  int64_t to[kUnroll];
  bool exists[kUnroll];
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    const int32_t i = first + u * kChannelsThreads;
    to[u] = int64_t{i} * V;
    exists[u] = i < end;
    if constexpr (kDense) {
      in[u] = i < end ? load_streaming<V>(x + to[u]) : Vector<X, V>{};
    } else {
      const int32_t pixel = a.vectors.quotient(i), channel = (i - pixel * vectors) * V;
      const int32_t row = a.image.columns.quotient(pixel), column = pixel - row * a.image.width;
      to[u] = a.image.place(row, column) * p.pixel + channel;
      exists[u] = channel < p.channels;
      in[u] = i < end && exists[u] ? load_streaming<V>(x + row * p.stride[2] + column * p.stride[3] + channel) : Vector<X, V>{};
    }
  }
  const ToCodes<X> to_codes(p, sample, in_sample == 0);
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    if (first + u * kChannelsThreads >= end) break;
    uint32_t words[V];
    to_codes.many(in[u], words);
    uint32_t packed[V / 4];
#pragma unroll
    for (int w = 0; w < V / 4; ++w)
      packed[w] = exists[u] ? low_bytes(words[4 * w], words[4 * w + 1], words[4 * w + 2], words[4 * w + 3]) : 0u;
    int8_t codes[V];
    memcpy(codes, packed, sizeof(codes));
    store_vector<V>(q + to[u], codes);
  }
}

// ---- pixels are contiguous in x -------------------------------------------------------------------------------------

// Where vector `vector` of a pixel is in the tile. Lanes that write, of every eighth pixel, and lanes that read, of neighbouring
// vectors and pixels, meet different banks.
__device__ __forceinline__ int tile_place(int pixel, int vector) {
  const int spread = pixel / 8 ^ ((pixel & 1) << 2 | (pixel & 2) | (pixel >> 2 & 1));
  return (pixel * kTileVectors + (vector ^ (spread & (kTileVectors - 1)))) * kVectorBytes;
}

// Elements `pixel` ... of a channel, or zeros behind the last one.
template <class X, int V>
__device__ __forceinline__ Vector<X, V> load_pixels(const X* channel, int32_t pixel, int32_t pixels, bool aligned) {
  if (aligned && pixel + V <= pixels) return load_vector<V>(channel + pixel);
  X elements[V] = {};
#pragma unroll
  for (int i = 0; i < V; ++i)
    if (pixel + i < pixels) elements[i] = channel[pixel + i];
  Vector<X, V> v;
  memcpy(&v.words, elements, sizeof(v.words));
  return v;
}

// A tile is 64 pixels and a 16-byte vector of codes for each warp of the block. A lane makes the codes of four channels of eight
// neighbouring pixels, so that words of four channels arise where bytes are gathered anyway.
template <class X>
__global__ void __launch_bounds__(kTileVectors* kWarp) pixels_kernel(const QO_GRID_CONSTANT SampleArgs a) {
  constexpr int kFour = 4, kOctets = kTilePixels / 8, V = sizeof(X) == 4 ? 4 : 8, kSpans = 8 / V;
  alignas(16) __shared__ int8_t tile[kTilePixels * kTileVectors * kVectorBytes];
  const CodesParams& p = a.p;
  let_next_kernel_start();
  const int32_t block = static_cast<int32_t>(blockIdx.x);
  if (block >= a.blocks) return write_border<X>(a, block - static_cast<int32_t>(a.blocks));
  const int32_t sample = a.sample_blocks.quotient(block), in_sample = block - sample * a.sample_blocks.divisor;
  const int32_t pixel_tile = a.channel_tiles.quotient(in_sample), channel_tile = in_sample - pixel_tile * a.channel_tiles.divisor;
  const int32_t first_pixel = pixel_tile * kTilePixels, pixels = a.image.height * a.image.width;
  const int32_t tile_vectors = a.tile_vectors.divisor, first_vector = channel_tile * tile_vectors;
  const int32_t vector = static_cast<int32_t>(threadIdx.x / kWarp), lane = static_cast<int32_t>(threadIdx.x % kWarp);
  const int32_t octet = lane % kOctets, quad = lane / kOctets;

  const int32_t byte = (first_vector + vector) * kVectorBytes + quad * kFour, group = a.tap.quotient(byte);
  const int32_t channel = byte - group * a.tap.divisor, channels = static_cast<int32_t>(p.channels);
  const X* const x =
      static_cast<const X*>(p.in.x) + computed_here(sample * p.stride[0] + (int64_t{group} * channels + channel) * p.stride[1]);
  const bool exists = byte < p.pixel;
  Vector<X, V> in[kSpans][kFour];
#pragma unroll
  for (int s = 0; s < kSpans; ++s)
#pragma unroll
    for (int c = 0; c < kFour; ++c) {
      const int32_t pixel = first_pixel + s * (kOctets * V) + octet * V;
      in[s][c] =
          exists && channel + c < channels ? load_pixels<X, V>(x + c * p.stride[1], pixel, pixels, a.aligned) : Vector<X, V>{};
    }
  const ToCodes<X> to_codes(p, sample, in_sample == 0);
#pragma unroll
  for (int s = 0; s < kSpans; ++s) {
    uint32_t words[kFour][V];
#pragma unroll
    for (int c = 0; c < kFour; ++c) {
      to_codes.many(in[s][c], words[c]);
      if (channel + c < channels) continue;
#pragma unroll
      for (int i = 0; i < V; ++i) words[c][i] = 0;
    }
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const int pixel = s * (kOctets * V) + octet * V + i;
      *reinterpret_cast<uint32_t*>(tile + tile_place(pixel, vector) + quad * kFour) =
          low_bytes(words[0][i], words[1][i], words[2][i], words[3][i]);
    }
  }
  __syncthreads();
  int8_t* const q = p.q + sample * a.image.pixels_out() * p.pixel;
  for (int32_t i = static_cast<int32_t>(threadIdx.x); i < kTilePixels * tile_vectors; i += static_cast<int32_t>(blockDim.x)) {
    const int32_t tile_pixel = a.tile_vectors.quotient(i), v = i - tile_pixel * tile_vectors, pixel = first_pixel + tile_pixel;
    const int64_t to = int64_t{first_vector + v} * kVectorBytes;
    if (pixel >= pixels || to >= p.pixel) continue;
    const int32_t row = a.image.has_border() ? a.image.columns.quotient(pixel) : 0;
    const int64_t place = a.image.has_border() ? a.image.place(row, pixel - row * a.image.width) : pixel;
    const auto codes = load_vector<kVectorBytes>(tile + tile_place(tile_pixel, v));
    int8_t bytes[kVectorBytes];
    memcpy(bytes, &codes.words, sizeof(bytes));
    store_vector<kVectorBytes>(q + place * p.pixel + to, bytes);
  }
}

// ---- any strides ----------------------------------------------------------------------------------------------------

// A thread makes V bytes of a pixel of codes, which may lie in the border. Scales are given.
template <class X, int V>
__global__ void __launch_bounds__(kThreads) any_strides_kernel(const QO_GRID_CONSTANT CodesArgs a) {
  const CodesParams& p = a.p;
  const X* x = static_cast<const X*>(p.in.x);
  const int64_t step = int64_t{gridDim.x} * kThreads;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < a.total; i += step) {
    const int64_t slow = a.inner.quotient(i), fast = i - slow * a.inner.divisor;
    const int64_t m = a.pixels_first ? fast : slow, byte = (a.pixels_first ? slow : fast) * V;
    const int64_t sample = a.pixels.quotient(m), pixel = m - sample * a.pixels.divisor, whole = p.width + 2 * p.border_w;
    const int64_t row = pixel / whole - p.border_h, column = pixel % whole - p.border_w;
    const int64_t group = a.tap_any.quotient(byte), channel = byte - group * a.tap_any.divisor;
    const int64_t at =
        sample * p.stride[0] + (group * p.channels + channel) * p.stride[1] + row * p.stride[2] + column * p.stride[3];
    const bool inside = row >= 0 && row < p.height && column >= 0 && column < p.width;
    const ToCodes<X> to_codes(p, sample);
    const int8_t outside = given_zero_code<X>(p, sample);
    int8_t codes[V];
#pragma unroll
    for (int e = 0; e < V; ++e)
      codes[e] = !inside ? outside : channel + e < p.channels ? to_codes.one(x[at + e * p.stride[1]]) : int8_t{0};
    store_vector<V>(p.q + m * p.pixel + byte, codes);
  }
}

// A warp chooses the scale of a sample.
__global__ void __launch_bounds__(kWarp) sample_scales_kernel(const QO_GRID_CONSTANT SampleArgs a) {
  sample_quantizer(a.p, blockIdx.x, true);
}

struct SampleParamsArgs {
  static constexpr bool kBarriers = false;
  SampleParams p;
};

__global__ void __launch_bounds__(kThreads) sample_params_kernel(const QO_GRID_CONSTANT SampleParamsArgs args) {
  const SampleParams& p = args.p;
  const int64_t sample = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (sample >= p.samples) return;
  const int32_t zero = zero_at(p.zero_point, sample * p.zero_point_stride) - p.offset;
  if (p.scale_out != nullptr) p.scale_out[sample] = p.scale != nullptr ? p.scale[sample * p.scale_stride] : 1.0f;
  if (p.zero_point_out != nullptr) p.zero_point_out[sample] = zero;
  if (p.padding == nullptr) return;
  int8_t line[kVectorBytes];
#pragma unroll
  for (int i = 0; i < kVectorBytes; ++i) line[i] = static_cast<int8_t>(zero);
  store_vector<kVectorBytes>(p.padding + sample * kVectorBytes, line);
}

// ---- host -----------------------------------------------------------------------------------------------------------

// The same codes by fewer dimensions: groups without padding are one group, and rows of a linear layer that share their parameters
// are one sample.
CodesParams simplified(CodesParams p) {
  if (p.channels == p.tap) p.channels = p.tap = p.pixel;
  const bool same = p.ranges.count == 0 && p.in.scale_stride == 0 && (p.in.zero_point == nullptr || p.in.zero_point_stride == 0);
  if (same && p.samples <= kMostPixels && p.height == 1 && p.width == 1 && p.border_h == 0 && p.border_w == 0) {
    p.height = p.samples;
    p.stride[2] = p.stride[0];
    p.samples = 1;
  }
  return p;
}

// Blocks of codes, and behind them those of the border.
int64_t blocks_of(SampleArgs* a, int64_t sample_blocks, int64_t threads) {
  const CodesParams& p = a->p;
  const int64_t border = (a->border_pixels * (p.pixel / kVectorBytes) + threads - 1) / threads;
  a->sample_blocks = SmallDiv(sample_blocks);
  a->border_blocks = SmallDiv(border);
  a->blocks = p.samples * sample_blocks;
  return a->blocks + p.samples * border;
}

template <class X>
bool launch_channels(const CodesArgs& args, const Launch& at) {
  constexpr int64_t V = 16 / sizeof(X);
  SampleArgs a{args};
  const CodesParams& p = a.p;
  bool whole = p.stride[1] == 1 && p.tap == p.pixel && p.channels % V == 0 && p.pixel % V == 0 && is_aligned(p.in.x, 16);
  whole = whole && (!a.image.has_border() || p.pixel % kVectorBytes == 0);
  for (int d : {0, 2, 3}) whole = whole && (p.stride[d] % V == 0 || (d == 0 ? p.samples : d == 2 ? p.height : p.width) == 1);
  const int64_t vectors = p.pixel / V, sample_vectors = a.image.pixels() * vectors;
  if (!whole || sample_vectors > kMostPixels || a.border_pixels * vectors > kMostPixels) return false;
  a.vectors = SmallDiv(vectors);
  const bool dense = p.channels == p.pixel && (p.width == 1 || p.stride[3] == p.pixel) &&
                     (p.height == 1 || p.stride[2] == p.width * p.pixel) && !a.image.has_border();
  const auto run = [&](auto unroll, auto kernel) {
    const int64_t per_block = kChannelsThreads * unroll();
    const int64_t blocks = blocks_of(&a, (sample_vectors + per_block - 1) / per_block, kChannelsThreads);
    launch(at, kernel, blocks, dim3(kChannelsThreads), a);
    return true;
  };
  constexpr std::integral_constant<int, 1> kOne;
  constexpr std::integral_constant<int, 2> kTwo;
  constexpr std::integral_constant<int, 4> kFour;
  if (!dense) return run(kTwo, channels_kernel<X, kTwo(), false>);
  // One vector a thread while all threads run at once; the more data, the more each has in flight.
  const int64_t rounds = p.samples * sample_vectors / (multiprocessors() * kThreadsPerMultiprocessor);
  if (rounds < 1) return run(kOne, channels_kernel<X, kOne(), true>);
  return rounds < 4 ? run(kTwo, channels_kernel<X, kTwo(), true>) : run(kFour, channels_kernel<X, kFour(), true>);
}

template <class X>
bool launch_pixels(const CodesArgs& args, const Launch& at) {
  constexpr int64_t V = sizeof(X) == 4 ? 4 : 8;
  SampleArgs a{args};
  const CodesParams& p = a.p;
  const int64_t vectors = p.pixel / kVectorBytes;
  if ((p.stride[3] != 1 && p.width > 1) || (p.stride[2] != p.width && p.height > 1) || p.tap % kVectorBytes != 0 ||
      a.image.pixels() > kMostPixels || p.pixel > kMostPixels || a.border_pixels * vectors > kMostPixels)
    return false;
  const int64_t pixel_tiles = (a.image.pixels() + kTilePixels - 1) / kTilePixels;
  int64_t most = kTileVectors;
  const auto channel_tiles = [&] { return (vectors + most - 1) / most; };
  while (most > 2 && p.samples * pixel_tiles * channel_tiles() < 4 * multiprocessors()) most /= 2;
  const int64_t tile_vectors = (vectors + channel_tiles() - 1) / channel_tiles(), threads = tile_vectors * kWarp;
  a.channel_tiles = SmallDiv(channel_tiles());
  a.tile_vectors = SmallDiv(tile_vectors);
  a.tap = SmallDiv(p.tap);
  a.aligned = is_aligned(p.in.x, V * sizeof(X)) && p.stride[1] % V == 0 && (p.stride[0] % V == 0 || p.samples == 1);
  launch(at, pixels_kernel<X>, blocks_of(&a, pixel_tiles * channel_tiles(), threads), dim3(static_cast<unsigned>(threads)), a);
  return true;
}

template <class X>
void launch_any(CodesArgs a, const Launch& at) {
  const CodesParams& p = a.p;
  const int64_t bytes = p.tap % kVectorBytes == 0 ? kVectorBytes : 4, parts = p.pixel / bytes;
  const int64_t pixels = p.samples * a.image.pixels_out();
  a.pixels = FastDiv(a.image.pixels_out());
  a.tap_any = FastDiv(p.tap);
  a.total = pixels * parts;
  a.pixels_first = p.stride[1] != 1;
  a.inner = FastDiv(a.pixels_first ? pixels : parts);
  launch(at, bytes == kVectorBytes ? any_strides_kernel<X, kVectorBytes> : any_strides_kernel<X, 4>,
         blocks_for(a.total, kThreads, kMaxGrid), dim3(kThreads), a);
}

template <class X>
void launch_codes(CodesArgs a, const Launch& at) {
  if (launch_channels<X>(a, at) || launch_pixels<X>(a, at)) return;
  SampleRanges& ranges = a.p.ranges;
  if (ranges.count > 0) {
    launch(at, sample_scales_kernel, a.p.samples, dim3(kWarp), SampleArgs{a});
    a.p.in.scale = ranges.scale;
    a.p.in.zero_point = ranges.zero_point;
    a.p.in.scale_stride = a.p.in.zero_point_stride = 1;
    ranges.count = 0;
  }
  launch_any<X>(a, at);
}

struct MultiplyRowsArgs {
  static constexpr bool kBarriers = false;
  MultiplyRowsParams p;
  FastDiv vectors;  // of a row
  int64_t total;    // likewise, of all rows
};

// V neighbouring elements of a row a thread.
template <class X, int V>
__global__ void __launch_bounds__(kThreads) multiply_rows_kernel(const QO_GRID_CONSTANT MultiplyRowsArgs a) {
  const int64_t step = int64_t{gridDim.x} * kThreads;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < a.total; i += step) {
    const int64_t m = a.vectors.quotient(i), k = (i - m * a.vectors.divisor) * V;
    const Vector<X, V> x = load_vector<V>(static_cast<const X*>(a.p.x) + m * a.p.x_stride + k);
    const Vector<float, V> multiplier = load_vector<V>(a.p.multiplier + k);
    float products[V];
#pragma unroll
    for (int v = 0; v < V; ++v) products[v] = widen(x.get(v)) * multiplier.get(v);
    store_vector<V>(a.p.to + i * V, products);
  }
}

template <class X>
void launch_multiply_rows(const MultiplyRowsParams& p, const Launch& at) {
  constexpr int V = 4;
  const bool whole = p.columns % V == 0 && (p.x_stride % V == 0 || p.rows == 1) && is_aligned(p.x, V * sizeof(X)) &&
                     is_aligned(p.multiplier, V * sizeof(float)) && is_aligned(p.to, V * sizeof(float));
  const int64_t vectors = p.columns / (whole ? V : 1);
  const MultiplyRowsArgs a{.p = p, .vectors = FastDiv(vectors), .total = p.rows * vectors};
  launch(at, whole ? multiply_rows_kernel<X, V> : multiply_rows_kernel<X, 1>, blocks_for(a.total, kThreads, kMaxGrid),
         dim3(kThreads), a);
}

}  // namespace

void write_codes_cuda(const CodesParams& params, const Launch& at) {
  CodesArgs a{.p = simplified(params), .image = Image(simplified(params))};
  const CodesParams& p = a.p;
  if (p.pixel == 0 || p.samples * a.image.pixels_out() == 0) return;
  a.border_pixels = a.image.pixels_out() - a.image.pixels();
  switch (p.in.dtype) {
    case DType::kFloat32: return launch_codes<float>(a, at);
    case DType::kFloat16: return launch_codes<Half>(a, at);
    case DType::kBFloat16: return launch_codes<BFloat16>(a, at);
    case DType::kInt8: return launch_codes<int8_t>(a, at);
    default: return launch_codes<uint8_t>(a, at);
  }
}

void multiply_rows_cuda(const MultiplyRowsParams& p, const Launch& at) {
  if (p.rows * p.columns == 0) return;
  switch (p.dtype) {
    case DType::kFloat16: return launch_multiply_rows<Half>(p, at);
    case DType::kBFloat16: return launch_multiply_rows<BFloat16>(p, at);
    default: return launch_multiply_rows<float>(p, at);
  }
}

void write_sample_params_cuda(const SampleParams& p, const Launch& at) {
  if (p.samples == 0) return;
  launch(at, sample_params_kernel, blocks_for(p.samples, kThreads, kMaxGrid), dim3(kThreads), SampleParamsArgs{p});
}

}  // namespace quant_ops
