// One parallel loop: OpenMP where the compiler has it, std::thread otherwise.
#pragma once

#include <algorithm>
#include <cstdint>

#ifdef _OPENMP
#include <omp.h>
#else
#include <atomic>
#include <system_error>
#include <thread>
#include <vector>
#endif

namespace dar {

// Calls body(i, worker) once for every i in [0, n), worker in [0, threads). The body must not throw.
template <typename Body> void parallel_for(int64_t n, int threads, const Body &body) {
    threads = static_cast<int>(std::min<int64_t>(threads, n));
    if (threads <= 1) { // no thread pool: safe in a forked data-loading worker
        for (int64_t i = 0; i < n; ++i)
            body(i, 0);
        return;
    }
#ifdef _OPENMP
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (int64_t i = 0; i < n; ++i)
        body(i, omp_get_thread_num());
#else
    std::atomic<int64_t> next{0};
    auto work = [&](int worker) {
        for (int64_t i = next++; i < n; i = next++)
            body(i, worker);
    };
    std::vector<std::thread> pool;
    pool.reserve(static_cast<size_t>(threads));
    try {
        for (int worker = 1; worker < threads; ++worker)
            pool.emplace_back(work, worker);
    } catch (const std::system_error &) {
        // The system refuses more threads: those that run share all of the work.
    }
    work(0);
    for (std::thread &thread : pool)
        thread.join();
#endif
}

} // namespace dar
