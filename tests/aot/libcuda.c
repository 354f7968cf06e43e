/* A libcuda.so.1 that drives no GPU: Triton's own launcher runs in front of it, and what it launches is kept.
 *
 * Only what a launch calls is here; fake_driver.py adds a failing stand-in for whatever else the launcher links to. */
#include <string.h>

#include "cuda.h"

#define KEPT 64
#define MOST_PARAMETERS 512

/* What a CUfunction points to. */
typedef struct {
  int parameters;
  int sizes[MOST_PARAMETERS]; /* bytes */
} Kernel;

typedef struct {
  unsigned grid[3], threads;
  CUstream stream;
  const Kernel *kernel;
  unsigned long long parameters[MOST_PARAMETERS];
} Launch;

Launch launches[KEPT];
long launch_count, pointer_queries;

CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction function, void **parameters, void **extra) {
  Launch *launch = &launches[launch_count++ % KEPT];
  launch->grid[0] = config->gridDimX;
  launch->grid[1] = config->gridDimY;
  launch->grid[2] = config->gridDimZ;
  launch->threads = config->blockDimX;
  launch->stream = config->hStream;
  launch->kernel = (const Kernel *)function;
  for (int i = 0; i < launch->kernel->parameters; i++) {
    launch->parameters[i] = 0;
    memcpy(&launch->parameters[i], parameters[i], launch->kernel->sizes[i]);
  }
  return CUDA_SUCCESS;
}

CUresult cuPointerGetAttribute(void *data, CUpointer_attribute attribute, CUdeviceptr pointer) {
  pointer_queries++;
  *(CUdeviceptr *)data = pointer;
  return CUDA_SUCCESS;
}

CUresult cuCtxGetCurrent(CUcontext *context) {
  *context = (CUcontext)1;
  return CUDA_SUCCESS;
}

CUresult cuGetErrorString(CUresult error, const char **text) {
  *text = "not in the stand-in for libcuda";
  return CUDA_SUCCESS;
}
