// Registers the schemas and the CPU kernels of torch.ops.quant_ops, on torch's stable ABI. What is here is what the CPU does
// otherwise than other devices; checks and allocation are in the headers that operators.h lists, kernels in cpu/. Gradients are
// registered by python/quant_ops/ops.
#include <pthread.h>

#include <atomic>

#include "cpu/pack.h"
#include "cpu/parallel.h"
#include "cpu/weight_only.h"
#include "kernels/log.h"
#include "torch/chain.h"
#include "torch/operators.h"

namespace quant_ops {

namespace {
// A forked child has none of its parent's threads, and GNU's OpenMP would wait for them forever: the child of a process whose
// operators ran on several threads runs on one.
std::atomic<bool> threads_started{false}, threads_lost{false};
[[maybe_unused]] const int at_fork = pthread_atfork(nullptr, nullptr, [] { threads_lost = threads_lost || threads_started; });
}  // namespace

// torch's own threads: at::parallel_for's pool, its nesting rules and torch.set_num_threads.
void parallel_run(int64_t n, int64_t grain, void (*body)(void*, int64_t, int64_t), void* context) {
  if (threads_lost) return body(context, 0, n);
  kernels();  // chosen here, since a refusal of QUANT_OPS_ISA could not leave the threads
  threads_started = true;
  struct Call {
    void (*body)(void*, int64_t, int64_t);
    void* context;
  } call{body, context};
  QO_TORCH(torch_parallel_for(
      0, n, grain,
      [](int64_t begin, int64_t end, void* c) { static_cast<Call*>(c)->body(static_cast<Call*>(c)->context, begin, end); }, &call));
}

int64_t parallel_threads() { return threads_lost ? 1 : torch::stable::get_num_threads(); }

namespace {

// The values of a zero point: rounded and clamped to [qmin, qmax] if it is floating, refused outside of it if it is an integer.
std::vector<int32_t> zero_point_values(const char* op, const char* name, const Tensor& t, int64_t qmin, int64_t qmax) {
  const ScalarType type = t.scalar_type();
  const bool floating = is_floating(type);
  std::vector<int32_t> values(static_cast<size_t>(t.numel()));
  const auto take = [&](size_t i, int64_t z) {
    QO_EXPECT(z >= qmin && z <= qmax, op, name, " in [", qmin, ", ", qmax, "], got ", z);
    values[i] = static_cast<int32_t>(z);
  };
  if (type == ScalarType::Int && t.is_contiguous()) {  // what the modules keep: a conversion would cost more than a small layer
    for (size_t i = 0; i < values.size(); ++i) take(i, static_cast<const int32_t*>(t.const_data_ptr())[i]);
    return values;
  }
  const Tensor wide = as_contiguous(to_type(t, floating ? ScalarType::Double : ScalarType::Long));
  for (size_t i = 0; i < values.size(); ++i)
    take(i, floating ? round_zero_point(wide.const_data_ptr<double>()[i], qmin, qmax) : wide.const_data_ptr<int64_t>()[i]);
  return values;
}

// An element of an integer tensor that is not in [low, high], if there is one.
std::optional<int64_t> value_outside(const Tensor& t, int64_t low, int64_t high) {
  const auto find = [&](const auto* values) -> std::optional<int64_t> {
    auto least = *values, most = *values;  // a loop that the compiler vectorizes
    for (int64_t i = 0; i < t.numel(); ++i) {
      least = std::min(least, values[i]);
      most = std::max(most, values[i]);
    }
    if (least >= low && most <= high) return std::nullopt;
    return int64_t{least < low ? least : most};
  };
  if (t.numel() == 0) return std::nullopt;
  if (t.scalar_type() == ScalarType::Char) return find(as_contiguous(t).const_data_ptr<int8_t>());
  if (t.scalar_type() == ScalarType::Int) return find(as_contiguous(t).const_data_ptr<int32_t>());
  return find(as_contiguous(to_type(t, ScalarType::Long)).const_data_ptr<int64_t>());
}

struct Cpu {
  static constexpr const char* kDevice = "cpu";
  static constexpr bool kKeepsCalls = true;

