// Threads that work through the steps of one call together, with barriers between the steps.
#pragma once

#include <atomic>
#include <cstdint>
#include <optional>
#include <thread>

#ifdef _OPENMP
#include <omp.h>
#else
#include <system_error>
#include <vector>
#endif

namespace dar {

// A barrier of a fraction of a microsecond while every thread has a core of its own: they spin, and only after a while
// give their core to whoever else wants it.
class Team {
  public:
    explicit Team(int workers) : workers_(workers) {}
    int workers() const { return workers_; }

    void wait() {
        if (workers_ == 1)
            return;
        const uint32_t phase = phase_.load(std::memory_order_relaxed);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == workers_) {
            arrived_.store(0, std::memory_order_relaxed);
            phase_.store(phase + 1, std::memory_order_release);
            return;
        }
        for (int spins = 0; phase_.load(std::memory_order_acquire) == phase; ++spins) {
            if (spins < SPINS)
                pause();
            else
                std::this_thread::yield();
        }
    }

    // The share [first, last) of n of this worker, in whole units.
    struct Share {
        int64_t first, last;
    };
    Share share(int64_t n, int64_t unit, int worker) const {
        const int64_t units = (n + unit - 1) / unit;
        const int64_t first = units * worker / workers_ * unit, last = units * (worker + 1) / workers_ * unit;
        return {first < n ? first : n, last < n ? last : n};
    }

  private:
    static constexpr int SPINS = 4000; // about 50 microseconds

    static void pause() {
#if defined(__x86_64__) || defined(__i386__)
        __builtin_ia32_pause();
#elif defined(__aarch64__)
        asm volatile("yield");
#endif
    }

    const int workers_;
    alignas(64) std::atomic<int> arrived_{0};
    alignas(64) std::atomic<uint32_t> phase_{0};
};

// Calls body(team, worker) once on each of at most `threads` threads at the same time. It must not throw.
template <typename Body> void run_team(int threads, const Body &body) {
    if (threads <= 1) { // no thread pool: safe in a forked data-loading worker
        Team team(1);
        body(team, 0);
        return;
    }
#ifdef _OPENMP
    // The runtime may give fewer threads than asked for; the team is as large as what came.
    std::optional<Team> team;
#pragma omp parallel num_threads(threads)
    {
#pragma omp single
        team.emplace(omp_get_num_threads());
        body(*team, omp_get_thread_num());
    }
#else
    std::atomic<Team *> shared{nullptr};
    std::vector<std::thread> pool;
    pool.reserve(static_cast<size_t>(threads));
    try {
        for (int worker = 1; worker < threads; ++worker)
            pool.emplace_back([&shared, &body, worker] {
                Team *team = shared.load();
                for (; team == nullptr; team = shared.load())
                    std::this_thread::yield();
                body(*team, worker);
            });
    } catch (const std::system_error &) {
        // The system refuses more threads: the team is smaller.
    }
    Team team(static_cast<int>(pool.size()) + 1);
    shared = &team;
    body(team, 0);
    for (std::thread &thread : pool)
        thread.join();
#endif
}

} // namespace dar
