// The Hopper engine (cuda/engine/sm90) without a GPU: the rules of TMA and of the matrix instruction written down a second time,
// and products computed on the host from what the engine would tell the memory accelerator. Prints the first difference; run by
// test_cuda_sm90.py.
//
// emulated_product() walks over the blocks' work, performs each load as the driver's manual describes it for tiled and im2col mode,
// multiplies the boxes that would lie in shared memory, and takes every sum to the element of y that a thread would write.
#include <algorithm>
#include <array>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "engine/sm90/choose.h"

using namespace quant_ops;
using namespace quant_ops::sm90;

static void expect(bool holds, const std::string& what, const Problem& p, int kernel) {
  if (holds) return;
  const Gather& g = p.gather;
  std::printf("%s: kernel %d, M N K groups %lld %lld %lld %lld, gathers %d, image %d x %d, tap %lld, kernel columns %lld\n",
              what.c_str(), kernel, (long long)p.M, (long long)p.N, (long long)p.K, (long long)p.groups, p.gathers, g.height,
              g.width, (long long)g.group, (long long)g.kernel_columns.divisor);
  std::exit(1);
}

// ---- the table ------------------------------------------------------------------------------------------------------

static void check_table() {
  std::set<std::string> names;
  for (int kernel = 0; kernel < kKernels; ++kernel) {
    const Tile& t = kTiles[kernel];
    const std::string name = t.name;
    const auto check = [&](bool holds, const char* what) { expect(holds, what, {}, kernel); };
    check(names.insert(name).second && kernel_named(name) == kernel, "names are unique");
    check(name.find(std::to_string(t.first) + "x" + std::to_string(t.second) + "x128") != std::string::npos,
          "the name tells the tile");
    check((name.find("swapped") != std::string::npos) == t.swapped, "the name tells the swap");
    check(t.first % (64 * t.warpgroups) == 0 && t.second % 16 == 0 && t.second <= 256, "instruction shape");
    check(t.cluster == 1 || t.cluster == 2, "cluster");
    check(t.second / t.cluster % 16 == 0 && t.second / t.cluster * 64 % 1024 == 0, "a block's share of the loads starts a swizzle");
    check(t.stages >= 3 && t.blocks_per_sm * t.shared_bytes() <= 220 * 1024, "shared memory");
    const int sums = t.first * t.second / (128 * t.warpgroups),
              registers = t.moves_registers() ? t.multiply_registers() : t.registers();
    check(sums + 60 <= registers, "sums fit the registers");
    check(
        t.blocks_per_sm * (128 * t.load_registers() + 128 * t.warpgroups * t.multiply_registers()) <= 65536 || !t.moves_registers(),
        "registers of a multiprocessor");
    check(!t.moves_registers() || t.multiply_registers() >= t.registers(), "registers are taken, not given");
  }
  expect(kernel_named("none") == kKernels, "no such name", {}, -1);
}

// ---- products -------------------------------------------------------------------------------------------------------

// A box in shared memory before it is swizzled, by tiled mode: coordinates outside of the tensor give zeros.
static void load_matrix(const int8_t* base, const MatrixMap& m, const int64_t (&at)[5], std::vector<int8_t>* to) {
  to->clear();
  int64_t i[5];
  for (i[4] = 0; i[4] < m.box[4]; ++i[4])
    for (i[3] = 0; i[3] < m.box[3]; ++i[3])
      for (i[2] = 0; i[2] < m.box[2]; ++i[2])
        for (i[1] = 0; i[1] < m.box[1]; ++i[1])
          for (i[0] = 0; i[0] < m.box[0]; ++i[0]) {
            bool inside = true;
            int64_t offset = 0;
            for (int d = 0; d < 5; ++d) {
              const int64_t place = at[d] + i[d];
              inside = inside && place >= 0 && place < static_cast<int64_t>(m.size[d]);
              offset += place * (d == 0 ? 1 : static_cast<int64_t>(m.stride[d - 1]));
            }
            to->push_back(inside ? base[offset] : 0);
          }
}

