// The part of the CUDA runtime that torch uses, without a GPU. It is loaded before the real runtime and replaces it.
//
// Device memory is host memory. One thread, the device, runs work some time after it was enqueued: in order within a
// stream, in random order between streams and between the nodes of a graph, as far as events allow. Code that misses a
// synchronization therefore reads poison or old values, as on a GPU. Captures forbid what the CUDA runtime forbids.
#include "runtime.h"

#include <dlfcn.h>

#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <exception>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <set>
#include <string>
#include <thread>
#include <unordered_map>
#include <vector>

namespace {

using Clock = std::chrono::steady_clock;

constexpr int kPoison = 0xff;           // NaN as a float, out of range as an index.
constexpr size_t kBacklog = 64;         // Number of pending work items that starts the device.
constexpr auto kLaziness = std::chrono::milliseconds(1);  // Delay after which the device starts anyway.

// The position of an event in its stream.
struct Mark {
  bool reached = false;
  Clock::time_point at;
};

struct Work {
  std::string name;
  std::function<void()> work;
  std::shared_ptr<Mark> after;  // Starts once this is reached.
};

// A node of a graph. It runs after the nodes in `before`.
struct Node {
  std::string name;
  std::function<void()> work;
  std::set<size_t> before;
};

struct Graph {
  std::vector<Node> nodes;
  std::vector<std::shared_ptr<void>> kept;  // Objects that live as long as the graph.

  // Returns whether the end of the capture's first stream does not wait for some nodes, and prints those.
  bool unjoined(const std::set<size_t>& end) const {
    std::vector<bool> seen(nodes.size());
    std::vector<size_t> open(end.begin(), end.end());
    while (!open.empty()) {
      const size_t node = open.back();
      open.pop_back();
      if (!seen[node]) open.insert(open.end(), nodes[node].before.begin(), nodes[node].before.end());
      seen[node] = true;
    }
    bool any = false;
    for (size_t node = 0; node < nodes.size(); ++node) {
      if (!seen[node]) std::fprintf(stderr, "emulator: unjoined: %s\n", nodes[node].name.c_str());
      any |= !seen[node];
    }
    return any;
  }
};

struct Stream;

struct Capture {
  unsigned long long id;
  cudaStreamCaptureMode mode;
  std::thread::id thread;
  Stream* origin;
  std::unique_ptr<Graph> graph = std::make_unique<Graph>();
  bool invalid = false;
};

struct Stream {
  std::deque<Work> queue;
  bool busy = false;  // Its first work item is running.
  std::shared_ptr<Capture> capture;
  std::set<size_t> tips;  // Nodes of the capture that the next node runs after.
};

struct Event {
  std::shared_ptr<Mark> mark;
  std::shared_ptr<Capture> capture;
  std::set<size_t> tips;
};

struct Block {
  size_t bytes;
  int device;
};

// Never destroyed, because the device's thread may outlive static objects.
struct State {
  std::mutex lock;
  std::condition_variable enqueued, done;
  std::set<Stream*> streams;
  Stream legacy;
  std::set<std::shared_ptr<Capture>> captures;
  std::vector<std::string> launches;  // Recorded launches.
  bool recording = false;
  std::map<const char*, Block> device_blocks, host_blocks;
  std::unordered_map<const void*, std::string> kernels;
  std::mt19937 random{0};
  size_t queued = 0, taken = 0;
  int waiting = 0;  // Number of host threads waiting for the device.
  unsigned long long captured = 0;
  bool started = false, failed = false;

