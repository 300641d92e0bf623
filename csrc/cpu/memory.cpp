#include "cpu/memory.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cstdlib>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

namespace bcmf::cpu {
namespace {

struct Block {
  void* data;
  size_t bytes;
};

// The blocks are never destroyed, because a tensor may outlive everything else at the end of a program.
struct Blocks {
  std::mutex mutex;
  std::vector<Block> used, kept;  // the block that was kept last is the last one
};
Blocks& blocks = *new Blocks;

constexpr size_t kPage = 2 << 20;
constexpr size_t kKept = 4;  // for the statistics and scores of a step, and the gradients of two heads

void free_kept() {
  for (const Block& block : blocks.kept) std::free(block.data);
  blocks.kept.clear();
}

Block make_block(size_t bytes) {
  const size_t whole = (bytes + kPage - 1) / kPage * kPage;
  Block block = {std::aligned_alloc(kPage, whole), whole};
  if (!block.data) {  // the kept blocks may be in the way
    free_kept();
    block.data = std::aligned_alloc(kPage, whole);
  }
  if (!block.data)
    throw std::runtime_error("bcmf_ext: the system has no " + std::to_string(bytes >> 20) +
                             " MiB of memory for this loss: take fewer or smaller images at a time.");
#if defined(__linux__)
  madvise(block.data, whole, MADV_HUGEPAGE);
#endif
  return block;
}

}  // namespace

void* allocate_large(size_t bytes) {
  const std::lock_guard<std::mutex> lock(blocks.mutex);
  auto best = blocks.kept.end();  // the smallest that is large enough, but not twice as large
  for (auto block = blocks.kept.begin(); block != blocks.kept.end(); ++block)
    if (bytes <= block->bytes && block->bytes / 2 < bytes && (best == blocks.kept.end() || block->bytes < best->bytes))
      best = block;
  if (best == blocks.kept.end()) {
    blocks.used.push_back(make_block(bytes));
  } else {
    blocks.used.push_back(*best);
    blocks.kept.erase(best);
  }
  return blocks.used.back().data;
}

void free_large(void* memory) {
  const std::lock_guard<std::mutex> lock(blocks.mutex);
  const auto is_it = [&](const Block& block) { return block.data == memory; };
  const auto block = std::find_if(blocks.used.begin(), blocks.used.end(), is_it);
#if defined(__linux__) && defined(MADV_FREE)
  madvise(block->data, block->bytes, MADV_FREE);
#endif
  blocks.kept.push_back(*block);
  blocks.used.erase(block);
  if (blocks.kept.size() > kKept) {
    std::free(blocks.kept.front().data);
    blocks.kept.erase(blocks.kept.begin());
  }
}

void release_kept_memory() {
  const std::lock_guard<std::mutex> lock(blocks.mutex);
  free_kept();
}

}  // namespace bcmf::cpu