// By im2col mode: pixels in the order width, height, sample within the bounding box, in steps; then the tap's offsets are added.
static void load_image(const int8_t* base, const ImageMap& m, const ImageLoad& at, std::vector<int8_t>* to) {
  to->clear();
  int64_t w = at.w, h = at.h, n = at.sample;
  const int64_t width = static_cast<int64_t>(m.size[1]), height = static_cast<int64_t>(m.size[2]);
  for (uint32_t pixel = 0; pixel < m.pixels; ++pixel) {
    for (uint32_t c = 0; c < m.channels; ++c) {
      const int64_t channel = at.channel + c, x = w + at.tap_w, y = h + at.tap_h;
      const bool inside = channel < static_cast<int64_t>(m.size[0]) && x >= 0 && x < width && y >= 0 && y < height &&
                          n < static_cast<int64_t>(m.size[3]);
      to->push_back(inside ? base[channel + x * static_cast<int64_t>(m.stride[0]) + y * static_cast<int64_t>(m.stride[1]) +
                                  n * static_cast<int64_t>(m.stride[2])]
                           : 0);
    }
    w += m.step[1];
    if (w <= width - 1 + m.upper[0]) continue;
    w = m.lower[0];
    h += m.step[2];
    if (h <= height - 1 + m.upper[1]) continue;
    h = m.lower[1];
    ++n;
  }
}

// sums[M][groups * N], each written once; a box of the tiles is not larger than the memory of a stage.
// A box, and behind it anything, as the stage has it; of all of the tile's rows.
static void add_rows(const std::vector<int8_t>& box, int rows, int load, std::vector<int8_t>* to) {
  to->insert(to->end(), box.begin(), box.end());
  to->resize(to->size() + static_cast<size_t>(rows * load) - box.size(), 77);
}

static std::vector<int32_t> emulated_product(const Problem& p, const KernelPlan& plan) {
  const Tile& t = kTiles[plan.kernel];
  const Schedule schedule = schedule_of(p, plan);
  const int64_t columns = p.N * p.groups;
  const int share = t.second / t.cluster;
  const MatrixMap weight = matrix_map(p.K, columns, p.b_stride, weight_order(p, t), schedule.load,
                                      t.swapped ? schedule.first_load : schedule.second_load);
  const auto weight_row = [&](int64_t row) {
    expect(!schedule.ordered || row % 16 == 0, "an ordered weight is loaded from a sixteenth row on", p, plan.kernel);
    return schedule.ordered ? std::array<int64_t, 2>{0, row / 16} : std::array<int64_t, 2>{row, 0};
  };
  const MatrixMap rows =
      matrix_map(p.K, p.M, p.a_stride, Order::kPlain, schedule.load, t.swapped ? schedule.second_load : schedule.first_load);
  const ImageMap image =
      p.gathers ? image_map(p.gather, p.groups * p.gather.group, p.samples, schedule.load, schedule.first_load) : ImageMap{};
  std::vector<int32_t> y(static_cast<size_t>(p.M * columns), 0);
  std::vector<int8_t> written(y.size() * static_cast<size_t>(plan.splits), 0), first_box;

  for (int64_t index = 0; index < clusters_of(schedule); ++index)
    for (int block = 0; block < cluster_blocks(schedule); ++block) {
      const int rank = block % t.cluster;
      Work w = work_of(schedule, static_cast<int32_t>(index));
      if (schedule.joined > 1) w.split = block;
      std::vector<int32_t> sums(static_cast<size_t>(t.first * t.second), 0);
      const int first_row = tile_begin(w.first + rank, t.first, schedule.first_last);
      const int second_row = tile_begin(w.second, t.second, schedule.second_last);
      const auto inside = [&](int begin, int load, int count, bool is_weight) {
        expect(begin + load <= count + (is_weight && !schedule.ordered ? 15 : 0), "a load reaches outside", p, plan.kernel);
      };
      inside(first_row, schedule.first_load, schedule.first_rows, t.swapped);
      if (t.cluster == 1 || schedule.second_rows >= t.second)
        inside(second_row, schedule.second_load * t.cluster, schedule.second_rows, !t.swapped);
      const int first = first_row + (t.swapped ? w.group * schedule.first_rows : 0);
      const int second = second_row + (t.swapped ? 0 : w.group * schedule.second_rows);
      ImageLoad at = p.gathers ? image_load(schedule, first_row) : ImageLoad{};
      const int begin = w.split * schedule.split_steps, end = std::min(begin + schedule.split_steps, schedule.steps);
      LoadPosition position(schedule, begin * (kStepBytes / schedule.load));
      for (int load = begin * (kStepBytes / schedule.load); load < end * (kStepBytes / schedule.load);
           ++load, position.advance(schedule)) {
        if (p.gathers) {
          move_to(schedule, w.group, position, &at);
          expect(at.tap_h >= 0 && at.tap_h <= 255 && at.tap_w >= 0 && at.tap_w <= 255, "offsets of a tap", p, plan.kernel);
          load_image(p.gather.codes, image, at, &first_box);
        } else if (t.swapped) {
          load_matrix(p.b, weight, {position.k, weight_row(first)[0], 0, 0, weight_row(first)[1]}, &first_box);
        } else {
          load_matrix(p.a, rows, {position.k, first, 0, 0, 0}, &first_box);
        }
        std::vector<int8_t> part, first_stage, second_stage;
        for (int other = 0; other < t.cluster; ++other) {
          const int row = second + other * share;
          if (t.swapped)
            load_matrix(p.a, rows, {position.k, row, 0, 0, 0}, &part);
          else
            load_matrix(p.b, weight, {position.k, weight_row(row)[0], 0, 0, weight_row(row)[1]}, &part);
          expect(part.size() == static_cast<size_t>(schedule.second_load * schedule.load), "bytes of a load", p, plan.kernel);
          add_rows(part, share, schedule.load, &second_stage);
        }
        expect(first_box.size() == static_cast<size_t>(schedule.first_load * schedule.load), "bytes of a load", p, plan.kernel);
        add_rows(first_box, t.first, schedule.load, &first_stage);
        for (int i = 0; i < t.first; ++i)
          for (int j = 0; j < t.second; ++j)
            for (int k = 0; k < schedule.load; ++k)
              sums[static_cast<size_t>(i * t.second + j)] += first_stage[static_cast<size_t>(i * schedule.load + k)] *
                                                             second_stage[static_cast<size_t>(j * schedule.load + k)];
      }
      // where the threads take them
      for (int i = 0; i < t.first; ++i)
        for (int j = 0; j < t.second; ++j) {
          const int along = t.swapped ? i : j, within = along % 16;
          const int lane = t.swapped ? within % 8 * 4 : within % 8 / 2;
          const ThreadColumns of = thread_columns(t.swapped, schedule.ordered, lane);
          const int column = along - within + of.first + within / 8 * of.next_eight + (t.swapped ? 0 : within % 2);
          const int64_t m = t.swapped ? second_row + j : first_row + i, n = (t.swapped ? first_row : second_row) + column;
          const int64_t own_first = int64_t{w.first + rank} * t.first, own_second = int64_t{w.second} * t.second;
          if (m >= p.M || n >= p.N || m < (t.swapped ? own_second : own_first)) continue;
          if (n / 16 * 16 < (t.swapped ? own_first : own_second)) continue;
          const auto place = static_cast<size_t>(m * columns + w.group * p.N + n);
          y[place] += sums[static_cast<size_t>(i * t.second + j)];
          int8_t& once = written[place + y.size() * static_cast<size_t>(w.split)];
          expect(once == 0, "a sum is written twice", p, plan.kernel);
          once = 1;
        }
    }
  for (const int8_t w : written) expect(w == 1, "a sum is not written", p, plan.kernel);
  return y;
}

