// What an allocation throws that fails: it knows how many bytes were asked for, and its catcher (torch/errors.h) which operator
// asked.
#pragma once

#include <cstdint>
#include <new>
#include <string>
#include <utility>

namespace quant_ops {

class OutOfMemory : public std::bad_alloc {
 public:
  explicit OutOfMemory(int64_t bytes, std::string reason = "") : bytes_(bytes), reason_(std::move(reason)) {}
  const char* what() const noexcept override { return "quant_ops: out of memory"; }
  int64_t bytes() const { return bytes_; }
  const std::string& reason() const { return reason_; }  // the allocator's, where it has one

 private:
  int64_t bytes_;
  std::string reason_;
};

}  // namespace quant_ops