  State() { streams.insert(&legacy); }
};

State& state() {
  static auto* state = new State;
  return *state;
}

thread_local int current_device = 0;
thread_local cudaError_t last_error = cudaSuccess;
thread_local cudaStreamCaptureMode thread_mode = cudaStreamCaptureModeGlobal;

using Lock = std::unique_lock<std::mutex>;

// Returns an environment variable as a number, or the fallback.
size_t env_or(const char* variable, size_t fallback) {
  const char* value = std::getenv(variable);
  return value ? std::strtoull(value, nullptr, 10) : fallback;
}

size_t memory() { return env_or("EMULATED_MEMORY_GIB", 4) << 30; }
int capability() { return static_cast<int>(env_or("EMULATED_CAPABILITY", 90)); }

cudaError_t fail(cudaError_t error) { return last_error = error; }

int devices() {
  const char *visible = std::getenv("CUDA_VISIBLE_DEVICES"), *count = std::getenv("EMULATED_DEVICES");
  return visible && !*visible ? 0 : count ? std::atoi(count) : 1;
}

Stream* stream_of(cudaStream_t stream) {
  const bool legacy = stream == nullptr || stream == cudaStreamLegacy || stream == cudaStreamPerThread;
  return legacy ? &state().legacy : reinterpret_cast<Stream*>(stream);
}

// The device.

void attempt(const char* name, const std::function<void()>& work) {
  try {
    work();
  } catch (const std::exception& error) {  // Like a device-side assertion: all later calls fail.
    std::fprintf(stderr, "emulator: %s failed on the device: %s\n", name, error.what());
    state().failed = true;
  }
}

// Runs the first work item of a random stream that can continue. Returns false if there is none.
bool advance(Lock& lock) {
  State& s = state();
  std::vector<Stream*> ready;
  for (Stream* stream : s.streams)
    if (!stream->busy && !stream->queue.empty() && (!stream->queue.front().after || stream->queue.front().after->reached))
      ready.push_back(stream);
  if (ready.empty()) return false;
  Stream* stream = ready[s.random() % ready.size()];
  Work work = std::move(stream->queue.front());
  stream->busy = true;
  lock.unlock();
  if (work.work) attempt(work.name.c_str(), work.work);
  work = {};  // Frees its tensors, which may need Python's lock.
  lock.lock();
  stream->queue.pop_front();
  stream->busy = false;
  --s.queued;
  s.done.notify_all();
  return true;
}

void run_device() {
  State& s = state();
  Lock lock(s.lock);
  for (;;) {
    s.enqueued.wait(lock, [&] { return s.queued; });
    s.enqueued.wait_for(lock, kLaziness, [&] { return s.waiting || s.queued > kBacklog; });
    for (size_t some = 1 + s.random() % kBacklog; (some || s.waiting) && advance(lock); some -= some > 0) continue;
  }
}

// Runs the nodes of a graph in random order, interleaved with work of other streams.
void launch(const Graph& graph) {
  State& s = state();
  std::vector<size_t> awaited, ready;
  std::vector<std::vector<size_t>> after(graph.nodes.size());
  for (size_t node = 0; node < graph.nodes.size(); ++node) {
    awaited.push_back(graph.nodes[node].before.size());
    for (size_t other : graph.nodes[node].before) after[other].push_back(node);
    if (!awaited[node]) ready.push_back(node);
  }
  while (!ready.empty()) {
    {
      Lock lock(s.lock);
      std::swap(ready[s.random() % ready.size()], ready.back());
      if (s.random() % 16 == 0) advance(lock);
    }
    const size_t node = ready.back();
    ready.pop_back();
    if (graph.nodes[node].work) attempt(graph.nodes[node].name.c_str(), graph.nodes[node].work);
    for (size_t next : after[node])
      if (!--awaited[next]) ready.push_back(next);
  }
}

void push(Stream* stream, Work work) {
  State& s = state();
  stream->queue.push_back(std::move(work));
  ++s.queued;
  if (!s.started) std::thread(run_device).detach();
  s.started = true;
  if (s.queued == 1 || s.queued == kBacklog + 1) s.enqueued.notify_all();
}

std::shared_ptr<Mark> mark(Stream* stream) {
  auto mark = std::make_shared<Mark>();
  push(stream, {"an event", [mark] {
                  Lock lock(state().lock);
                  mark->at = Clock::now();
                  mark->reached = true;
                }});
  return mark;
}

// Waits for the device. Releases Python's lock, because operators implemented in Python need it on the device's thread.
cudaError_t await(Lock& lock, const std::vector<std::shared_ptr<Mark>>& marks) {
  static const auto held = reinterpret_cast<int (*)()>(dlsym(RTLD_DEFAULT, "PyGILState_Check"));
  static const auto ending = reinterpret_cast<int (*)()>(dlsym(RTLD_DEFAULT, "_Py_IsFinalizing"));
  static const auto release = reinterpret_cast<void* (*)()>(dlsym(RTLD_DEFAULT, "PyEval_SaveThread"));
  static const auto take = reinterpret_cast<void (*)(void*)>(dlsym(RTLD_DEFAULT, "PyEval_RestoreThread"));
  State& s = state();
  ++s.waiting;
  s.enqueued.notify_all();
  void* thread = held && ending && held() && !ending() ? release() : nullptr;
  for (const auto& mark : marks) s.done.wait(lock, [&] { return mark->reached; });
  --s.waiting;
  if (thread) {
    lock.unlock();
    take(thread);
    lock.lock();
  }
  return s.failed ? fail(cudaErrorAssert) : cudaSuccess;
}

cudaError_t await_all(Lock& lock) {
  std::vector<std::shared_ptr<Mark>> marks;
  for (Stream* stream : state().streams)
    if (!stream->capture && !stream->queue.empty()) marks.push_back(mark(stream));
  return await(lock, marks);
}

// Captures.

cudaError_t invalidate(const char* what, Capture& capture, cudaError_t error) {
  std::fprintf(stderr, "emulator: %s is not allowed in a capture\n", what);
  capture.invalid = true;
  return fail(error);
}

// Returns an error for calls that might wait for captured work, depending on the modes of captures and thread.
cudaError_t unsafe(const char* what) {
  if (thread_mode == cudaStreamCaptureModeRelaxed) return cudaSuccess;
  for (const auto& capture : state().captures) {
    const bool own = capture->thread == std::this_thread::get_id();
    const bool global = capture->mode == cudaStreamCaptureModeGlobal && thread_mode == cudaStreamCaptureModeGlobal;
    if (global || (own && capture->mode != cudaStreamCaptureModeRelaxed))
      return invalidate(what, *capture, cudaErrorStreamCaptureUnsupported);
  }
  return cudaSuccess;
}

char* block(size_t bytes) {
  void* at = nullptr;
  if (posix_memalign(&at, 512, bytes ? bytes : 512)) return nullptr;
  return static_cast<char*>(emulated_idle() ? at : std::memset(at, kPoison, bytes));
}

const Block* find_block(const std::map<const char*, Block>& blocks, const void* at) {
  auto next = blocks.upper_bound(static_cast<const char*>(at));
  if (next == blocks.begin()) return nullptr;
  --next;
  return static_cast<const char*>(at) < next->first + next->second.bytes ? &next->second : nullptr;
}

bool pageable(const void* at) { return !find_block(state().device_blocks, at) && !find_block(state().host_blocks, at); }

cudaError_t enqueue(Stream* stream, const char* name, std::function<void()> work, Cost cost = {}) {
  State& s = state();
  for (const auto& capture : s.captures)
    if (stream == &s.legacy && capture->mode == cudaStreamCaptureModeGlobal)
      return invalidate(name, *capture, cudaErrorStreamCaptureImplicit);
  if (s.recording)
    s.launches.push_back(std::string(name) + "\t" + std::to_string(cost.bytes) + "\t" + std::to_string(cost.flops) +
                         "\t" + cost.shape);
  if (emulated_idle()) work = nullptr;
  if (stream->capture) {
    if (stream->capture->invalid) return fail(cudaErrorStreamCaptureInvalidated);
    auto& nodes = stream->capture->graph->nodes;
    nodes.push_back({name, std::move(work), stream->tips});
    stream->tips = {nodes.size() - 1};
  } else {
    push(stream, {name, std::move(work)});
  }
  return cudaSuccess;
}

}  // namespace

