// Which problems the Hopper engine takes (cuda/engine/sm90/sm90.h), against the rules of TMA and of the matrix instruction written
// down a second time, over random problems of which most break one rule. Prints the first difference; run by test_cuda_sm90.py.
#include <cstdio>
#include <cstdlib>
#include <random>
#include <set>
#include <string>

#include "engine/sm90/sm90.h"

using namespace quant_ops;

static void expect(bool holds, const char* what, const IgemmProblem& p, int kernel) {
  if (holds) return;
  std::printf("%s: kernel %d, M N K %lld %lld %lld, strides %lld %lld %lld, dtype %d\n", what, kernel, (long long)p.M,
              (long long)p.N, (long long)p.K, (long long)p.a_stride, (long long)p.b_stride, (long long)p.y_stride,
              static_cast<int>(p.y_dtype));
  std::exit(1);
}

template <class T>
static T* at(uint64_t address) {
  return reinterpret_cast<T*>(address);
}

// cuTensorMapEncodeTiled's conditions for a matrix, the contiguous dimension first.
static bool tensor_map(const void* base, int64_t contiguous, int64_t rows, int64_t stride, int bytes) {
  const bool sizes = contiguous >= 1 && rows >= 1 && contiguous <= (int64_t{1} << 32) && rows <= (int64_t{1} << 32);
  const int64_t pitch = stride * bytes;
  return sizes && reinterpret_cast<uint64_t>(base) % 16 == 0 && pitch % 16 == 0 && pitch < (int64_t{1} << 40);
}

static bool legal(const IgemmProblem& p, const sm90::Tile& t) {
  int bytes = 0;
  if (p.y_dtype == DType::kFloat32) bytes = 4;
  if (p.y_dtype == DType::kFloat16 || p.y_dtype == DType::kBFloat16) bytes = 2;
  if (bytes == 0 || p.K < 1 || p.K > INT32_MAX || p.M > INT32_MAX || p.N > INT32_MAX) return false;
  // one row has no stride
  const int64_t a = p.M == 1 ? p.K : p.a_stride, b = p.N == 1 ? p.K : p.b_stride, y = p.M == 1 ? p.N : p.y_stride;
  if (!tensor_map(p.a, p.K, p.M, a, 1) || !tensor_map(p.b, p.K, p.N, b, 1) || !tensor_map(p.y, p.N, p.M, y, bytes)) return false;
  if (a < p.K || b < p.K || y < p.N) return false;             // rows that overlap
  if (p.K % 16 != 0 || p.N % (16 / bytes) != 0) return false;  // CUTLASS's can_implement
  if ((p.row_step | p.column_step) >> 1 != 0) return false;    // a vector or one value
  if (!p.row_zero != !p.column_sum) return false;
  const int64_t m = t.swapped ? p.N : p.M, n = t.swapped ? p.M : p.N;
  const int64_t blocks_m = (m + t.m * t.cluster - 1) / (t.m * t.cluster) * t.cluster, blocks_n = (n + t.n - 1) / t.n;
  return blocks_m <= INT32_MAX / blocks_n && (t.warpgroups == 2 || blocks_n <= 65535);
}

// The table: legal instructions, shared memory and registers.
static void check_table() {
  std::set<std::string> names;
  for (int kernel = 0; kernel < sm90::kKernels; ++kernel) {
    const sm90::Tile& t = sm90::kTiles[kernel];
    const IgemmProblem p{};
    expect(names.insert(t.name).second && sm90::kernel_named(t.name) == kernel, "names are unique", p, kernel);
    expect(
        std::string(t.name).find(std::to_string(t.m) + "x" + std::to_string(t.n) + "x" + std::to_string(t.k)) != std::string::npos,
        "the name tells the tile", p, kernel);
    expect((std::string(t.name).find("swapped") != std::string::npos) == t.swapped, "the name tells the swap", p, kernel);
    expect(t.m % (t.cooperative ? 128 : 64) == 0 && t.n % 16 == 0 && t.n <= 256 && t.k % 128 == 0, "instruction shape", p, kernel);
    expect(t.cluster == 1 || t.cluster == 2, "cluster", p, kernel);
    expect(t.warpgroups == 1 || t.warpgroups == 2, "warpgroups", p, kernel);
    expect(!t.cooperative || t.warpgroups == 2, "one warpgroup shares with nobody", p, kernel);
    expect(t.stages >= 3 && t.blocks_per_sm * t.stages * (t.m + t.n) * t.k <= 220 * 1024, "shared memory", p, kernel);
    // accumulators of a warpgroup; 232 registers a thread at most
    expect(t.m * t.n / (t.cooperative ? 256 : 128) <= 160, "accumulators fit the registers", p, kernel);
  }
  expect(sm90::kernel_named("none") == sm90::kKernels, "no such name", {}, -1);
}

