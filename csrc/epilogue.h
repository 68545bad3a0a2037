// What the CPU's and CUDA's epilogues have in common.
#pragma once

#include "common.h"

namespace maskrcnn_benchmark {

// How a map [B, C, H, W] or rows [R, C] lie in memory: value i has channel i / inner % channels. inner: 1 where channels
// are innermost, else the pixels of a plane.
struct EpilogueShape {
  int64_t count, channels, inner;
  at::MemoryFormat format;

  explicit EpilogueShape(const Tensor& input) : count(input.numel()), channels(input.size(1)) {
    const bool last = input.dim() == 4 && input.is_contiguous(at::MemoryFormat::ChannelsLast);
    TORCH_CHECK(last || input.is_contiguous(), "epilogue_: expected a contiguous or channels-last input");
    format = last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
    inner = last || input.dim() == 2 ? 1 : input.size(2) * input.size(3);
  }
};

} // namespace maskrcnn_benchmark