bool emulated_idle() {
  static const bool idle = env_or("EMULATED_IDLE", 0);
  return idle;
}

cudaError_t emulated_enqueue(cudaStream_t stream, const char* name, std::function<void()> work, Cost cost) {
  Lock lock(state().lock);
  return enqueue(stream_of(stream), name, std::move(work), cost);
}

extern "C" {

// Devices.

cudaError_t cudaGetDeviceCount(int* count) { return *count = devices(), cudaSuccess; }
cudaError_t cudaGetDevice(int* device) { return *device = current_device, cudaSuccess; }
cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= devices()) return fail(cudaErrorInvalidDevice);
  return current_device = device, cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int* version) { return *version = CUDART_VERSION, cudaSuccess; }
cudaError_t cudaRuntimeGetVersion(int* version) { return *version = CUDART_VERSION, cudaSuccess; }
cudaError_t cudaDeviceCanAccessPeer(int* can, int, int) { return *can = 0, cudaSuccess; }
cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  return *least = 0, *greatest = -5, cudaSuccess;
}
cudaError_t cudaDeviceGetPCIBusId(char* id, int length, int device) {
  return std::snprintf(id, length, "0000:%02x:00.0", device), cudaSuccess;
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int) {
  std::memset(properties, 0, sizeof *properties);
  std::strcpy(properties->name, "emulated device");
  properties->totalGlobalMem = memory();
  properties->major = capability() / 10;
  properties->minor = capability() % 10;
  properties->multiProcessorCount = static_cast<int>(env_or("EMULATED_MULTIPROCESSORS", 8));
  properties->warpSize = 32;
  properties->maxThreadsPerBlock = 1024;
  properties->maxThreadsPerMultiProcessor = 2048;
  properties->sharedMemPerBlock = 48 << 10;
  properties->sharedMemPerBlockOptin = 227 << 10;
  properties->sharedMemPerMultiprocessor = 228 << 10;
  properties->regsPerBlock = properties->regsPerMultiprocessor = 1 << 16;
  properties->l2CacheSize = 50 << 20;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = 0;
  if (attribute == cudaDevAttrComputeCapabilityMajor) *value = capability() / 10;
  if (attribute == cudaDevAttrComputeCapabilityMinor) *value = capability() % 10;
  return cudaSuccess;
}
cudaError_t cudaGetLastError() {
  const cudaError_t error = last_error;
  return last_error = cudaSuccess, error;
}
cudaError_t cudaPeekAtLastError() { return last_error; }
cudaError_t cudaProfilerStart() { return cudaSuccess; }
cudaError_t cudaProfilerStop() { return cudaSuccess; }

