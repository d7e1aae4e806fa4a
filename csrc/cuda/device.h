// Launches, scratch memory and input checks of the CUDA operators.
#pragma once
#include "../cpu/tensors.h"

#if defined(__CUDACC__)
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#else
#include "emulate.h"
#endif

namespace mirepro {

using Count = unsigned long long;  // what 64-bit integer atomics take
constexpr unsigned kThreads = 256;

#if defined(__CUDACC__)
inline void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(error));
}

/// The tensor's device is current while this lives; work goes to torch's current stream there.
class Device {
 public:
  explicit Device(const Tensor& on) : like_(on), guard_(on.get_device_index()) {
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(on.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  template <class... P, class... A>
  void run(void (*kernel)(P...), dim3 grid, unsigned threads, A... arguments) const {
    if (grid.x == 0 || grid.y == 0) return;
    kernel<<<grid, threads, 0, stream_>>>(arguments...);
    check(cudaGetLastError());
  }

  void fill(void* at, int byte, int64_t bytes) const {
    if (bytes > 0) check(cudaMemsetAsync(at, byte, bytes, stream_));
  }
  void upload(void* to, const void* from, int64_t bytes) const {
    if (bytes == 0) return;
    check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyHostToDevice, stream_));
    check(cudaStreamSynchronize(stream_));  // `from` may go away
  }
  void download(void* to, const void* from, int64_t bytes) const {
    if (bytes == 0) return;
    check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, stream_));
    check(cudaStreamSynchronize(stream_));
  }

  const Tensor& like() const { return like_; }

 private:
  Tensor like_;
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
};
#else
class Device {
 public:
  explicit Device(const Tensor& on) : like_(on) {}

  template <class... P, class... A>
  void run(void (*kernel)(P...), dim3 grid, unsigned threads, A... arguments) const {
    emulation::run(grid, threads, [=] { kernel(arguments...); });
  }

  void fill(void* at, int byte, int64_t bytes) const {
    if (bytes > 0) std::memset(at, byte, bytes);
  }
  void upload(void* to, const void* from, int64_t bytes) const {
    if (bytes > 0) std::memcpy(to, from, bytes);
  }
  void download(void* to, const void* from, int64_t bytes) const { upload(to, from, bytes); }

  const Tensor& like() const { return like_; }

 private:
  Tensor like_;
};
#endif

/// Scratch memory on the device, from torch's allocator.
template <class T>
struct Buffer {
  Tensor keep;
  T* data;
  int64_t size;

  Buffer(const Device& device, int64_t n)
      : keep(torch::stable::new_empty(device.like(), std::vector<int64_t>{n * static_cast<int64_t>(sizeof(T))}, ScalarType::Byte)),
        data(static_cast<T*>(keep.mutable_data_ptr())),
        size(n) {}
  Buffer(const Device& device, const std::vector<T>& values) : Buffer(device, static_cast<int64_t>(values.size())) { write(device, values); }

  void fill(const Device& device, int byte) const { device.fill(data, byte, size * sizeof(T)); }
  void write(const Device& device, const std::vector<T>& values) const { device.upload(data, values.data(), size * sizeof(T)); }
  std::vector<T> read(const Device& device) const {
    std::vector<T> values(size);
    device.download(values.data(), data, size * sizeof(T));
    return values;
  }
};

/// Blocks of `threads` for n items, bounded: kernels loop.
inline unsigned blocks_for(int64_t n, unsigned threads = kThreads) {
  return static_cast<unsigned>(std::min<int64_t>((n + threads - 1) / threads, 65535));
}

constexpr Count kNone = ~Count{0};

/// Input checks: their kernels run one after the other, `verify` waits once and throws for the first fault.
class Checks {
 public:
  explicit Checks(const Device& device);
  void finite(const Matrix& m, const char* name);
  void inside(const View<int64_t>& index, int64_t n, const char* name);
  void verify();

 private:
  struct Inside {
    const char* name;
    View<int64_t> index;
    int64_t n;
  };
  static constexpr int64_t kMost = 8;

  const Device& device_;
  Buffer<Count> first_;
  std::vector<std::pair<const char*, std::optional<Inside>>> kinds_;
};

/// Shapes of queries and bank; the values are left to `Checks`.
std::pair<Matrix, Matrix> queries_and_bank(const Tensor& z, const Tensor& bank);

}  // namespace mirepro
