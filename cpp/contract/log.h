// QUANT_OPS_LOG=1: every call of an operator says one line on stderr: its name, its arguments and the kernel that it takes. The
// line is written just before the kernel runs, so that the last line before a crash names the kernel that crashed. torch/logged.h
// begins a line, with what the operator was given; the driver ends it with log_kernel, as soon as it has chosen. Each library has
// its own copy of what is here. Read next: torch/logged.h.
#pragma once

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

namespace quant_ops {

enum class LogState : int { kUnread, kOff, kOn };
inline std::atomic<LogState> log_state{LogState::kUnread};

// Throws for a value that is neither 0 nor 1; then the next call reads the variable again.
inline bool read_log_state() {
  const char* value = std::getenv("QUANT_OPS_LOG");
  const bool on = value != nullptr && std::strcmp(value, "1") == 0;
  if (!on && value != nullptr && *value != '\0' && std::strcmp(value, "0") != 0)
    throw std::runtime_error(std::string("quant_ops: expected QUANT_OPS_LOG to be 0 or 1, got '") + value +
                             "'. Unset it to write no log.");
  log_state.store(on ? LogState::kOn : LogState::kOff, std::memory_order_relaxed);
  return on;
}

inline bool logging() {
  const LogState state = log_state.load(std::memory_order_relaxed);
  if (state == LogState::kOff) [[likely]]
    return false;
  return state == LogState::kOn || read_log_state();
}

// What is known of the call that this thread is in; empty outside of a call and once its line is written.
inline std::string& logged_call() {
  thread_local std::string call;
  return call;
}

// Ends the line of this thread's call with the name of the kernel that is about to run, which `name` gives. The first name counts:
// an operator says its product's name before it launches the kernels around it.
template <class Name>
void log_kernel(const Name& name) {
  if (!logging() || logged_call().empty()) return;
  const std::string line = "quant_ops: " + logged_call() + ": " + name() + "\n";
  logged_call().clear();
  std::fwrite(line.data(), 1, line.size(), stderr);  // one call, so that threads do not mix their lines
}

}  // namespace quant_ops
