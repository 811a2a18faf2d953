#include "isa.h"

#include <stdexcept>

namespace dar {
namespace {

struct Candidate {
    const char *name;
    Isa isa;
    bool runs;
};

std::vector<Candidate> candidates() {
    std::vector<Candidate> all;
#if DAR_X86
    __builtin_cpu_init(); // the checks include the operating system's saving of the wide registers
    const bool fma = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    all.push_back({"avx512", Isa::avx512, fma && __builtin_cpu_supports("avx512f")});
    all.push_back({"avx2", Isa::avx2, fma});
#endif
    all.push_back({"baseline", Isa::baseline, true});
    return all;
}

} // namespace

std::vector<std::string> isa_supported() {
    std::vector<std::string> names;
    for (const Candidate &candidate : candidates())
        if (candidate.runs)
            names.emplace_back(candidate.name);
    return names;
}

Isa choose_isa(const std::string &name) {
    std::string names;
    for (const Candidate &candidate : candidates()) {
        if (!candidate.runs)
            continue;
        if (name.empty() || name == candidate.name)
            return candidate.isa;
        names += (names.empty() ? "" : ", ") + std::string(candidate.name);
    }
    throw std::invalid_argument("isa: expected one of " + names + ", got " + name);
}

} // namespace dar