  static void quantize(const QuantizeParams& p, const Tensor&) { quantize_cpu(p); }
  static void quantize_backward(const QuantizeBackwardParams& p, const Tensor&) { quantize_backward_cpu(p); }
  static void dequantize(const DequantizeParams& p, const Tensor&) { dequantize_cpu(p); }
  static void choose_qparams(const ChooseQParams& p, const Tensor&) { choose_qparams_cpu(p); }
  static void quantize_rows(const QuantizeRowsParams& p, const Tensor&) { quantize_rows_cpu(p); }
  static void norm_quantize_rows(const char*, const NormQuantizeRowsParams& p, const Tensor&) { norm_quantize_rows_cpu(p); }

  static void quantize_float(const char*, const QuantizeFloatParams& p, const Tensor&) { quantize_float_cpu(p); }
  static void quantize_block(const char*, const QuantizeBlockParams& p, const Tensor&) { quantize_block_cpu(p); }
  static void choose_qparams_affine(const ChooseAffineParams& p, const Tensor&) { choose_qparams_affine_cpu(p); }
  static void quantize_affine(const AffineParams& p, const Tensor&) { quantize_affine_cpu(p); }
  static void dequantize_affine(const AffineParams& p, const Tensor&) { dequantize_affine_cpu(p); }
  static Seed seed(const Tensor& t) { return {.value = static_cast<uint64_t>(*t.const_data_ptr<int64_t>()), .memory = nullptr}; }

  static const int32_t* no_zero_point() {
    static const int32_t zero = 0;
    return &zero;
  }

  static ZeroPoints zero_points(const Tensor& t, int64_t qmin, int64_t qmax) {
    const bool floating = is_floating(t.scalar_type());
    Tensor wide = to_type(t, floating ? ScalarType::Double : ScalarType::Long);
    wide = as_contiguous(wide);
    Tensor z = empty(sizes_of(t), ScalarType::Int, t);
    int32_t* out = z.mutable_data_ptr<int32_t>();
    bool small = true;
    for (int64_t i = 0; i < z.numel(); ++i) {
      int64_t value = floating ? round_zero_point(wide.const_data_ptr<double>()[i], qmin, qmax) : wide.const_data_ptr<int64_t>()[i];
      value = value < INT32_MIN ? INT32_MIN : value > INT32_MAX ? INT32_MAX : value;
      small = small && value >= -kSmallZeroPoint && value <= kSmallZeroPoint;
      out[i] = static_cast<int32_t>(value);
    }
    return {z, small};
  }

  static constexpr bool kReadsPlainBesidePacked = false;
  static void linear(const char*, const Int8LinearParams& p, const Tensor&) { int8_linear_cpu(p); }
  static void conv2d(const Int8Conv2dParams& p, const Tensor&) { int8_conv2d_cpu(p); }
  static void attention(const char*, const AttentionParams& p, const Tensor&) { int8_attention_cpu(p); }

  static void pointwise(const char*, const PointwiseParams& p, const Tensor&) { pointwise_cpu(p); }
  static void max_pool(const MaxPoolParams& p, const Tensor&) { max_pool2d_cpu(p); }
  static void avg_pool(const char*, const AvgPoolParams& p, const Tensor&) { avg_pool2d_cpu(p); }
  static void upsample(const UpsampleParams& p, const Tensor&) { upsample_nearest2d_cpu(p); }

  static const int32_t* given_zero_points(const char* op, const char* name, const Tensor& t, int64_t qmin, int64_t qmax,
                                          Holder* holder) {
    holder->integers.push_back(zero_point_values(op, name, t, qmin, qmax));
    return holder->integers.back().data();
  }

  static PackedLayout layout_of(const WeightShape& w) { return packed_layout(w.o, w.c, w.r, w.s, w.groups); }
  static int64_t packed_bytes(const WeightShape& w) { return layout_of(w).bytes; }
  static void pack(const Tensor& weight, const WeightShape& w, Tensor& packed) {
    log_entries({"pack"});
    pack_weight_cpu(weight.const_data_ptr<int8_t>(), layout_of(w), packed.mutable_data_ptr<int8_t>());
  }
  static void unpack(const Tensor& packed, const WeightShape& w, Tensor& weight) {
    log_kernel(one_by_one);
    unpack_weight_cpu(packed.const_data_ptr<int8_t>(), layout_of(w), weight.mutable_data_ptr<int8_t>());
  }
  static void transpose(const Tensor& packed, const WeightShape& w, const WeightShape& of, Tensor& transposed) {
    transpose_packed_weight_cpu(packed.const_data_ptr<int8_t>(), layout_of(w), layout_of(of),
                                transposed.mutable_data_ptr<int8_t>());
  }
  static bool is_packed_for(const Tensor& packed, const WeightShape& w) {
    return quant_ops::is_packed_for(packed.const_data_ptr<int8_t>(), packed.numel(), layout_of(w));
  }

