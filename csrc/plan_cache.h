// Plans by problem, so that a shape is planned once a process.
#pragma once

#include <array>
#include <cstddef>
#include <mutex>
#include <shared_mutex>
#include <unordered_map>

#include "kernels/plan.h"

namespace pointfuse {

// The device, which lives as long as the process, and the problem's fields side by side: the struct itself has padding,
// which must not count.
using PlanKey = std::array<int64_t, 28>;

inline int64_t packed(int32_t high, int32_t low) { return int64_t{high} << 32 | static_cast<uint32_t>(low); }

inline PlanKey plan_key(const Problem& p, const Device& device) {
  const int64_t flags = int64_t{p.tf32} | int64_t{p.bias} << 1 | int64_t{p.batch_norm} << 2 |
                        int64_t{p.constant_weight} << 3 | int64_t{p.statistics} << 4 |
                        static_cast<int64_t>(p.dtype) << 8 | static_cast<int64_t>(p.activation) << 16 |
                        static_cast<int64_t>(p.residual) << 24;
  PlanKey key{reinterpret_cast<int64_t>(&device),
              flags,
              p.batch,
              p.c_in,
              p.height,
              p.width,
              p.c_out,
              packed(p.kernel_h, p.kernel_w),
              packed(p.stride_h, p.stride_w),
              packed(p.padding_h, p.padding_w),
              packed(p.x_alignment, p.weight_alignment),
              packed(p.y_alignment, p.residual_alignment)};
  size_t i = 12;
  for (const Strides& s : {p.x, p.weight, p.y, p.residual_strides}) {
    for (const int64_t stride : {s.outer, s.channel, s.height, s.width}) key[i++] = stride;
  }
  return key;
}

struct PlanKeyHash {
  size_t operator()(const PlanKey& key) const {
    uint64_t hash = 0;
    for (const int64_t value : key) hash = (hash ^ static_cast<uint64_t>(value)) * 0x9e3779b97f4a7c15u;
    return static_cast<size_t>(hash ^ hash >> 32);
  }
};

class PlanCache {
 public:
  // The plan, and whether it is a new one.
  struct Found {
    Plan plan;
    bool made;
  };

  Found find_or_make(const Problem& problem, const Device& device) {
    const PlanKey key = plan_key(problem, device);
    {
      const std::shared_lock<std::shared_mutex> lock(mutex_);
      const auto found = plans_.find(key);
      if (found != plans_.end()) return {found->second, false};
    }
    const Plan plan = select_plan(problem, device);
    const std::unique_lock<std::shared_mutex> lock(mutex_);
    // Inputs of ever new shapes must not fill the memory.
    if (plans_.size() >= kMaxPlans) plans_.clear();
    return {plan, plans_.emplace(key, plan).second};
  }

 private:
  static constexpr size_t kMaxPlans = 8192;
  std::shared_mutex mutex_;
  std::unordered_map<PlanKey, Plan, PlanKeyHash> plans_;
};

}  // namespace pointfuse
