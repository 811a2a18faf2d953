#include "isa.h"

#include <algorithm>
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
    const bool foundation = fma && __builtin_cpu_supports("avx512f");
    const bool vnni = foundation && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni");
    all.push_back({"avx512_bf16", Isa::avx512_bf16, vnni && __builtin_cpu_supports("avx512bf16")});
    all.push_back({"avx512_vnni", Isa::avx512_vnni, vnni});
    all.push_back({"avx512", Isa::avx512, foundation});
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

Isa choose_isa(const std::string &name, Isa most) {
    std::string names;
    for (const Candidate &candidate : candidates()) {
        if (!candidate.runs)
            continue;
        if (name.empty() || name == candidate.name)
            return std::min(candidate.isa, most);
        names += (names.empty() ? "" : ", ") + std::string(candidate.name);
    }
    throw std::invalid_argument("isa: expected one of " + names + ", got " + name);
}

} // namespace dar
