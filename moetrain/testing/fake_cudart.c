// One GPU, as far as torch looks at it without running a kernel: CUDA's runtime, put before the real one by LD_PRELOAD.
// There is a device with a primary context, streams and events; nothing is in its memory, and whatever else is asked goes to the
// real runtime, which finds no driver and fails. fake_cuda.py compiles it. Written for CUDA 13.
#include <stddef.h>
#include <string.h>

typedef unsigned int number;

// The first fields of cudaDeviceProp, which is all that torch reads of it here.
struct properties {
  char name[256], uuid[16], luid[8];
  number luid_mask;
  size_t memory, shared_memory;
  int registers, warp;
  size_t pitch;
  int threads, block[3], grid[3];
  size_t constant_memory;
  int major, minor;
  size_t texture, texture_pitch;
  int processors;
};

static size_t made; // streams and events: numbers, since nobody reads what they point to

static int make(size_t *out) { return *out = ++made << 4, 0; }

int cudaGetDeviceCount(int *out) { return *out = 1, 0; }
int cudaGetDevice(int *out) { return *out = 0, 0; }
int cudaSetDevice(int device) { return 0; }
int cudaDriverGetVersion(int *out) { return *out = 13000, 0; }
int cudaDeviceCanAccessPeer(int *out, int device, int peer) { return *out = 0, 0; }
int cudaGetLastError(void) { return 0; }
int cudaPeekAtLastError(void) { return 0; }
int cudaDeviceSynchronize(void) { return 0; }
int cudaMemGetInfo(size_t *left, size_t *all) { return *left = *all = (size_t)80 << 30, 0; }

int cudaGetDeviceProperties(struct properties *out, int device) {
  memset(out, 0, sizeof *out);
  strcpy(out->name, "H100, of which nothing is there");
  out->memory = (size_t)80 << 30;
  out->warp = 32;
  out->threads = 1024;
  out->major = 9;
  out->processors = 132;
  return 0;
}

int cudaDeviceGetStreamPriorityRange(int *least, int *greatest) { return *least = 0, *greatest = -5, 0; }
int cudaStreamCreateWithPriority(size_t *out, number flags, int priority) { return make(out); }
int cudaStreamCreateWithFlags(size_t *out, number flags) { return make(out); }
int cudaStreamDestroy(size_t stream) { return 0; }
int cudaStreamQuery(size_t stream) { return 0; }
int cudaStreamSynchronize(size_t stream) { return 0; }
int cudaStreamWaitEvent(size_t stream, size_t event, number flags) { return 0; }
int cudaStreamIsCapturing(size_t stream, int *out) { return *out = 0, 0; }
int cudaStreamGetCaptureInfo(size_t stream, int *out) { return *out = 0, 0; } // and what of a capture, if there is one
int cudaThreadExchangeStreamCaptureMode(int *mode) { return 0; }

int cudaEventCreateWithFlags(size_t *out, number flags) { return make(out); }
int cudaEventRecord(size_t event, size_t stream) { return 0; }
int cudaEventRecordWithFlags(size_t event, size_t stream, number flags) { return 0; }
int cudaEventQuery(size_t event) { return 0; }
int cudaEventSynchronize(size_t event) { return 0; }
int cudaEventDestroy(size_t event) { return 0; }

// Of the driver, whose name (libcuda.so.1) this library has, torch asks whether a device has a primary context.
int cuDevicePrimaryCtxGetState(int device, number *flags, int *active) { return *flags = 0, *active = 1, 0; }
static int none(void) { return 100; } // no device

int cudaGetDriverEntryPointByVersion(const char *name, void **out, number version, unsigned long long flags, int *found) {
  *out = strcmp(name, "cuDevicePrimaryCtxGetState") ? (void *)none : (void *)cuDevicePrimaryCtxGetState;
  if (found) *found = 0;
  return 0;
}