  static void weight_only(const char*, const WeightOnlyParams& p, const Tensor&) { weight_only_linear_cpu(p); }
  static WeightOnlyLayout layout_of(const WeightOnlyShape& w) { return weight_only_layout(w.n, w.k, w.bits, w.group); }
  static int64_t weight_only_bytes(const WeightOnlyShape& w) { return layout_of(w).bytes; }
  static void pack(const Tensor& weight, const WeightOnlyShape& w, Tensor& packed) {
    log_entries({"pack"});
    pack_weight_only_cpu(weight.const_data_ptr<int8_t>(), layout_of(w), packed.mutable_data_ptr<int8_t>());
  }
  static void unpack(const Tensor& packed, const WeightOnlyShape& w, Tensor& weight) {
    log_kernel(one_by_one);
    unpack_weight_only_cpu(packed.const_data_ptr<int8_t>(), layout_of(w), weight.mutable_data_ptr<int8_t>());
  }
  static bool is_packed_for(const Tensor& packed, const WeightOnlyShape& w) {
    return quant_ops::is_packed_for(packed.const_data_ptr<int8_t>(), packed.numel(), layout_of(w));
  }
  static void expect_between(const char* op, const char* name, const Tensor& t, int64_t low, int64_t high) {
    const std::optional<int64_t> outside = value_outside(t, low, high);
    QO_EXPECT(!outside, op, name, " in [", low, ", ", high, "], got ", *outside);
  }

  static void weight_only_embedding(const WeightOnlyEmbeddingParams& p, const Tensor&) { weight_only_embedding_cpu(p); }
  static void expect_indices(const char* op, const Tensor& indices, int64_t rows) {
    const std::optional<int64_t> outside = value_outside(indices, 0, rows - 1);
    QO_EXPECT_INDEX(!outside, op, "indices >= 0 and below the ", rows, " rows of the weight, got ", *outside);
  }

  // what int8_gemm, which has no scales, gives for a weight's
  static const float* one() {
    static const float value = 1.0f;
    return &value;
  }
};

}  // namespace
}  // namespace quant_ops

// The kept calls of the operator `name` (torch/repeat.h): an operator of its own, so that profilers tell which one ran.
#define QO_IMPLEMENT_REPEAT(m, name)                                                                 \
  m.impl("_" #name, [](StableIValue* stack, uint64_t arguments, uint64_t results) {                  \
    struct Name {                                                                                    \
      static const char* text() { return #name; }                                                    \
    };                                                                                               \
    using Operator = quant_ops::Repeated<Name>;                                                      \
    quant_ops::named_errors(#name, [&] { TORCH_BOX (&Operator::call)(stack, arguments, results); }); \
  })

STABLE_TORCH_LIBRARY(quant_ops, m) {
  quant_ops::define_operators(m);
  m.def("_int8_linear(Tensor x, int call) -> Tensor");
  m.def("_int8_conv2d(Tensor x, int call) -> Tensor");
  m.def("_weight_only_linear(Tensor x, int call) -> Tensor");
  m.def("_int8_chain_times(Tensor[] inputs, Tensor[] constants, int[] program) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(quant_ops, CPU, m) {
  quant_ops::implement_operators<quant_ops::Cpu>(m);
  QO_IMPLEMENT(m, int8_chain, quant_ops::Cpu);
  QO_IMPLEMENT(m, _int8_chain_times, quant_ops::Cpu);
  QO_IMPLEMENT_REPEAT(m, int8_linear);
  QO_IMPLEMENT_REPEAT(m, int8_conv2d);
  QO_IMPLEMENT_REPEAT(m, weight_only_linear);
  QO_IMPLEMENT(m, unpack_weight, quant_ops::Cpu);
  QO_IMPLEMENT(m, transpose_packed_weight, quant_ops::Cpu);
}
