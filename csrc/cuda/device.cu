#include "cuda/kernels.h"
#include "cuda/launch.cuh"

namespace sparse_attn::cuda {

const char* built_for() { return SPARSE_ATTN_CUDA_ARCHS; }

Device use_device(int device) {
  int major = 0, minor = 0, shared = 0;
  // This library has a CUDA runtime of its own, which need not know what torch's was told.
  check(cudaSetDevice(device), "setting the current device");
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device),
        "asking for the compute capability");
  check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device),
        "asking for the compute capability");
  check(cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
        "asking for the shared memory");
  return {10 * major + minor, shared};
}

int multiprocessors() {
  int device = 0, count = 0;
  check(cudaGetDevice(&device), "asking for the current device");
  check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device),
        "asking for the number of multiprocessors");
  return count;
}

bool is_capturing(void* stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  check(cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &status),
        "asking whether a stream is being captured");
  return status != cudaStreamCaptureStatusNone;
}

}  // namespace sparse_attn::cuda
