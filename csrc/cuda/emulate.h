// The part of CUDA these operators use, in plain C++ on the CPU: the tests run every kernel without a GPU. Blocks run
// one after the other, the threads of a block as fibers that change at barriers. MIREPRO_EMULATION=reverse runs them
// backwards, which shows a missing barrier. Not a product: slow, and it knows nothing of warps or memory models.
#pragma once
#include <ucontext.h>

#include <cmath>
#include <csetjmp>
#include <cstdint>
#include <cstdlib>
#include <functional>
#include <memory>
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
inline std::function<void()> body;

/// Lives as long as the process and runs its thread of one block after the other. Started through a context, then
/// changed by _longjmp, which spares a system call each time.
struct Fiber {
  ucontext_t context;
  std::jmp_buf place;
  std::vector<char> stack = std::vector<char>(1 << 17);
  bool started = false, done = true;
};
inline std::vector<std::unique_ptr<Fiber>> fibers;
inline std::jmp_buf scheduler;

inline Fiber& current() { return *fibers[thread.x]; }

inline void wait() {
  if (_setjmp(current().place) == 0) _longjmp(scheduler, 1);
}

inline void live() {
  for (;;) {
    body();
    current().done = true;
    wait();
  }
}

/// Runs the current thread up to its next barrier or its end.
[[gnu::noinline]] inline void resume() {
  if (_setjmp(scheduler) != 0) return;
  Fiber& fiber = current();
  if (fiber.started) _longjmp(fiber.place, 1);
  fiber.started = true;
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.data();
  fiber.context.uc_stack.ss_size = fiber.stack.size();
  makecontext(&fiber.context, live, 0);
  setcontext(&fiber.context);
}

/// Runs every thread of the current block from barrier to barrier.
inline void run_block(bool reverse) {
  const unsigned n = threads.x;
  for (unsigned t = 0; t < n; ++t) fibers[t]->done = false;
  for (unsigned done = 0; done == 0;) {
    for (unsigned i = 0; i < n; ++i) {
      thread.x = reverse ? n - 1 - i : i;
      resume();
      done += current().done;
    }
    if (done != 0 && done != n) throw std::logic_error("emulation: some threads of a block ended while others wait at a barrier");
  }
}

inline void run(dim3 grid, unsigned n, std::function<void()> f) {
  const char* order = std::getenv("MIREPRO_EMULATION");
  const bool reverse = order != nullptr && std::string(order) == "reverse";
  while (fibers.size() < n) fibers.push_back(std::make_unique<Fiber>());
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