// A legal problem, of which one thing may be off.
static IgemmProblem random_problem(std::mt19937_64& random) {
  const auto below = [&](uint64_t n) { return static_cast<int64_t>(random() % n); };
  const DType dtypes[] = {DType::kFloat16, DType::kBFloat16, DType::kFloat32, DType::kInt8, DType::kInt32, DType::kFloat64};
  IgemmProblem p{};
  const auto size = [&](int multiple) { return (below(10) ? 1 + below(500) : 1 + below(int64_t{1} << below(34))) * multiple; };
  p.M = size(1), p.N = size(8), p.K = size(16);
  p.a_stride = p.K + 16 * below(3), p.b_stride = p.K + 16 * below(3), p.y_stride = p.N + 8 * below(3);
  p.a = at<int8_t>(0x10000000 + 16 * below(100)), p.b = at<int8_t>(0x20000000 + 16 * below(100));
  p.y = at<void>(0x30000000 + 16 * below(100));
  p.row_step = below(2), p.column_step = below(2);
  if (below(2)) p.row_zero = p.column_sum = at<int32_t>(0x1004);
  p.y_dtype = dtypes[below(3)];
  if (below(2)) {  // one thing is off, perhaps
    switch (below(12)) {
      case 0: p.K += below(17); break;
      case 1: p.N += below(9); break;
      case 2: p.a_stride += below(17) - 8; break;
      case 3: p.b_stride += below(17) - 8; break;
      case 4: p.y_stride += below(17) - 8; break;
      case 5: p.a += below(17); break;
      case 6: p.b += below(17); break;
      case 7: p.y = static_cast<char*>(p.y) + below(17); break;
      case 8: p.y_dtype = dtypes[below(6)]; break;
      case 9: (below(2) ? p.row_step : p.column_step) = below(4) - 1; break;
      case 10: p.row_zero = below(2) ? at<int32_t>(0x1004) : nullptr; break;
      default: (below(3) == 0 ? p.M : below(2) ? p.N : p.K) = below(2) ? 0 : 1; break;
    }
  }
  return p;
}

static void check_problems() {
  std::mt19937_64 random(1);
  int64_t taken = 0, refused = 0;
  for (int i = 0; i < 400000; ++i) {
    const IgemmProblem p = random_problem(random);
    for (int kernel = 0; kernel < sm90::kKernels; ++kernel) {
      const bool can = sm90::takes(p, kernel);
      const sm90::Tile& t = sm90::kTiles[kernel];
      // the last tile of the largest sizes is refused a little early
      const bool edge = p.M > INT32_MAX - 1024 || p.N > INT32_MAX - 1024 || p.K > INT32_MAX - 1024;
      expect(can == (legal(p, t) && !edge), can ? "takes what is not legal" : "refuses what is legal", p, kernel);
      (can ? taken : refused) += 1;
      if (!can) continue;
      const int width = sm90::swizzle(p, t);
      expect((width & (width - 1)) == 0 && width <= 8 && sm90::blocks_first(p, t) % (width * t.cluster) == 0 &&
                 sm90::blocks_second(p, t) % width == 0,
             "squares of blocks leave nothing over", p, kernel);
    }
    expect(!sm90::takes(p, -1) && !sm90::takes(p, sm90::kKernels), "no such kernel", p, -1);
  }
  expect(taken > 500000 && refused > 100000, "both happen", {}, -1);

  // Every kernel takes aligned problems of any number of rows.
  for (int64_t M = 1; M <= 300; ++M)
    for (int kernel = 0; kernel < sm90::kKernels; ++kernel) {
      IgemmProblem p{};
      p.M = M, p.N = 4096, p.K = 4096, p.a_stride = p.b_stride = p.K, p.y_stride = p.N, p.y_dtype = DType::kBFloat16;
      expect(sm90::takes(p, kernel), "takes aligned problems", p, kernel);
    }
  std::printf("%lld taken, %lld refused\n", (long long)taken, (long long)refused);
}

// Estimates: never faster than the machine, no cliffs, and the right tile for few and for many rows.
static void check_estimates() {
  constexpr int kSms = 132;
  for (const int64_t width : {1024, 4096, 8192, 28672}) {
    double before = 0;
    for (int64_t M = 1; M <= 4096; ++M) {
      IgemmProblem p{};
      p.M = M, p.N = p.K = width, p.y_dtype = DType::kBFloat16;
      int best = 0;
      for (int kernel = 0; kernel < sm90::kKernels; ++kernel) {
        const double clocks = sm90::clocks(p, kernel, kSms), products = 1.0 * M * width * width;
        expect(clocks >= products / (4096.0 * kSms), "not faster than the matrix units", p, kernel);
        if (clocks < sm90::clocks(p, best, kSms)) best = kernel;
      }
      const double clocks = sm90::clocks(p, best, kSms);
      // one row more may cost a tile more on every multiprocessor; not while memory is the limit
      expect(M == 1 || clocks < (M <= 128 ? 1.3 : 1.9) * before, "no cliffs", p, best);
      before = clocks;
      if (M <= 16) expect(sm90::kTiles[best].n == 16, "few rows", p, best);
      if (M == 4096 && width >= 4096) expect(sm90::kTiles[best].m == 128, "many rows", p, best);
    }
  }
}

int main() {
  check_table();
  check_problems();
  check_estimates();
  return 0;
}