// Memory.

cudaError_t cudaMalloc(void** at, size_t bytes) {
  State& s = state();
  Lock lock(s.lock);
  if (auto error = unsafe("cudaMalloc")) return error;
  if (s.taken + bytes > memory() || !(*at = block(bytes))) return fail(cudaErrorMemoryAllocation);
  s.device_blocks[static_cast<char*>(*at)] = {bytes, current_device};
  s.taken += bytes;
  return cudaSuccess;
}
cudaError_t cudaFree(void* at) {
  State& s = state();
  Lock lock(s.lock);
  if (auto error = unsafe("cudaFree")) return error;
  if (auto error = await_all(lock)) return error;
  const auto found = s.device_blocks.find(static_cast<char*>(at));
  if (found == s.device_blocks.end()) return at ? fail(cudaErrorInvalidValue) : cudaSuccess;
  std::memset(at, kPoison, found->second.bytes);
  s.taken -= found->second.bytes;
  s.device_blocks.erase(found);
  return std::free(at), cudaSuccess;
}
cudaError_t cudaHostAlloc(void** at, size_t bytes, unsigned) {
  State& s = state();
  Lock lock(s.lock);
  if (auto error = unsafe("cudaHostAlloc")) return error;
  if (!(*at = block(bytes))) return fail(cudaErrorMemoryAllocation);
  s.host_blocks[static_cast<char*>(*at)] = {bytes, current_device};
  return cudaSuccess;
}
cudaError_t cudaMallocHost(void** at, size_t bytes) { return cudaHostAlloc(at, bytes, 0); }
cudaError_t cudaFreeHost(void* at) {
  Lock lock(state().lock);
  if (auto error = await_all(lock)) return error;
  state().host_blocks.erase(static_cast<char*>(at));
  return std::free(at), cudaSuccess;
}
cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* at) {
  Lock lock(state().lock);
  const Block *device = find_block(state().device_blocks, at), *host = find_block(state().host_blocks, at);
  attributes->type = device ? cudaMemoryTypeDevice : host ? cudaMemoryTypeHost : cudaMemoryTypeUnregistered;
  attributes->device = device ? device->device : host ? host->device : cudaInvalidDeviceId;
  attributes->devicePointer = attributes->hostPointer = const_cast<void*>(at);
  return cudaSuccess;
}
cudaError_t cudaMemGetInfo(size_t* unused, size_t* total) {
  return *unused = memory() - state().taken, *total = memory(), cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t on) {
  Lock lock(state().lock);
  Stream* stream = stream_of(on);
  if (auto error = enqueue(stream, "cudaMemcpyAsync", [=] { std::memcpy(to, from, bytes); })) return error;
  if (stream->capture || !(pageable(to) || pageable(from))) return cudaSuccess;
  return await(lock, {mark(stream)});
}
cudaError_t cudaMemcpyPeerAsync(void* to, int, const void* from, int, size_t bytes, cudaStream_t stream) {
  return cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, stream);
}
cudaError_t cudaMemsetAsync(void* at, int value, size_t bytes, cudaStream_t stream) {
  return emulated_enqueue(stream, "cudaMemsetAsync", [=] { std::memset(at, value, bytes); });
}
cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
  Lock lock(state().lock);
  if (auto error = unsafe("cudaMemcpy")) return error;
  enqueue(&state().legacy, "cudaMemcpy", [=] { std::memcpy(to, from, bytes); });
  return await(lock, {mark(&state().legacy)});
}

