// CUDA driver without a GPU: it does nothing, and records what it is asked to launch.

#include <stddef.h>
#include <stdint.h>

typedef struct {
  unsigned grid_x, grid_y, grid_z, block_x, block_y, block_z, shared;
  void *stream;
} Config;

int64_t launches = 0, num_args = 0, grid, args[64], stream, function;

int cuInit(unsigned flags) { return 0; }
int cuDriverGetVersion(int *version) { return *version = 13000, 0; }
int cuDeviceGet(int *device, int number) { return *device = number, 0; }
int cuDeviceGetCount(int *count) { return *count = 1, 0; }
int cuDeviceGetAttribute(int *value, int which, int device) { return *value = 1 << 17, 0; }
int cuDevicePrimaryCtxRetain(void **context, int device) { return *context = (void *)1, 0; }
int cuCtxGetCurrent(void **context) { return *context = (void *)1, 0; }
int cuCtxGetDevice(int *device) { return *device = 0; }
int cuCtxSetCurrent(void *context) { return 0; }
int cuCtxGetLimit(size_t *value, int which) { return *value = 1 << 20, 0; }
int cuCtxSetLimit(int which, size_t value) { return 0; }
int cuFuncGetAttribute(int *value, int which, void *f) { return *value = which ? 0 : 1024, 0; }
int cuFuncSetAttribute(void *f, int which, int value) { return 0; }
int cuFuncSetCacheConfig(void *f, int which) { return 0; }
int cuGetErrorString(int error, const char **text) { return *text = "", 0; }
int cuModuleLoadData(void **module, const void *code) { return *module = (void *)2, 0; }
int cuModuleUnload(void *module) { return 0; }
int cuModuleGetFunction(void **f, void *module, const char *name) {
  static intptr_t made = 0;
  return *f = (void *)(made += 16), 0;
}
int cuOccupancyMaxActiveClusters(int *count, void *f, const Config *c) { return *count = 1, 0; }
int cuPointerGetAttribute(uint64_t *value, int which, uint64_t p) { return *value = p, 0; }
int cuPointerGetAttributes(unsigned n, int *which, void **values, uint64_t p) { return 0; }
int cuStreamIsCapturing(void *stream, int *is) { return *is = 0; }
int cuTensorMapEncodeIm2col(void) { return 0; }
int cuTensorMapEncodeTiled(void) { return 0; }

int cuLaunchKernelEx(const Config *config, void *f, void **values, void **extra) {
  launches++;
  grid = config->grid_x;
  stream = (intptr_t)config->stream;
  function = (intptr_t)f;
  for (int64_t i = 0; i < num_args; i++) args[i] = *(int64_t *)values[i];
  return 0;
}
