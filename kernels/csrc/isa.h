// Instruction sets that the CPU ops are compiled for, and which of them this processor and its operating system run.
#pragma once

#include <string>
#include <vector>

namespace dar {

enum class Isa { baseline, avx2, avx512 };

// Names of those that run here, the fastest first; the last is always "baseline".
std::vector<std::string> isa_supported();

// The one of this name, or the fastest where the name is empty. Throws std::invalid_argument.
Isa choose_isa(const std::string &name);

} // namespace dar
