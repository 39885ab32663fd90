// Names of the table's kernels for QUANT_OPS_LOG (contract/log.h).
#pragma once

#include <initializer_list>
#include <string>

#include "contract/log.h"

namespace quant_ops {

// Ends the log's line of this call with the names of entries of the table in use, which are about to run.
void log_entries(std::initializer_list<const char*> entries);

// A name where plain C++ takes one element after the other, without the table.
inline std::string one_by_one() { return "one_by_one"; }

}  // namespace quant_ops
