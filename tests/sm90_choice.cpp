// How good the choice among the Hopper engine's kernels and the one for few rows is on measured times, and a search for better
// constants of its model.
//
//   sm90_choice < rows                the choice's time over the best one's: mean, worst, and the part of rows within 5 %
//   sm90_choice fit ROUNDS < rows     the constants of Costs that make these best
//   sm90_choice steps < rows          how much longer a layer of the rows takes by the model for M + 1 rows than for M
//
// A row is: linear M N K, or conv2d N C H O k p s d, then pairs of a kernel's name (with ":3" for three splits) and microseconds,
// then ".". test_cuda_sm90.py and benchmarks/gpu/fit_choice.py write rows from a JSON of sweep.py.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <iostream>
#include <map>
#include <optional>
#include <random>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "engine/sm90/choose.h"

using namespace quant_ops;
using namespace quant_ops::sm90;

struct Row {
  std::string text;
  Problem problem;
  std::map<std::string, double> us;
};

static Problem linear(int64_t M, int64_t N, int64_t K) {
  Problem p{.M = M, .N = N, .K = K, .a_stride = K, .b_stride = K, .samples = 1};
  p.out.dtype = DType::kBFloat16;
  return p;
}

static Problem conv2d(int64_t n, int64_t c, int64_t size, int64_t o, int64_t k, int64_t pad, int64_t stride, int64_t dilation) {
  const int64_t out = (size + 2 * pad - dilation * (k - 1) - 1) / stride + 1;
  Problem p{.M = n * out * out, .N = o, .K = k * k * c, .b_stride = k * k * c, .gathers = true, .samples = n};
  Gather& g = p.gather;
  g.group = g.pixel = c;
  g.row = c * size;
  g.sample = g.row * size;
  g.height = g.width = static_cast<int32_t>(size);
  for (int d = 0; d < 2; ++d) {
    g.stride[d] = static_cast<int32_t>(stride);
    g.pad[d] = static_cast<int32_t>(pad);
    g.dilation[d] = static_cast<int32_t>(dilation);
  }
  g.pixels = FastDiv(out * out);
  g.columns = FastDiv(out);
  g.tap = FastDiv(c);
  g.kernel_columns = FastDiv(k);
  p.out.dtype = DType::kBFloat16;
  return p;
}

static std::vector<Row> read_rows() {
  std::vector<Row> rows;
  std::string word;
  while (std::cin >> word) {
    Row row;
    row.text = word;
    int64_t n[8] = {};
    const int count = word == "linear" ? 3 : 8;
    for (int i = 0; i < count; ++i) {
      std::cin >> n[i];
      row.text += " " + std::to_string(n[i]);
    }
    row.problem = word == "linear" ? linear(n[0], n[1], n[2]) : conv2d(n[0], n[1], n[2], n[3], n[4], n[5], n[6], n[7]);
    double us;
    while (std::cin >> word && word != ".") {
      std::cin >> us;
      row.us[word] = us;
    }
    rows.push_back(row);
  }
  return rows;
}

constexpr GpuLimits kGpu{90, 132, 227 * 1024, 228 * 1024};

// The model's clocks; none for an engine that is not compared.
static std::optional<double> clocks_of(const Row& row, const KernelChoice& choice, const Costs& costs) {
  const Problem& p = row.problem;
  if (choice.name == kGemvName) return gemv_time(p.M, p.N, p.K, 0, kGpu);
  const int kernel = kernel_named(choice.name);
  if (kernel == kKernels) return std::nullopt;
  return sm90::clocks(p, kernel, kGpu.multiprocessors, std::max<int64_t>(1, choice.splits), costs);
}

// Only kernels that were timed can be compared.
static std::string chosen(const Row& row, const Costs& costs, double* time) {
  std::string best;
  for (const auto& [name, us] : row.us) {
    const std::optional<double> clocks = clocks_of(row, KernelChoice(name), costs);
    if (clocks && (best.empty() || *clocks < *time)) {
      best = name;
      *time = *clocks;
    }
  }
  return best;
}

struct Quality {
  double mean = 0, worst = 1, within = 0, spread = 0;  // spread: of the logarithm of the model's error
};

