// Threads that share the tasks of one kernel call. A pool of one thread is the caller alone.
//
// Tasks are claimed one by one, so a thread that the machine holds up delays no more than the task it has. Between
// kernels of a step, a worker spins for a moment (waking it would cost as much as a small kernel), then it sleeps.

#pragma once

#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

namespace baton {

class Pool {
  public:
    explicit Pool(int num_threads) {
        for (int i = 1; i < num_threads; ++i) workers_.emplace_back([this] { work(); });
    }

    ~Pool() {
        stop_.store(true);
        wake();
        for (std::thread& worker : workers_) worker.join();
    }

    // Whether the weights that these threads read in a step fit no cache: a product of one row then reads past the caches.
    bool streamed = false;

    int num_threads() const { return static_cast<int>(workers_.size()) + 1; }

    // Calls task(0), ..., task(count - 1), each once and on any thread; returns when all have returned.
    template <class Task>
    void run(long count, const Task& task) {
        if (workers_.empty() || count < 2) {
            for (long i = 0; i < count; ++i) task(i);
            return;
        }
        task_ = &task;
        call_ = [](const void* on, long i) { (*static_cast<const Task*>(on))(i); };
        count_ = count;
        left_.store(count, std::memory_order_relaxed);
        uint64_t job = (open_.load(std::memory_order_relaxed) >> 32) + 1;
        open_.store(job << 32 | static_cast<uint64_t>(count), std::memory_order_release);
        wake();
        while (step(static_cast<uint32_t>(job))) {
        }
        while (left_.load(std::memory_order_acquire) > 0) pause();
    }

  private:
    static constexpr int kSpins = 20000;  // about 0.1 ms

    static void pause() {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#endif
    }

    void wake() {
        rounds_.fetch_add(1);
        rounds_.notify_all();
    }

    // Runs one task of the job if one is open. A claim succeeds only while the job is the current one, and the job
    // stays the current one until all claimed tasks have returned: so its description is read after the claim.
    bool step(uint32_t job) {
        uint64_t open = open_.load(std::memory_order_acquire);
        do {
            if (static_cast<uint32_t>(open >> 32) != job || static_cast<uint32_t>(open) == 0) return false;
        } while (!open_.compare_exchange_weak(open, open - 1, std::memory_order_acq_rel));
        call_(task_, count_ - static_cast<long>(static_cast<uint32_t>(open)));
        left_.fetch_sub(1, std::memory_order_release);
        return true;
    }

    void work() {
        uint32_t seen = 0;
        while (true) {
            uint32_t rounds = rounds_.load();
            for (int spins = 0; rounds == seen && spins < kSpins; ++spins) {
                pause();
                rounds = rounds_.load(std::memory_order_acquire);
            }
            if (rounds == seen) {
                rounds_.wait(seen);
                continue;
            }
            seen = rounds;
            if (stop_.load()) return;
            uint32_t job = static_cast<uint32_t>(open_.load(std::memory_order_acquire) >> 32);
            while (step(job)) {
            }
        }
    }

    std::vector<std::thread> workers_;
    std::atomic<uint64_t> open_{0};   // number of the job << 32 | tasks that nobody has claimed
    std::atomic<long> left_{0};       // tasks that have not returned
    std::atomic<uint32_t> rounds_{0};  // counts wakes
    std::atomic<bool> stop_{false};
    const void* task_ = nullptr;
    void (*call_)(const void*, long) = nullptr;
    long count_ = 0;
};

}  // namespace baton

// The name by which the C interface knows it.
struct BatonPool : baton::Pool {
    using Pool::Pool;
};
