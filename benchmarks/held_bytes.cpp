// Counts the bytes of all tensors in host memory, whichever thread frees them.
#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/alloc_cpu.h>

#include <algorithm>
#include <mutex>
#include <unordered_map>

namespace {

std::mutex guard;
std::unordered_map<void*, size_t> sizes;
size_t now = 0, most = 0;

void release(void* block) {
  {
    const std::lock_guard<std::mutex> held(guard);
    const auto found = sizes.find(block);
    if (found != sizes.end()) {
      now -= found->second;
      sizes.erase(found);
    }
  }
  c10::free_cpu(block);
}

struct Counting final : c10::Allocator {
  c10::DataPtr allocate(size_t num_bytes) override {
    void* block = c10::alloc_cpu(num_bytes);
    if (block != nullptr) {
      const std::lock_guard<std::mutex> held(guard);
      sizes[block] = num_bytes;
      now += num_bytes;
      most = std::max(most, now);
    }
    return {block, block, &release, c10::Device(c10::DeviceType::CPU)};
  }

  c10::DeleterFnPtr raw_deleter() const override { return &release; }

  void copy_data(void* to, const void* from, size_t num_bytes) const override {
    default_copy_data(to, from, num_bytes);
  }
};

}  // namespace

extern "C" void count() {
  static Counting counting;
  c10::SetCPUAllocator(&counting, 255);
}

extern "C" size_t held_bytes() {
  const std::lock_guard<std::mutex> held(guard);
  return now;
}

extern "C" size_t most_bytes() {
  const std::lock_guard<std::mutex> held(guard);
  return most;
}

extern "C" void begin_anew() {
  const std::lock_guard<std::mutex> held(guard);
  most = now;
}
