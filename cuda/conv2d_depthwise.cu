// Depthwise int8_conv2d on CUDA (groups == C == O): every channel is multiplied by its own weights alone, so a thread multiplies
// element by element, four neighbouring channels of a pixel. The codes, their padding and the epilogue are those of the other
// convolutions. Bits are those of cpp/cpu/conv2d_depthwise.cpp. Read next: conv2d.cu.
#include "conv2d.cuh"

namespace quant_ops {
namespace {

constexpr int kThreads = 256;

struct DepthwiseArgs {
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
__global__ void __launch_bounds__(kThreads) depthwise_kernel(const QO_GRID_CONSTANT DepthwiseArgs a) {
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

}  // namespace

void run_depthwise(const Int8Conv2dParams& p, const Gather& gather, const Epilogue& out, const int8_t* weight, const Launch& at) {
  const int64_t run = out.y_column == 1 ? 1 : 8, M = p.N * p.OH * p.OW, words = (p.C + kFour - 1) / kFour;
  const DepthwiseArgs a{.gather = gather,
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
  launch(at, depthwise_kernel, blocks_for(a.total, kThreads, kMaxGrid), dim3(kThreads), a);
}

}  // namespace quant_ops