static std::vector<int32_t> product(const Problem& p) {
  const int64_t columns = p.N * p.groups;
  std::vector<int32_t> y(static_cast<size_t>(p.M * columns), 0);
  for (int64_t m = 0; m < p.M; ++m)
    for (int64_t n = 0; n < columns; ++n)
      for (int64_t k = 0; k < p.K; ++k) {
        const int8_t* a = p.gathers ? nullptr : p.a + m * p.a_stride + k;
        if (p.gathers) {
          const GatherRow row = gather_row(p.gather, m, n / p.N);
          const GatherTap tap = gather_tap(p.gather, k);
          a = inside(p.gather, row, tap) ? row.at + tap.offset : nullptr;
        }
        if (a != nullptr) y[static_cast<size_t>(m * columns + n)] += *a * p.b[n * p.b_stride + k];
      }
  return y;
}

static std::mt19937_64 random_bits(1);
static int64_t below(int64_t n) { return static_cast<int64_t>(random_bits() % static_cast<uint64_t>(n)); }

static const int8_t* codes(int64_t count) {
  static std::vector<int8_t> memory[2];
  static int turn = 0;
  std::vector<int8_t>& m = memory[turn++ % 2];
  m.resize(static_cast<size_t>(count) + 16);
  for (int8_t& code : m) code = static_cast<int8_t>(random_bits());
  return m.data() + (16 - reinterpret_cast<uintptr_t>(m.data()) % 16) % 16;
}