// Streams and events.

cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned, int) {
  Lock lock(state().lock);
  auto* made = new Stream;
  state().streams.insert(made);
  return *stream = reinterpret_cast<cudaStream_t>(made), cudaSuccess;
}
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags) {
  return cudaStreamCreateWithPriority(stream, flags, 0);
}
cudaError_t cudaStreamCreate(cudaStream_t* stream) { return cudaStreamCreateWithPriority(stream, 0, 0); }
cudaError_t cudaStreamDestroy(cudaStream_t) { return cudaSuccess; }  // Never freed, because work may be pending.
cudaError_t cudaStreamGetPriority(cudaStream_t, int* priority) { return *priority = 0, cudaSuccess; }
cudaError_t cudaStreamSynchronize(cudaStream_t on) {
  Lock lock(state().lock);
  Stream* stream = stream_of(on);
  if (stream->capture) return invalidate("cudaStreamSynchronize", *stream->capture, cudaErrorStreamCaptureUnsupported);
  if (auto error = unsafe("cudaStreamSynchronize")) return error;
  return await(lock, {mark(stream)});
}
cudaError_t cudaStreamQuery(cudaStream_t on) {
  Lock lock(state().lock);
  Stream* stream = stream_of(on);
  if (stream->capture) return invalidate("cudaStreamQuery", *stream->capture, cudaErrorStreamCaptureUnsupported);
  if (auto error = unsafe("cudaStreamQuery")) return error;
  return stream->queue.empty() ? cudaSuccess : cudaErrorNotReady;
}
cudaError_t cudaDeviceSynchronize() {
  Lock lock(state().lock);
  if (auto error = unsafe("cudaDeviceSynchronize")) return error;
  return await_all(lock);
}
cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t function, void* data) {
  return emulated_enqueue(stream, "cudaLaunchHostFunc", [=] { function(data); });
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  return *event = reinterpret_cast<cudaEvent_t>(new Event), cudaSuccess;
}
cudaError_t cudaEventCreate(cudaEvent_t* event) { return cudaEventCreateWithFlags(event, 0); }
cudaError_t cudaEventDestroy(cudaEvent_t event) { return delete reinterpret_cast<Event*>(event), cudaSuccess; }
cudaError_t cudaEventRecordWithFlags(cudaEvent_t on, cudaStream_t stream, unsigned) {
  Lock lock(state().lock);
  auto* event = reinterpret_cast<Event*>(on);
  event->capture = stream_of(stream)->capture;
  event->tips = stream_of(stream)->tips;
  event->mark = event->capture ? nullptr : mark(stream_of(stream));
  return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  return cudaEventRecordWithFlags(event, stream, cudaEventRecordDefault);
}
cudaError_t cudaEventQuery(cudaEvent_t on) {
  Lock lock(state().lock);
  auto* event = reinterpret_cast<Event*>(on);
  if (event->capture) return invalidate("cudaEventQuery", *event->capture, cudaErrorCapturedEvent);
  if (auto error = unsafe("cudaEventQuery")) return error;
  return !event->mark || event->mark->reached ? cudaSuccess : cudaErrorNotReady;
}
cudaError_t cudaEventSynchronize(cudaEvent_t on) {
  Lock lock(state().lock);
  auto* event = reinterpret_cast<Event*>(on);
  if (event->capture) return invalidate("cudaEventSynchronize", *event->capture, cudaErrorCapturedEvent);
  if (auto error = unsafe("cudaEventSynchronize")) return error;
  return event->mark ? await(lock, {event->mark}) : cudaSuccess;
}
cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t begin, cudaEvent_t end) {
  Lock lock(state().lock);
  const auto from = reinterpret_cast<Event*>(begin)->mark, to = reinterpret_cast<Event*>(end)->mark;
  if (!from || !to) return fail(cudaErrorInvalidResourceHandle);
  if (!from->reached || !to->reached) return fail(cudaErrorNotReady);
  return *milliseconds = std::chrono::duration<float, std::milli>(to->at - from->at).count(), cudaSuccess;
}
cudaError_t cudaStreamWaitEvent(cudaStream_t on, cudaEvent_t awaited, unsigned) {
  State& s = state();
  Lock lock(s.lock);
  Stream* stream = stream_of(on);
  auto* event = reinterpret_cast<Event*>(awaited);
  if (event->capture) {
    if (!s.captures.count(event->capture)) return fail(cudaErrorCapturedEvent);
    if (stream->capture && stream->capture != event->capture) return fail(cudaErrorStreamCaptureMerge);
    if (!stream->capture) stream->tips.clear();
    stream->capture = event->capture;
    stream->tips.insert(event->tips.begin(), event->tips.end());
  } else if (event->mark) {
    if (stream->capture)
      return invalidate("waiting for an event outside the capture", *stream->capture, cudaErrorStreamCaptureIsolation);
    push(stream, {"a wait", nullptr, event->mark});
  }
  return cudaSuccess;
}

