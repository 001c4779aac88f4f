#pragma once
using cudaError_t = int;
#define C10_CUDA_CHECK(error) TORCH_CHECK((error) == 0, "error ", error)
