// Which block of a launch is the last one to be done with a request. Counters are zero between launches: the last block's increment wraps
// them around, so that no launch has to clear any.
#pragma once
#include <atomic>

#include "device.cuh"

namespace sparse_attention::eagle {

// Launches that may run at once must not share counters. Those of a CUDA graph are its own for good; others take turns over so many that
// a launch is long over when its counters are taken again.
constexpr unsigned kTickets = 1u << 17;
__device__ unsigned turning_tickets[kTickets], captured_tickets[kTickets];

struct Tickets {
  unsigned first;
  bool captured;
  unsigned* cleared;  // where there are no others left: memory that was set to zero before the launch
};

// Of a launch with `count` requests. spare: [count], for the case that a graph finds no counters left.
inline int take_tickets(unsigned count, void* stream, unsigned* spare, Tickets* taken) {
  static std::atomic<uint64_t> turning{0}, captured{0};
  *taken = {0, is_capturing(stream), nullptr};
  if (taken->captured) {
    const uint64_t first = captured.fetch_add(count);
    if (first + count <= kTickets) return taken->first = unsigned(first), 0;
  } else if (count <= kTickets / 64) {
    uint64_t first;
    do first = turning.fetch_add(count) % kTickets;
    while (first + count > kTickets);
    return taken->first = unsigned(first), 0;
  }
  taken->cleared = spare;
  return clear(spare, count * sizeof(unsigned), stream);
}

// By one thread of each of `blocks` blocks, after its results were written.
__device__ __forceinline__ bool is_last(const Tickets& tickets, int request, unsigned blocks) {
  unsigned* counter = tickets.cleared ? tickets.cleared : (tickets.captured ? captured_tickets : turning_tickets) + tickets.first;
  __threadfence();
  const bool last = atomicInc(counter + request, blocks - 1) == blocks - 1;
  __threadfence();
  return last;
}

}  // namespace sparse_attention::eagle
