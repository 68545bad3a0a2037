// COCO's compressed run-length strings, many at once; see ops/rle.py for the format.
#include <ATen/ops/empty.h>

#include <algorithm>
#include <string>

#include "../common.h"

namespace maskrcnn_benchmark {
namespace {

// A number of 64 bits takes 13 groups of five bits.
constexpr int kMostGroups = 13;

// Strings of a thread: those of an image's 100 masks take less time than threads need to meet.
constexpr int64_t kGrain = 512;

void check(const Tensor& values, at::ScalarType type, const Tensor& offsets, const char* op) {
  TORCH_CHECK(values.dim() == 1 && values.scalar_type() == type, op, ": values must be [T] ", type);
  TORCH_CHECK(offsets.dim() == 1 && offsets.numel() > 0 && offsets.scalar_type() == at::kLong, op, ": offsets [D + 1]");
  const int64_t* o = offsets.const_data_ptr<int64_t>();
  const bool fine = o[0] == 0 && std::is_sorted(o, o + offsets.numel()) && o[offsets.numel() - 1] == values.numel();
  TORCH_CHECK(fine, op, ": offsets must ascend from 0 to ", values.numel());
}

void compress(const int64_t* counts, int64_t count, std::string& text) {
  for (int64_t i = 0; i < count; ++i) {
    int64_t rest = i > 2 ? counts[i] - counts[i - 2] : counts[i];
    for (bool more = true; more;) {
      const int64_t group = rest & 31;
      rest >>= 5;
      more = rest != (group & 16 ? -1 : 0);
      text.push_back(static_cast<char>('0' + group + (more ? 32 : 0)));
    }
  }
}

// Pixels within the mask, or -1 for a damaged string.
int64_t area(const uint8_t* text, int64_t length, int64_t pixels) {
  int64_t previous[2] = {0, 0}, sums[2] = {0, 0};
  const uint8_t* end = text + length;
  for (int64_t run = 0; text < end; ++run) {
    int64_t value = 0;
    int shift = 0;
    uint8_t group;
    do {
      if (text == end || *text < '0' || *text > '0' + 63 || shift == 5 * kMostGroups) {
        return -1;
      }
      group = *text++ - '0';
      value |= static_cast<int64_t>(static_cast<uint64_t>(group & 31) << shift);
      shift += 5;
    } while (group & 32);
    if (group & 16 && shift < 64) {
      value |= static_cast<int64_t>(~uint64_t{0} << shift);
    }
    if (value < -pixels || value > pixels) {
      return -1; // before the sum below could overflow
    }
    value += run > 2 ? previous[run & 1] : 0;
    sums[run & 1] += value;
    if (value < 0 || sums[0] + sums[1] > pixels) {
      return -1;
    }
    previous[run & 1] = value;
  }
  return sums[1];
}

std::tuple<Tensor, Tensor> compress_rle(const Tensor& counts, const Tensor& offsets) {
  const Tensor c = counts.contiguous(), o = offsets.contiguous();
  check(c, at::kLong, o, "compress_rle");
  const int64_t *runs = c.const_data_ptr<int64_t>(), *first = o.const_data_ptr<int64_t>();
  const int64_t masks = o.numel() - 1;
  std::vector<std::string> texts(masks);
  at::parallel_for(0, masks, kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      texts[i].reserve(2 * (first[i + 1] - first[i]));
      compress(runs + first[i], first[i + 1] - first[i], texts[i]);
    }
  });
  Tensor ends = at::empty({masks + 1}, o.options());
  int64_t* place = ends.mutable_data_ptr<int64_t>();
  place[0] = 0;
  for (int64_t i = 0; i < masks; ++i) {
    place[i + 1] = place[i] + static_cast<int64_t>(texts[i].size());
  }
  Tensor text = at::empty({place[masks]}, o.options().dtype(at::kByte));
  for (int64_t i = 0; i < masks; ++i) {
    std::copy(texts[i].begin(), texts[i].end(), text.mutable_data_ptr<uint8_t>() + place[i]);
  }
  return {text, ends};
}

Tensor rle_areas(const Tensor& text, const Tensor& offsets, const Tensor& pixels) {
  const Tensor t = text.contiguous(), o = offsets.contiguous(), p = pixels.contiguous();
  check(t, at::kByte, o, "rle_areas");
  TORCH_CHECK(p.numel() == o.numel() - 1 && p.scalar_type() == at::kLong, "rle_areas: pixels must be [D] int64");
  const uint8_t* characters = t.const_data_ptr<uint8_t>();
  const int64_t *first = o.const_data_ptr<int64_t>(), *size = p.const_data_ptr<int64_t>();
  Tensor areas = at::empty({p.numel()}, o.options());
  int64_t* out = areas.mutable_data_ptr<int64_t>();
  at::parallel_for(0, p.numel(), 4 * kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      out[i] = area(characters + first[i], first[i + 1] - first[i], size[i]);
    }
  });
  return areas;
}

} // namespace

KERNELS(CPU, m) {
  m.impl("compress_rle", TORCH_FN(compress_rle));
  m.impl("rle_areas", TORCH_FN(rle_areas));
}

} // namespace maskrcnn_benchmark