// Captures and graphs.

cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  return std::swap(*mode, thread_mode), cudaSuccess;
}
cudaError_t cudaStreamBeginCapture(cudaStream_t on, cudaStreamCaptureMode mode) {
  State& s = state();
  Lock lock(s.lock);
  Stream* stream = stream_of(on);
  if (stream == &s.legacy) return fail(cudaErrorStreamCaptureUnsupported);
  if (stream->capture) return fail(cudaErrorIllegalState);
  stream->capture = std::make_shared<Capture>(Capture{++s.captured, mode, std::this_thread::get_id(), stream});
  stream->tips.clear();
  s.captures.insert(stream->capture);
  return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t on, cudaGraph_t* graph) {
  State& s = state();
  Lock lock(s.lock);
  Stream* stream = stream_of(on);
  const auto capture = stream->capture;
  if (!capture || capture->origin != stream) return fail(cudaErrorIllegalState);
  if (capture->mode != cudaStreamCaptureModeRelaxed && capture->thread != std::this_thread::get_id())
    return fail(cudaErrorStreamCaptureWrongThread);
  s.captures.erase(capture);
  for (Stream* other : s.streams)
    if (other->capture == capture) other->capture = nullptr;
  *graph = nullptr;
  if (capture->invalid) return fail(cudaErrorStreamCaptureInvalidated);
  if (capture->graph->unjoined(stream->tips)) return fail(cudaErrorStreamCaptureUnjoined);
  *graph = reinterpret_cast<cudaGraph_t>(capture->graph.release());
  return cudaSuccess;
}
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, cudaStreamCaptureStatus* status, unsigned long long* id,
                                     cudaGraph_t* graph, const cudaGraphNode_t** dependencies,
                                     const cudaGraphEdgeData** edges, size_t* count) {
  Lock lock(state().lock);
  const auto capture = stream_of(stream)->capture;
  *status = !capture           ? cudaStreamCaptureStatusNone
            : capture->invalid ? cudaStreamCaptureStatusInvalidated
                               : cudaStreamCaptureStatusActive;
  if (id) *id = capture ? capture->id : 0;
  if (graph) *graph = capture ? reinterpret_cast<cudaGraph_t>(capture->graph.get()) : nullptr;
  if (dependencies) *dependencies = nullptr;
  if (edges) *edges = nullptr;
  if (count) *count = 0;
  return cudaSuccess;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
  return cudaStreamGetCaptureInfo(stream, status, nullptr, nullptr, nullptr, nullptr, nullptr);
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t* executable, cudaGraph_t graph, unsigned long long) {
  auto* copy = new auto(std::make_shared<Graph>(*reinterpret_cast<Graph*>(graph)));
  return *executable = reinterpret_cast<cudaGraphExec_t>(copy), cudaSuccess;
}
cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* executable, cudaGraph_t graph, unsigned long long flags) {
  return cudaGraphInstantiate(executable, graph, flags);
}
cudaError_t cudaGraphDestroy(cudaGraph_t graph) { return delete reinterpret_cast<Graph*>(graph), cudaSuccess; }
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable) {
  return delete reinterpret_cast<std::shared_ptr<Graph>*>(executable), cudaSuccess;
}
cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t*, size_t* count) {
  return *count = reinterpret_cast<Graph*>(graph)->nodes.size(), cudaSuccess;
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t on) {
  Lock lock(state().lock);
  Stream* stream = stream_of(on);
  if (stream->capture) return invalidate("cudaGraphLaunch", *stream->capture, cudaErrorStreamCaptureUnsupported);
  return enqueue(stream, "a graph", [graph = *reinterpret_cast<std::shared_ptr<Graph>*>(executable)] { launch(*graph); });
}
cudaError_t cudaUserObjectCreate(cudaUserObject_t* object, void* kept, cudaHostFn_t destroy, unsigned, unsigned) {
  return *object = reinterpret_cast<cudaUserObject_t>(new std::shared_ptr<void>(kept, destroy)), cudaSuccess;
}
cudaError_t cudaUserObjectRelease(cudaUserObject_t object, unsigned) {
  return delete reinterpret_cast<std::shared_ptr<void>*>(object), cudaSuccess;
}
cudaError_t cudaGraphRetainUserObject(cudaGraph_t graph, cudaUserObject_t object, unsigned, unsigned flags) {
  auto* kept = reinterpret_cast<std::shared_ptr<void>*>(object);
  reinterpret_cast<Graph*>(graph)->kept.push_back(*kept);
  return flags & cudaGraphUserObjectMove ? cudaUserObjectRelease(object, 1) : cudaSuccess;
}