static Quality quality(const std::vector<Row>& rows, const Costs& costs, bool show) {
  constexpr double kClocksPerUs = 1850;
  Quality q;
  int64_t times = 0;
  for (const Row& row : rows) {
    double time = 0, least = HUGE_VAL;
    const std::string name = chosen(row, costs, &time);
    for (const auto& [other, us] : row.us) {
      const std::optional<double> clocks = clocks_of(row, KernelChoice(other), costs);
      if (!clocks) continue;
      least = std::min(least, us);
      const double error = std::log(*clocks / kClocksPerUs / us);
      q.spread += std::min(error * error, 0.1);
      ++times;
    }
    const double ratio = row.us.at(name) / least;
    if (show && ratio > 1.05)
      std::printf("%.2f %s: %s %.2f us, best %.2f\n", ratio, row.text.c_str(), name.c_str(), row.us.at(name), least);
    q.mean += std::log(ratio);
    q.worst = std::max(q.worst, ratio);
    q.within += ratio <= 1.05;
  }
  const double count = static_cast<double>(rows.size());
  q.mean = std::exp(q.mean / count);
  q.within /= count;
  q.spread = std::sqrt(q.spread / static_cast<double>(times));
  return q;
}

// Lower is better.
static double badness(const Quality& q) {
  return std::log(q.mean) * 20 + (1 - q.within) + std::max(0.0, q.worst - 1.15) + q.spread * q.spread * 10;
}

static std::string text_of(const KernelPlan& plan) {
  return kTiles[plan.kernel].name + (plan.splits > 1 ? ":" + std::to_string(plan.splits) : "");
}

using Layers = std::set<std::pair<int64_t, int64_t>>;

static Layers layers_of(const std::vector<Row>& rows) {
  Layers layers;
  for (const Row& row : rows)
    if (!row.problem.gathers) layers.insert({row.problem.N, row.problem.K});
  return layers;
}

// The largest ratio of a layer's time for one row more, for 1 to 512 rows. `show` prints N, K, M and the ratio where it is large.
static double worst_step(int64_t N, int64_t K, const Costs& costs, bool show) {
  double worst = 0;
  KernelPlan before = choose(linear(1, N, K), 132, KernelChoice(), costs);
  for (int64_t M = 2; M <= 513; ++M) {
    const KernelPlan plan = choose(linear(M, N, K), 132, KernelChoice(), costs);
    const double ratio = plan.time / before.time;
    worst = std::max(worst, ratio);
    if (show && ratio > 1.1)
      std::printf("%lld x %lld, M %lld: %.3f, %s to %s\n", static_cast<long long>(N), static_cast<long long>(K),
                  static_cast<long long>(M - 1), ratio, text_of(before).c_str(), text_of(plan).c_str());
    before = plan;
  }
  return worst;
}

// What one row more costs beyond 1.15 times as much, or 1.3 times where the weight is large.
static double badness_of_steps(const Layers& layers, const Costs& costs) {
  double sum = 0;
  for (const auto& [N, K] : layers) sum += std::max(0.0, worst_step(N, K, costs, false) - (N * K <= 4 << 20 ? 1.14 : 1.3));
  return sum;
}

int main(int argc, char** argv) {
  const std::vector<Row> rows = read_rows();
  if (argc > 1 && std::string(argv[1]) == "steps") {
    for (const auto& [N, K] : layers_of(rows)) {
      const double worst = worst_step(N, K, kH200, true);
      std::printf("layer %lld %lld: %.3f\n", static_cast<long long>(N), static_cast<long long>(K), worst);
    }
    return 0;
  }
  Costs costs = kH200;
  if (argc > 2 && std::string(argv[1]) == "fit") {
    std::mt19937 random(1);
    std::normal_distribution<double> normal(0.0, 0.1);
    const Layers layers = layers_of(rows);
    double least = badness(quality(rows, costs, false)) + badness_of_steps(layers, costs);
    double* const values = &costs.start;
    constexpr size_t kCount = sizeof(Costs) / sizeof(double);
    for (int i = std::atoi(argv[2]); i > 0; --i) {
      Costs other = costs;
      for (unsigned change = 1 + random() % 3; change > 0; --change) (&other.start)[random() % kCount] *= std::exp(normal(random));
      double now = badness(quality(rows, other, false));
      if (now < least) now += badness_of_steps(layers, other);
      if (now >= least) continue;
      least = now;
      costs = other;
    }
    for (size_t i = 0; i < kCount; ++i) std::printf("%s%.6g", i ? ", " : "{", values[i]);
    std::puts("}");
  }
  const Quality q = quality(rows, costs, true);
  std::printf("rows %zu, mean %.4f, worst %.3f, within 5 %%: %.3f, spread %.3f\n", rows.size(), q.mean, q.worst, q.within,
              q.spread);
  return 0;
}