static Problem random_problem(bool gathers) {
  Problem p;
  p.gathers = gathers;
  p.N = below(2) == 0 ? 1 + below(200) : 16 * (1 + below(12));
  if (!gathers) {
    p.M = 1 + below(150);
    p.K = 16 * (1 + below(30));
    p.a_stride = p.K + 16 * below(3);
    p.a = codes(p.M * p.a_stride);
  } else {
    p.groups = below(3) == 0 ? 2 : 1;
    Gather& g = p.gather;
    g.group = p.groups == 2 ? 64 : 16 * (1 + below(12));
    p.samples = 1 + below(3);
    int64_t size[2], kernel[2], count[2];
    for (int d = 0; d < 2; ++d) {
      kernel[d] = 1 + below(3);
      g.stride[d] = static_cast<int32_t>(1 + below(3));
      g.dilation[d] = static_cast<int32_t>(1 + below(2));
      g.pad[d] = static_cast<int32_t>(below(3)) - (below(4) == 0 ? 1 : 0);
      const int64_t reach = (kernel[d] - 1) * g.dilation[d];
      size[d] = 1 + reach + 2 * std::max(0, -g.pad[d]) + below(8);
      count[d] = (size[d] + 2 * g.pad[d] - reach - 1) / g.stride[d] + 1;
      if (count[d] < 1) count[d] = 1;
    }
    g.height = static_cast<int32_t>(size[0]);
    g.width = static_cast<int32_t>(size[1]);
    g.pixel = p.groups * g.group;
    g.row = g.pixel * size[1] + 16 * below(2);
    g.sample = g.row * size[0];
    g.pixels = FastDiv(count[0] * count[1]);
    g.columns = FastDiv(count[1]);
    g.tap = FastDiv(g.group);
    g.kernel_columns = FastDiv(kernel[1]);
    g.codes = codes(p.samples * g.sample);
    p.M = p.samples * count[0] * count[1];
    p.K = kernel[0] * kernel[1] * g.group;
  }
  p.b_stride = p.K + 16 * below(2);
  p.b = codes(p.groups * p.N * p.b_stride);
  return p;
}

static void check_products() {
  for (int i = 0; i < 120; ++i) {
    const Problem p = random_problem(i % 2 == 1);
    const std::vector<int32_t> expected = product(p);
    for (int kernel = i % 3; kernel < kKernels; kernel += 3) {
      if (!takes(p, kernel)) {
        expect(kTiles[kernel].swapped && p.gathers, "refuses what is legal", p, kernel);
        continue;
      }
      const KernelPlan plan = choose(p, 132, KernelChoice(std::string(kTiles[kernel].name) + (i % 4 == 0 ? ":3" : "")));
      expect(plan.kernel == kernel && plan.engine == Engine::kSm90, "the wanted kernel", p, kernel);
      expect(emulated_product(p, plan) == expected, "another product", p, kernel);
    }
  }
}

// ---- stores ---------------------------------------------------------------------------------------------------------

// What the threads of a tile store for one row of y: results [n, n + count) at once, aligned if that is a vector.
static void check_row_of_stores(const Problem& p, const KernelPlan& plan, int64_t row_address, int64_t result_bytes) {
  const Tile& t = kTiles[plan.kernel];
  const Schedule schedule = schedule_of(p, plan);
  const bool vectors = stores_vectors(p);
  std::vector<int8_t> written(static_cast<size_t>(p.N), 0);
  const auto store = [&](int64_t n, int neighbours) {
    if (vectors) {
      expect(n + neighbours <= p.N, "a vector ends in its row", p, plan.kernel);
      expect((row_address + n * result_bytes) % (neighbours * result_bytes) == 0, "a vector is aligned", p, plan.kernel);
    }
    for (int64_t i = n; i < std::min<int64_t>(n + neighbours, p.N); ++i) {
      expect(written[static_cast<size_t>(i)] == 0, "a result is written twice", p, plan.kernel);
      written[static_cast<size_t>(i)] = 1;
    }
  };
  const int blocks = t.swapped ? schedule.first_blocks : schedule.second_blocks, size = t.swapped ? t.first : t.second;
  for (int block = 0; block < blocks; ++block) {
    const int begin = tile_begin(block, size, t.swapped ? schedule.first_last : schedule.second_last);
    expect(begin % 16 == 0, "tiles begin at a sixteenth column", p, plan.kernel);
    for (int64_t sixteen = int64_t{block} * size; sixteen < std::min<int64_t>(p.N, begin + size); sixteen += 16)
      for (int lane = 0; lane < 32; lane += t.swapped ? 4 : 1) {  // the other lanes have other rows
        if (!t.swapped && lane >= 4) break;
        const ThreadColumns of = thread_columns(t.swapped, vectors || schedule.ordered, lane);
        const int neighbours = vectors ? (t.swapped ? 2 : 4) : t.swapped ? 1 : 2;
        for (int eight = 0; eight < (vectors ? 1 : 2); ++eight) store(sixteen + of.first + eight * of.next_eight, neighbours);
      }
  }
  for (const int8_t w : written) expect(w == 1, "a result is not written", p, plan.kernel);
}