// Recorded launches: name, bytes, operations and shape separated by tabs. Marks have only a name.

void emulated_record() {
  Lock lock(state().lock);
  state().launches.clear();
  state().recording = true;
}
int emulated_launch(const char* name, size_t bytes, cudaStream_t stream) {  // For kernels that are not torch operators.
  return emulated_enqueue(stream, name, nullptr, {bytes, 0, ""});
}
void emulated_mark(const char* name) {  // Adds a mark between launches.
  Lock lock(state().lock);
  if (state().recording) state().launches.push_back(name);
}
size_t emulated_recorded(char* text, size_t bytes) {  // One record per line. Returns the size in bytes.
  Lock lock(state().lock);
  std::string all;
  for (const auto& name : state().launches) all += name + "\n";
  if (text && bytes > all.size()) std::memcpy(text, all.c_str(), all.size() + 1);
  return all.size() + 1;
}

// Kernels. None can be executed. Since operators are replaced, only torch.cuda._sleep launches one.

void** __cudaRegisterFatBinary(void*) { return reinterpret_cast<void**>(&state().legacy); }
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*, int*) {
  state().kernels[host] = name;
}
static cudaError_t launched(const void* function, cudaStream_t stream) {
  const std::string& name = state().kernels[function];
  if (name.find("spin_kernel") != std::string::npos) return emulated_enqueue(stream, "torch.cuda._sleep", [] {});
  std::fprintf(stderr, "emulator: cannot execute the kernel %s\n", name.c_str());
  return fail(cudaErrorNoKernelImageForDevice);
}
cudaError_t cudaLaunchKernel(const void* function, dim3, dim3, void**, size_t, cudaStream_t stream) {
  return launched(function, stream);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* function, void**) {
  return launched(function, config->stream);
}
cudaError_t __cudaLaunchKernel(cudaKernel_t function, dim3, dim3, void**, size_t, cudaStream_t stream) {
  return launched(function, stream);
}
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* function) {
  return *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void*>(function)), cudaSuccess;
}

