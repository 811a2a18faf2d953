// Instruction sets that the CPU ops are compiled for, and which of them this processor and its operating system run.
#pragma once

#include <string>
#include <vector>

namespace dar {

// Each includes those before it. avx512 is its foundation alone; avx512_vnni adds the byte and word instructions and
// products of bytes (Cascade Lake and later), avx512_bf16 products of bf16 (Cooper Lake, Zen 4 and later).
enum class Isa { baseline, avx2, avx512, avx512_vnni, avx512_bf16 };

// Names of those that run here, the fastest first; the last is always "baseline".
std::vector<std::string> isa_supported();

// The one of this name, or the fastest where the name is empty, but at most `most`: an op names the highest that it
// has code for. Throws std::invalid_argument.
Isa choose_isa(const std::string &name, Isa most = Isa::avx512);

} // namespace dar