// Any number of columns, with each type of result, in memory that begins with y or a little later, and rows with or without a gap.
static void check_columns() {
  constexpr DType kResults[] = {DType::kInt32, DType::kFloat32, DType::kFloat16, DType::kBFloat16, DType::kInt8, DType::kUInt8};
  constexpr int64_t kCounts[] = {1, 7, 10, 16, 17, 20, 33, 48, 1000, 1001, 50257};
  for (const int64_t n : kCounts)
    for (int kernel = 0; kernel < kKernels; ++kernel) {
      Problem p;
      p.N = n;
      p.M = 3;
      p.K = n > 2000 ? 16 : 144;
      p.a_stride = p.b_stride = p.K;
      p.a = codes(p.M * p.K);
      p.b = codes(p.N * p.K);
      const auto plan_of = [&](int64_t splits) {
        return choose(p, 132, KernelChoice(std::string(kTiles[kernel].name) + ":" + std::to_string(splits)));
      };
      expect(takes(p, kernel), "any number of columns", p, kernel);
      if (n <= 2000 || kernel % 4 == 0)  // the large one takes seconds a kernel
        for (int64_t splits = 1; splits <= (n <= 2000 ? 2 : 1); ++splits)
          expect(emulated_product(p, plan_of(splits)) == product(p), "another product", p, kernel);
      for (const DType dtype : kResults)
        for (const int64_t offset : {0, 1, 4})
          for (const int64_t gap : {0, 1, 8}) {
            const int64_t bytes = dtype_bytes(dtype), stride = n + gap;
            IgemmProblem dense{.M = p.M, .N = n, .K = p.K, .y_stride = stride, .y_dtype = dtype};
            dense.y = reinterpret_cast<void*>(uintptr_t{4096} + static_cast<uintptr_t>(offset * bytes));
            p.out = epilogue_of(dense);
            for (int64_t m = 0; m < p.M; ++m) check_row_of_stores(p, plan_of(1), 4096 + (offset + m * stride) * bytes, bytes);
          }
    }
}

// ---- what is refused ------------------------------------------------------------------------------------------------

static void check_refusals() {
  const auto refused = [](const char* what, bool gathers, auto change) {
    Problem p = random_problem(gathers);
    while (p.groups != 1) p = random_problem(gathers);
    for (int kernel = 0; kernel < kKernels; ++kernel) {
      if (!takes(p, kernel)) continue;
      Problem changed = p;
      change(changed);
      expect(!takes(changed, kernel), what, changed, kernel);
    }
  };
  refused("rows that are not whole vectors", false, [](Problem& p) { p.K += 8; });
  refused("a stride that TMA does not take", false, [](Problem& p) { p.a_stride += 8; });
  refused("a stride of the weight that TMA does not take", false, [](Problem& p) { p.b_stride += 8; });
  refused("an address that TMA does not take", false, [](Problem& p) { p.a += 8; });
  refused("an address of the weight that TMA does not take", false, [](Problem& p) { p.b += 8; });
  refused("rows beyond int32", false, [](Problem& p) { p.M = INT32_MAX; });
  refused("no rows", false, [](Problem& p) { p.M = 0; });
  refused("an image that TMA does not take", true, [](Problem& p) { p.gather.codes += 4; });
  refused("pixels that TMA does not take", true, [](Problem& p) { p.gather.pixel += 4; });
  refused("a step beyond 8", true, [](Problem& p) { p.gather.stride[1] = 9; });
  refused("a corner beyond 8 bits", true, [](Problem& p) { p.gather.pad[0] = 129; });
  refused("the far corner beyond 8 bits", true, [](Problem& p) { p.gather.width += 200; });
  refused("a tap beyond 8 bits", true, [](Problem& p) {
    p.K = 2 * p.gather.group;
    p.gather.kernel_columns = FastDiv(2);
    p.gather.dilation[1] = 256;
  });
}

int main() {
  check_table();
  check_products();
  check_columns();
  check_refusals();
  std::puts("ok");
  return 0;
}
