// Calls that are repeated with another first argument and all others as they were: those of a layer.
//
// Each argument of an operator costs its callers: Python looks for it among the keywords, the dispatcher makes a value of it, and
// torch's stable ABI turns the value into another. For thirteen arguments that is longer than a small layer computes. So a layer
// calls its operator once while the library keeps the arguments (KeepsCall), and afterwards passes x and the number of the call.
// The operator's own function runs, with all of its checks. Read next: logged.h, which hands the calls over; nn/base.py.
#pragma once

#include <functional>
#include <memory>
#include <mutex>
#include <vector>

#include "torch/errors.h"

namespace quant_ops {

using Repeat = std::function<Tensor(const Tensor& x)>;

// The calls that are kept, by number. A layer says when it does not need its own any more.
class KeptCalls {
 public:
  int64_t add(Repeat call) {
    const std::lock_guard lock(mutex_);
    if (free_.empty()) {
      free_.push_back(static_cast<int64_t>(calls_.size()));
      calls_.emplace_back();
    }
    const int64_t number = free_.back();
    free_.pop_back();
    calls_[static_cast<size_t>(number)] = std::make_shared<const Repeat>(std::move(call));
    return number;
  }

  void remove(int64_t number) {
    std::shared_ptr<const Repeat> last;  // its tensors are freed without the lock
    const std::lock_guard lock(mutex_);
    last = std::move(calls_.at(static_cast<size_t>(number)));
    free_.push_back(number);
  }

  // Null where there is none. It stays valid while it is held, whatever other threads remove.
  std::shared_ptr<const Repeat> find(int64_t number) {
    const std::lock_guard lock(mutex_);
    return number >= 0 && number < static_cast<int64_t>(calls_.size()) ? calls_[static_cast<size_t>(number)] : nullptr;
  }

  static KeptCalls& all() {
    static KeptCalls* calls = new KeptCalls;  // never destroyed: layers may outlive the library's statics
    return *calls;
  }

 private:
  std::mutex mutex_;
  std::vector<std::shared_ptr<const Repeat>> calls_;
  std::vector<int64_t> free_;
};

// Whether this thread's next call of an operator is to be kept, and the number of the one that was.
struct KeepsCall {
  static constexpr int64_t kNone = -1;
  bool wanted = false;
  int64_t kept = kNone;

  static KeepsCall& of_thread() {
    thread_local KeepsCall state;
    return state;
  }
};

// Whether calls of such a function are kept: on the CPU, where arguments take longer than small layers.
template <class Backend, class Result, class... Parameters>
constexpr bool kIsRepeatable = false;
template <class Backend, class... Parameters>
  requires(Backend::kKeepsCalls)
constexpr bool kIsRepeatable<Backend, Tensor, const Tensor&, Parameters...> = true;

// Repeats a call of the operator `Name::text()`.
template <class Name>
struct Repeated {
  static Tensor call(const Tensor& x, int64_t number) {
    const std::shared_ptr<const Repeat> repeat = KeptCalls::all().find(number);
    QO_EXPECT(repeat != nullptr, Name::text(), "the number of a call that a layer has kept, got ", number, ". Call the layer.");
    return (*repeat)(x);
  }
};

}  // namespace quant_ops
