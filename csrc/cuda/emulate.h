// The part of CUDA these operators use, in plain C++ on the CPU: the tests run every kernel without a GPU. Blocks run
// one after the other, the threads of a block as fibers that change at barriers. MIREPRO_EMULATION=reverse runs them
// backwards, which shows a missing barrier. Not a product: slow, and it knows nothing of warps or memory models.
#pragma once
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

#define __global__
#define __device__
#define __shared__ static

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

namespace mirepro::emulation {

inline dim3 thread, block, threads, blocks;
inline ucontext_t scheduler;

struct Fiber {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(1 << 17);
  bool done = true;
};
inline std::vector<Fiber> fibers;
inline std::function<void()> body;

inline void run_body() {
  body();
  fibers[thread.x].done = true;
}

inline void wait() { swapcontext(&fibers[thread.x].context, &scheduler); }

/// Runs every thread of the current block from barrier to barrier.
inline void run_block(bool reverse) {
  const unsigned n = threads.x;
  for (unsigned t = 0; t < n; ++t) {
    auto& fiber = fibers[t];
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = fiber.stack.size();
    fiber.context.uc_link = &scheduler;
    makecontext(&fiber.context, run_body, 0);
    fiber.done = false;
  }
  for (unsigned done = 0; done == 0;) {
    for (unsigned i = 0; i < n; ++i) {
      thread.x = reverse ? n - 1 - i : i;
      swapcontext(&scheduler, &fibers[thread.x].context);
      done += fibers[thread.x].done;
    }
    if (done != 0 && done != n) throw std::logic_error("emulation: some threads of a block ended while others wait at a barrier");
  }
}

inline void run(dim3 grid, unsigned n, std::function<void()> f) {
  const char* order = std::getenv("MIREPRO_EMULATION");
  const bool reverse = order != nullptr && std::string(order) == "reverse";
  if (fibers.size() < n) fibers.resize(n);
  body = std::move(f);
  threads = dim3(n);
  blocks = grid;
  for (block.y = 0; block.y < grid.y; ++block.y)
    for (block.x = 0; block.x < grid.x; ++block.x) run_block(reverse);
}

}  // namespace mirepro::emulation

#define threadIdx mirepro::emulation::thread
#define blockIdx mirepro::emulation::block
#define blockDim mirepro::emulation::threads
#define gridDim mirepro::emulation::blocks

inline void __syncthreads() { mirepro::emulation::wait(); }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }

template <class T>
T atomicAdd(T* at, T value) {
  const T old = *at;
  *at += value;
  return old;
}
template <class T>
T atomicOr(T* at, T value) {
  const T old = *at;
  *at |= value;
  return old;
}
template <class T>
T atomicMin(T* at, T value) {
  const T old = *at;
  if (value < old) *at = value;
  return old;
}
