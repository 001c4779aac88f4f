// A few queries over a long cache: the queries of a group of heads share a tile, the keys are split over blocks, and the prefix is as
// long as device memory says when the kernel runs. What does not depend on that length is asked for before it has arrived.
#pragma once
#include "decoder.cuh"

namespace sparse_attention::sm90 {

// What a block does, from its first instruction on. All small things are asked for at once, tiles when the length is there: small things that
// are asked for later wait behind tiles. One lane of each warp asks for the length: a value that all lanes ask for is waited for at once.
template <class S, typename T>
__device__ __forceinline__ void run_block(const Decode& d, const CacheMaps& maps, Shared<S>& shared) {
  const Place<S> place(d);
  const int64_t wanted = threadIdx.x % 32 == 0 ? length_of(d, place.batch) : 0;
  Helper<S, T> helper(place);
  if (!maps.boxed) helper.copy_queries(shared);
  if (threadIdx.x == 0) {
    init_cache_barriers(shared);
    copy_queries(place, maps, shared);
  }
  __syncwarp();
  threadIdx.x < 32 ? named_arrive<S::kThreads>(kBarriersReady) : named_sync<S::kThreads>(kBarriersReady);
  if (S::kMates > 1) decoding::cluster_arrive_relaxed();
  const int length = uniform(length_within(d, wanted));
  if (threadIdx.x >= 32) helper.keep(shared, length - d.q_len);
  if (S::kMates > 1) decoding::cluster_wait();  // mates have their barriers
  if (threadIdx.x < 128) {
    registers_fewer<S::kFewer>();
    if (threadIdx.x == 0) copy_cache(place, maps, shared, length);
    __syncwarp();
    if (S::kMates > 1) decoding::cluster_arrive(), decoding::cluster_wait();
    else if (S::kMerges && d.cluster > 1) decoding::cluster_sync(), decoding::cluster_part();
  } else {
    registers_more<S::kMore>();
    Decoder<S, T> decoder(place, maps, shared, length);
    decoder.run();
    if (S::kMates > 1) decoding::cluster_arrive();
    if (S::kMerges && d.cluster > 1) {
      named_sync<S::kThreads - 128>(kDecodersMeet);  // all are done with keys and values, whose memory `show` takes
      decoder.show();
      decoding::cluster_sync();
      decoder.merge();
      decoding::cluster_part();  // nobody leaves while others read
    } else {
      d.splits == 1 ? decoder.write() : decoder.write_part();
    }
    if (S::kMates > 1) decoding::cluster_wait();  // nobody leaves while mates say that they are done with its tiles
  }
}

template <class S, typename T>
__global__ void __launch_bounds__(S::kThreads, S::kResident) decode(const __grid_constant__ CacheMaps maps, const __grid_constant__ Decode d) {
  extern __shared__ __align__(1024) uint8_t raw[];
  run_block<S, T>(d, maps, *reinterpret_cast<Shared<S>*>(raw));
}

}  // namespace sparse_attention::sm90
