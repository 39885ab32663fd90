// Chooses the kernel table at run time: the fastest instruction set that the processor and the operating system offer, or the one
// that QUANT_OPS_ISA names. An unknown or unrunnable name is an error, never ignored.
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <tuple>

#include "kernels/log.h"
#include "kernels/table.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif
#if defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace quant_ops {
namespace {

#if defined(__x86_64__)

// By cpuid: compilers differ in which of these names __builtin_cpu_supports knows.
bool has_avxvnni() {
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
}

// AMX needs the instructions (cpuid), tile registers that the system saves (xgetbv) and, on Linux, its permission for this process,
// which a container may refuse. Without all three the first tile instruction would be a fault.
bool has_amx() {
#if defined(__linux__)
  unsigned a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c >> 27 & 1)) return false;                             // xgetbv
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d >> 24 & 1) || !(d >> 25 & 1)) return false;  // amx-tile, amx-int8
  unsigned low, high;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  if ((low >> 17 & 3) != 3) return false;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  static const bool permitted = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return permitted;
#else
  return false;
#endif
}

#elif defined(__aarch64__)

// As the system tells; on one that does not, the plain C++ runs.
bool has_dot() {
#if defined(__linux__)
  return getauxval(AT_HWCAP) >> 20 & 1;  // HWCAP_ASIMDDP
#elif defined(__APPLE__)
  return true;  // every Apple processor that runs macOS
#else
  return false;
#endif
}

bool has_i8mm() {
#if defined(__linux__)
  return getauxval(AT_HWCAP2) >> 13 & 1;  // HWCAP2_I8MM, which older headers do not name
#elif defined(__APPLE__)
  int value = 0;
  size_t size = sizeof(value);
  return sysctlbyname("hw.optional.arm.FEAT_I8MM", &value, &size, nullptr, 0) == 0 && value != 0;
#else
  return false;
#endif
}

#endif

struct Candidate {
  const KernelTable* table;
  bool runs;
};

// Worst first. __builtin_cpu_supports asks cpuid and xgetbv: a vector state that the system does not save counts as absent.
int candidates(Candidate out[8]) {
  int n = 0;
  static const KernelTable scalar{kScalarProducts, kScalarVectors};
  out[n++] = {&scalar, true};
#if defined(__x86_64__)
  static const KernelTable avx2{kAvx2Products, kAvx2Vectors};
  static const KernelTable avx512{kAvx512Products, kAvx512Vectors};
  static const KernelTable avxvnni{kAvxVnniProducts, kAvx2Vectors};
  static const KernelTable amx{kAmxProducts, kAvx512Vectors};
  static const KernelTable avx512vnni{kAvx512VnniProducts, kAvx512Vectors};
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const bool has_avx512vnni = has_avx512 && __builtin_cpu_supports("avx512vnni");
  out[n++] = {&avx2, has_avx2};
  out[n++] = {&avx512, has_avx512};
  out[n++] = {&avxvnni, has_avx2 && has_avxvnni()};
  out[n++] = {&avx512vnni, has_avx512vnni};
  out[n++] = {&amx, has_avx512vnni && has_amx()};  // 2.3 times as fast with many rows; few rows take avx512vnni's kernel (amx.cpp)
#elif defined(__aarch64__)
  static const KernelTable neon_dot{kNeonDotProducts, kNeonVectors};
  static const KernelTable neon_i8mm{kNeonI8mmProducts, kNeonVectors};
  out[n++] = {&neon_dot, has_dot()};
  out[n++] = {&neon_i8mm, has_dot() && has_i8mm()};
#endif
  return n;
}

const KernelTable* choose(const char* name, const char* source) {
  Candidate all[8];
  const int n = candidates(all);
  std::string known;
  const KernelTable* best = nullptr;
  for (int i = 0; i < n; ++i) {
    if (!all[i].runs) continue;
    best = all[i].table;
    known += (known.empty() ? "" : ", ") + std::string(best->isa);
    if (name && std::strcmp(name, best->isa) == 0) return best;
  }
  if (!name || !*name) return best;
  throw std::runtime_error(std::string("quant_ops: expected ") + source + " to be one of " + known + " on this machine, got '" +
                           name + "'. Unset it to choose automatically.");
}

std::atomic<const KernelTable*> current{nullptr};

}  // namespace

const KernelTable& kernels() {
  const KernelTable* table = current.load(std::memory_order_acquire);
  if (table == nullptr) {  // racing first uses agree: the choice depends on the machine and the environment only
    table = choose(std::getenv("QUANT_OPS_ISA"), "QUANT_OPS_ISA");
    current.store(table, std::memory_order_release);
  }
  return *table;
}