// The driver. torch requests a context, and addresses of functions that it does not call.

static int absent() { return 801; }  // CUDA_ERROR_NOT_SUPPORTED
cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* result) {
  *function = dlsym(RTLD_DEFAULT, name);
  if (*function == nullptr) *function = reinterpret_cast<void*>(&absent);
  if (result) *result = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}
int cuInit(unsigned) { return 100; }  // CUDA_ERROR_NO_DEVICE, for libraries with their own runtime.
int cuDeviceGet(int* device, int number) { return *device = number, 0; }
int cuDeviceGetAttribute(int* value, int, int) { return *value = 0, 0; }
int cuDevicePrimaryCtxGetState(int, unsigned* flags, int* active) { return *flags = 0, *active = 1, 0; }
int cuDevicePrimaryCtxRetain(void** context, int) { return *context = &state(), 0; }
int cuCtxGetCurrent(void** context) { return *context = &state(), 0; }
int cuCtxSetCurrent(void*) { return 0; }
int cuGetErrorString(int, const char** text) { return *text = "not emulated", 0; }
#define ABSENT(name) \
  int name() { return absent(); }
ABSENT(cuFuncGetAttribute)
ABSENT(cuFuncSetAttribute)
ABSENT(cuFuncSetCacheConfig)
ABSENT(cuLaunchCooperativeKernel)
ABSENT(cuLaunchKernel)
ABSENT(cuLinkAddData_v2)
ABSENT(cuLinkComplete)
ABSENT(cuLinkCreate_v2)
ABSENT(cuModuleGetFunction)
ABSENT(cuModuleLoad)
ABSENT(cuModuleLoadData)
ABSENT(cuModuleLoadDataEx)
ABSENT(cuModuleUnload)
ABSENT(cuOccupancyMaxActiveBlocksPerMultiprocessor)
ABSENT(cuPointerGetAttribute)
ABSENT(cuTensorMapEncodeTiled)

}  // extern "C"
