// Copies a list of ranges, between any memory that this GPU can address: its own, a peer GPU's, pinned host memory.
//
// scripts/build-gpu-kernel.sh compiles this to kernel.ptx, which is committed beside it and embedded into the library: users
// need no CUDA toolkit. A test compares the hash that the script notes there with this file.

using u32 = unsigned int;
using u64 = unsigned long long;

// One contiguous range of a plan. Prepared by the engine (src/gpu/cuda/table.rs); both must agree on this layout.
struct Tile {
    u64 to;
    u64 from;
    u32 len;
    u32 reserved;
};

// So many loads are on their way before the first store: what comes over a link takes microseconds.
constexpr u32 kUnroll = 8;
constexpr u32 kWarp = 32;

// Streaming accesses: nobody reads these bytes here again, and the model's data should stay in the caches.
__device__ __forceinline__ uint4 load(const uint4 *from) {
    uint4 v;
    asm volatile("ld.global.cs.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(from)
                 : "memory");
    return v;
}

__device__ __forceinline__ u64 load(const u64 *from) {
    u64 v;
    asm volatile("ld.global.cs.u64 %0, [%1];" : "=l"(v) : "l"(from) : "memory");
    return v;
}

__device__ __forceinline__ u32 load(const u32 *from) {
    u32 v;
    asm volatile("ld.global.cs.u32 %0, [%1];" : "=r"(v) : "l"(from) : "memory");
    return v;
}

__device__ __forceinline__ unsigned char load(const unsigned char *from) {
    u32 v;
    asm volatile("ld.global.cs.u8 %0, [%1];" : "=r"(v) : "l"(from) : "memory");
    return static_cast<unsigned char>(v);
}

__device__ __forceinline__ void store(uint4 *to, uint4 v) {
    asm volatile("st.global.cs.v4.u32 [%0], {%1, %2, %3, %4};"
                 :
                 : "l"(to), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
                 : "memory");
}

__device__ __forceinline__ void store(u64 *to, u64 v) {
    asm volatile("st.global.cs.u64 [%0], %1;" : : "l"(to), "l"(v) : "memory");
}

__device__ __forceinline__ void store(u32 *to, u32 v) {
    asm volatile("st.global.cs.u32 [%0], %1;" : : "l"(to), "r"(v) : "memory");
}

__device__ __forceinline__ void store(unsigned char *to, unsigned char v) {
    asm volatile("st.global.cs.u8 [%0], %1;" : : "l"(to), "r"(static_cast<u32>(v)) : "memory");
}

// A warp copies `count` values; both addresses are aligned to their size.
template <typename V> __device__ __forceinline__ void copyValues(u64 to, u64 from, u32 count, u32 lane) {
    V *target = reinterpret_cast<V *>(to);
    const V *source = reinterpret_cast<const V *>(from);
    u32 at = lane;
    for (; at + (kUnroll - 1) * kWarp < count; at += kUnroll * kWarp) {
        V values[kUnroll];
#pragma unroll
        for (u32 i = 0; i < kUnroll; ++i) {
            values[i] = load(source + at + i * kWarp);
        }
#pragma unroll
        for (u32 i = 0; i < kUnroll; ++i) {
            store(target + at + i * kWarp, values[i]);
        }
    }
    if (at < count) {
        // The rest, likewise all at once.
        V values[kUnroll];
#pragma unroll
        for (u32 i = 0; i < kUnroll; ++i) {
            if (at + i * kWarp < count) {
                values[i] = load(source + at + i * kWarp);
            }
        }
#pragma unroll
        for (u32 i = 0; i < kUnroll; ++i) {
            if (at + i * kWarp < count) {
                store(target + at + i * kWarp, values[i]);
            }
        }
    }
}

// A warp copies one range by accesses of `sizeof(V)` bytes, which both addresses are equally far away from being aligned
// to; what is before the first and after the last goes by bytes.
template <typename V> __device__ __forceinline__ void copyRange(u64 to, u64 from, u32 len, u32 lane) {
    const u32 size = sizeof(V);
    u32 head = static_cast<u32>(-to) & (size - 1);
    head = head < len ? head : len;
    const u32 count = (len - head) / size;
    const u32 tail = len - head - count * size;
    if (head != 0) {
        copyValues<unsigned char>(to, from, head, lane);
    }
    copyValues<V>(to + head, from + head, count, lane);
    if (tail != 0) {
        const u64 done = head + static_cast<u64>(count) * size;
        copyValues<unsigned char>(to + done, from + done, tail, lane);
    }
}

// Copies `count` tiles, a warp each; one alone is `only`, so that a small copy does not wait for its list. The last block to end sets `arrived` back to 0 and stores `value` in `done`, which is
// host memory that the lane polls: all that was copied is visible to the host, to this GPU and to its peers by then, and
// nothing of the copy is touched any more.
extern "C" __global__ void __launch_bounds__(1024)
    corelane_copy(const Tile *tiles, u32 count, u32 *arrived, volatile u32 *done, u32 value, Tile only) {
    const u32 lane = threadIdx.x % kWarp;
    const u32 warps = gridDim.x * (blockDim.x / kWarp);
    // Neighbouring tiles go to different blocks: few tiles use all of them.
    for (u32 at = threadIdx.x / kWarp * gridDim.x + blockIdx.x; at < count; at += warps) {
        const Tile tile = count == 1 ? only : tiles[at];
        const u32 apart = static_cast<u32>(tile.to ^ tile.from);
        if (apart % 16 == 0) {
            copyRange<uint4>(tile.to, tile.from, tile.len, lane);
        } else if (apart % 8 == 0) {
            copyRange<u64>(tile.to, tile.from, tile.len, lane);
        } else if (apart % 4 == 0) {
            copyRange<u32>(tile.to, tile.from, tile.len, lane);
        } else {
            copyValues<unsigned char>(tile.to, tile.from, tile.len, lane);
        }
    }
    __threadfence_system();
    __syncthreads();
    if (threadIdx.x == 0 && gridDim.x == 1) {
        __threadfence_system();
        *done = value;
    } else if (threadIdx.x == 0) {
        const u32 before = atomicAdd(arrived, 1u);
        if (before == gridDim.x - 1) {
            *arrived = 0;
            __threadfence_system();
            *done = value;
        }
    }
}
