#pragma once

using cudaError_t = int;
inline cudaError_t cudaGetLastError() { return 0; }
inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }
inline int cudaGetDevice(int* device) { return *device = 0; }
constexpr int cudaDevAttrMaxSharedMemoryPerBlockOptin = 97;
inline int cudaDeviceGetAttribute(int* value, int, int) {
  return *value = 99 << 10, 0;
}  // the shared memory of sm_86, 89 and 120, in bytes
