// NCCL collectives over shared memory between processes of one host.
#include <fcntl.h>
#include <nccl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "runtime.h"

namespace {

constexpr size_t kChunk = 1 << 20;  // Bytes per rank exchanged at once.

struct Shared {
  std::atomic<int> arrived, generation, aborted;
};

}  // namespace

struct ncclComm {
  int ranks, rank, device;
  Shared* shared;
  char* chunks;
  std::atomic<bool> aborted{false};

  // Waits for all ranks. Returns false if a rank has aborted.
  bool barrier() {
    const int now = shared->generation.load();
    if (shared->arrived.fetch_add(1) + 1 == ranks) {
      shared->arrived.store(0);
      shared->generation.fetch_add(1);
      return true;
    }
    while (shared->generation.load() == now) {
      if (aborted.load() || shared->aborted.load()) return false;
      usleep(20);
    }
    return true;
  }
};

namespace {

size_t size_of(ncclDataType_t type) {
  switch (type) {
    case ncclInt8: case ncclUint8: return 1;
    case ncclFloat16: case ncclBfloat16: return 2;
    case ncclInt32: case ncclUint32: case ncclFloat32: return 4;
    case ncclInt64: case ncclUint64: case ncclFloat64: return 8;
    default: return 0;
  }
}

float widen(uint16_t half) {
  const uint32_t bits = uint32_t{half} << 16;
  float wide;
  return std::memcpy(&wide, &bits, 4), wide;
}

uint16_t narrow(float wide) {
  uint32_t bits;
  std::memcpy(&bits, &wide, 4);
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

template <typename Value>
Value reduced(ncclRedOp_t op, Value a, Value b) {
  return op == ncclMax ? (a > b ? a : b) : op == ncclMin ? (a < b ? a : b) : op == ncclProd ? a * b : a + b;
}

// Reduces in rank order, so that all ranks get the same bits.
template <typename Stored, typename Value = Stored, typename Read, typename Write>
void reduce_as(const ncclComm* comm, void* to, size_t count, ncclRedOp_t op, Read read, Write write) {
  for (size_t i = 0; i < count; ++i) {
    Value total = read(reinterpret_cast<const Stored*>(comm->chunks)[i]);
    for (int rank = 1; rank < comm->ranks; ++rank)
      total = reduced(op, total, static_cast<Value>(read(reinterpret_cast<const Stored*>(comm->chunks + rank * kChunk)[i])));
    if (op == ncclAvg) total = total / static_cast<Value>(comm->ranks);
    static_cast<Stored*>(to)[i] = write(total);
  }
}

void reduce(const ncclComm* comm, void* to, size_t count, ncclDataType_t type, ncclRedOp_t op) {
  auto same = [](auto value) { return value; };
  switch (type) {
    case ncclInt8: return reduce_as<int8_t>(comm, to, count, op, same, same);
    case ncclUint8: return reduce_as<uint8_t>(comm, to, count, op, same, same);
    case ncclInt32: return reduce_as<int32_t>(comm, to, count, op, same, same);
    case ncclInt64: return reduce_as<int64_t>(comm, to, count, op, same, same);
    case ncclFloat32: return reduce_as<float>(comm, to, count, op, same, same);
    case ncclFloat64: return reduce_as<double>(comm, to, count, op, same, same);
    case ncclBfloat16: return reduce_as<uint16_t, float>(comm, to, count, op, widen, narrow);
    default: std::fprintf(stderr, "emulator: reduction of NCCL type %d is not supported\n", type), std::abort();
  }
}

// Exchanges `bytes` of every rank in pieces. For each piece, `take` gets its offset and size and reads all ranks' chunks.
template <typename Take>
void exchange(ncclComm* comm, const void* from, size_t bytes, Take take) {
  for (size_t at = 0; at < bytes; at += kChunk) {
    const size_t piece = std::min(kChunk, bytes - at);
    std::memcpy(comm->chunks + comm->rank * kChunk, static_cast<const char*>(from) + at, piece);
    if (!comm->barrier()) return;
    take(at, piece);
    if (!comm->barrier()) return;
  }
}

ncclResult_t enqueue(cudaStream_t stream, const char* name, std::function<void()> work) {
  return emulated_enqueue(stream, name, std::move(work)) ? ncclUnhandledCudaError : ncclSuccess;
}

ncclResult_t connect(ncclComm_t* comm, int ranks, const char* name, int rank) {
  const size_t bytes = sizeof(Shared) + kChunk * ranks;
  const int file = shm_open(name, O_CREAT | O_RDWR, 0600);
  if (file < 0 || ftruncate(file, static_cast<off_t>(bytes))) return ncclSystemError;
  void* at = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  close(file);
  if (at == MAP_FAILED) return ncclSystemError;
  int device = 0;
  cudaGetDevice(&device);
  *comm = new ncclComm{ranks, rank, device, static_cast<Shared*>(at), static_cast<char*>(at) + sizeof(Shared)};
  (*comm)->barrier();
  if (rank == 0) shm_unlink(name);
  return ncclSuccess;
}

}  // namespace

extern "C" {

ncclResult_t ncclGetVersion(int* version) { return *version = NCCL_VERSION_CODE, ncclSuccess; }
const char* ncclGetErrorString(ncclResult_t) { return "emulator error"; }
const char* ncclGetLastError(ncclComm_t) { return ""; }
ncclResult_t ncclGetUniqueId(ncclUniqueId* id) {
  std::memset(id, 0, sizeof *id);
  std::random_device random;
  std::snprintf(id->internal, sizeof id->internal, "/emulated-nccl-%d-%08x%08x", getpid(), random(), random());
  return ncclSuccess;
}
ncclResult_t ncclCommInitRankConfig(ncclComm_t* comm, int ranks, ncclUniqueId id, int rank, ncclConfig_t*) {
  return connect(comm, ranks, id.internal, rank);
}
ncclResult_t ncclCommInitRank(ncclComm_t* comm, int ranks, ncclUniqueId id, int rank) {
  return connect(comm, ranks, id.internal, rank);
}
ncclResult_t ncclCommGetAsyncError(ncclComm_t, ncclResult_t* error) { return *error = ncclSuccess, ncclSuccess; }
ncclResult_t ncclCommAbort(ncclComm_t comm) {
  comm->aborted = true;  // Not freed: a replay may still run one of its collectives.
  comm->shared->aborted = 1;
  return ncclSuccess;
}
ncclResult_t ncclCommFinalize(ncclComm_t) { return ncclSuccess; }
ncclResult_t ncclCommDestroy(ncclComm_t comm) { return comm->aborted = true, ncclSuccess; }
ncclResult_t ncclCommCount(ncclComm_t comm, int* count) { return *count = comm->ranks, ncclSuccess; }
ncclResult_t ncclCommUserRank(ncclComm_t comm, int* rank) { return *rank = comm->rank, ncclSuccess; }
ncclResult_t ncclCommCuDevice(ncclComm_t comm, int* device) { return *device = comm->device, ncclSuccess; }
ncclResult_t ncclCommRegister(ncclComm_t, void*, size_t, void** handle) { return *handle = nullptr, ncclSuccess; }
ncclResult_t ncclCommDeregister(ncclComm_t, void*) { return ncclSuccess; }
ncclResult_t ncclGroupStart() { return ncclSuccess; }
ncclResult_t ncclGroupEnd() { return ncclSuccess; }

ncclResult_t ncclAllReduce(const void* from, void* to, size_t count, ncclDataType_t type, ncclRedOp_t op, ncclComm_t comm,
                           cudaStream_t stream) {
  const size_t size = size_of(type);
  return enqueue(stream, __func__, [=] {
    exchange(comm, from, count * size, [=](size_t at, size_t piece) {
      reduce(comm, static_cast<char*>(to) + at, piece / size, type, op);
    });
  });
}
ncclResult_t ncclBroadcast(const void* from, void* to, size_t count, ncclDataType_t type, int root, ncclComm_t comm,
                           cudaStream_t stream) {
  return enqueue(stream, __func__, [=] {
    exchange(comm, comm->rank == root ? from : to, count * size_of(type), [=](size_t at, size_t piece) {
      std::memcpy(static_cast<char*>(to) + at, comm->chunks + root * kChunk, piece);
    });
  });
}
ncclResult_t ncclBcast(void* at, size_t count, ncclDataType_t type, int root, ncclComm_t comm, cudaStream_t stream) {
  return ncclBroadcast(at, at, count, type, root, comm, stream);
}
ncclResult_t ncclAllGather(const void* from, void* to, size_t count, ncclDataType_t type, ncclComm_t comm,
                           cudaStream_t stream) {
  const size_t bytes = count * size_of(type);
  return enqueue(stream, __func__, [=] {
    exchange(comm, from, bytes, [=](size_t at, size_t piece) {
      for (int rank = 0; rank < comm->ranks; ++rank)
        std::memcpy(static_cast<char*>(to) + rank * bytes + at, comm->chunks + rank * kChunk, piece);
    });
  });
}
ncclResult_t ncclReduceScatter(const void* from, void* to, size_t count, ncclDataType_t type, ncclRedOp_t op,
                               ncclComm_t comm, cudaStream_t stream) {
  const size_t size = size_of(type);
  return enqueue(stream, __func__, [=] {
    std::vector<char> all(count * size * comm->ranks);
    exchange(comm, from, all.size(), [&](size_t at, size_t piece) { reduce(comm, all.data() + at, piece / size, type, op); });
    std::memcpy(to, all.data() + comm->rank * count * size, count * size);
  });
}

}  // extern "C"