void set_isa(const char* name) {
  current.store(*name ? choose(name, "the instruction set") : choose(std::getenv("QUANT_OPS_ISA"), "QUANT_OPS_ISA"),
                std::memory_order_release);
}

int runnable_kernels(const KernelTable* tables[8]) {
  Candidate all[8];
  const int n = candidates(all);
  int count = 0;
  for (int i = 0; i < n; ++i)
    if (all[i].runs) tables[count++] = all[i].table;
  return count;
}

std::string gemm_name(const KernelTable& table, int64_t rows, int64_t width) {
  const GemmShape shape = table.gemm_shape(rows, width);
  return "gemm_u8s8_" + std::to_string(shape.rows) + "x" + std::to_string(shape.columns) + "_" + shape.isa;
}

namespace {

// A field that is a function, and its name.
template <class Field>
struct Entry {
  const char* name;
  Field field;
};
template <class Field>
Entry(const char*, Field) -> Entry<Field>;

constexpr std::tuple kProductEntries{Entry{"depthwise", &KernelTable::depthwise}, Entry{"nibbles", &KernelTable::nibbles},
                                     Entry{"dot", &KernelTable::dot}};
constexpr std::tuple kVectorEntries{Entry{"quantize", &KernelTable::quantize},
                                    Entry{"dequantize", &KernelTable::dequantize},
                                    Entry{"straight_through", &KernelTable::straight_through},
                                    Entry{"straight_through_columns", &KernelTable::straight_through_columns},
                                    Entry{"range", &KernelTable::range},
                                    Entry{"range_columns", &KernelTable::range_columns},
                                    Entry{"column_sums", &KernelTable::column_sums},
                                    Entry{"center", &KernelTable::center},
                                    Entry{"codes", &KernelTable::codes},
                                    Entry{"pack", &KernelTable::pack},
                                    Entry{"quantize_float", &KernelTable::quantize_float},
                                    Entry{"quantize_blocks", &KernelTable::quantize_blocks},
                                    Entry{"quantize_block_columns", &KernelTable::quantize_block_columns},
                                    Entry{"widen", &KernelTable::widen},
                                    Entry{"multiply", &KernelTable::multiply},
                                    Entry{"fold", &KernelTable::fold},
                                    Entry{"sum_codes", &KernelTable::sum_codes},
                                    Entry{"expand", &KernelTable::expand},
                                    Entry{"few_rows", &KernelTable::few_rows},
                                    Entry{"float_tile", &KernelTable::float_tile},
                                    Entry{"store", &KernelTable::store},
                                    Entry{"random_words", &KernelTable::random_words},
                                    Entry{"quantize_affine", &KernelTable::quantize_affine},
                                    Entry{"dequantize_affine", &KernelTable::dequantize_affine},
                                    Entry{"pointwise", &KernelTable::pointwise},
                                    Entry{"max_pool", &KernelTable::max_pool},
                                    Entry{"sum_pool", &KernelTable::sum_pool},
                                    Entry{"normalize", &KernelTable::normalize},
                                    Entry{"softmax", &KernelTable::softmax}};
static_assert(sizeof(VectorKernels) == (1 + std::tuple_size_v<decltype(kVectorEntries)>)*sizeof(void*),
              "a kernel has no name here");

}  // namespace

std::vector<std::pair<std::string, std::string>> kernel_names(const KernelTable& table) {
  std::vector<std::pair<std::string, std::string>> names{{"gemm", gemm_name(table, table.gemm_rows, kPanel)}};
  if (std::strcmp(table.gemm_shape(1, kPanel).isa, table.gemm_shape(table.gemm_rows, kPanel).isa) != 0)
    names.emplace_back("gemm_few_rows", gemm_name(table, 1, kPanel));
  const auto add = [&](const char* space, const auto& entries) {
    const auto one = [&](const auto& entry) {
      if (table.*entry.field) names.emplace_back(entry.name, std::string(space) + "::" + entry.name);
    };
    std::apply([&](const auto&... entry) { (one(entry), ...); }, entries);
  };
  add(table.isa, kProductEntries);
  add(table.vectors, kVectorEntries);
  return names;
}

void log_entries(std::initializer_list<const char*> entries) {
  log_kernel([&] {
    std::string text;
    for (const char* entry : entries)
      for (const auto& [known, name] : kernel_names(kernels()))
        if (known == entry) text += (text.empty() ? "" : ", ") + name;
    return text;
  });
}

}  // namespace quant_ops
