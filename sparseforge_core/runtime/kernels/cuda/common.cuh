// What the kernels share: streaming loads, the sparse tensor-core product, barriers of asynchronous copies.
//
// Sizes are compile-time constants, set when a kernel is built for a shape:
//   COLUMNS   inputs of the weight, a multiple of 8        BLOCKS   blocks of 256 inputs, filled up with zeros
//   OUT       outputs of the weight, a multiple of 16      BF16     1 for bfloat16, 0 for float16
// A block is 16 outputs x 256 inputs: 4,096 bytes of values and 512 of places, in the order of fragments.py.

// and two that are on unless a sweep turns them off:
//   EARLY     let the next kernel start while this one runs   HINTS    tell the caches that weights pass once

#ifndef EARLY
#define EARLY 1
#endif
#ifndef HINTS
#define HINTS 1
#endif

typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned long long u64;

#define TILES (OUT / 16)
#define STEPS 8
#define BLOCK_VALUES 4096
#define BLOCK_PLACES 512
#define BLOCK_BYTES (BLOCK_VALUES + BLOCK_PLACES)

__device__ __forceinline__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

__device__ __forceinline__ float to_float(u16 bits) {
#if BF16
    return __uint_as_float((u32)bits << 16);
#else
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(bits));
    return f;
#endif
}

__device__ __forceinline__ u16 from_float(float f) {
    u16 bits;
#if BF16
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(f));
#else
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(f));
#endif
    return bits;
}

// Weights pass once: they are kept out of L1. The plain form of the load keeps its place before wait_for_previous().
__device__ __forceinline__ uint4 load_once(const uint4* p) {
    uint4 v;
#if HINTS
#define LOAD_ONCE "ld.global.L1::no_allocate.L2::256B.v4.u32"
#else
#define LOAD_ONCE "ld.global.L1::no_allocate.v4.u32"
#endif
    asm volatile(LOAD_ONCE " {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p) : "memory");
    return v;
}

// Eight inputs of x, which the kernel before may have just written: never through the read-only path, which the
// compiler moves before the wait.
__device__ __forceinline__ uint4 load_x(const u16* p) {
    uint4 v;
    asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p) : "memory");
    return v;
}

// A bias, which may be a residual that a kernel a few launches before has written: not through the read-only path.
__device__ __forceinline__ float load_bias(const u16* p) {
    u16 bits;
    asm volatile("ld.global.u16 %0, [%1];" : "=h"(bits) : "l"(p) : "memory");
    return to_float(bits);
}

// d[16 x 8] += a[16 x 32, 2:4] b[32 x 8], float32; SELECT says which half of each four lanes holds the places.
#if BF16
#define MMA_TYPES "f32.bf16.bf16.f32"
#else
#define MMA_TYPES "f32.f16.f16.f32"
#endif
template <int SELECT>
__device__ __forceinline__ void multiply(float (&d)[4], const uint4& a, const uint4& b, u32 places) {
    asm volatile("mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col." MMA_TYPES
        " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9, %10, %11}, {%0, %1, %2, %3}, %12, %13;"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b.x), "r"(b.y), "r"(b.z), "r"(b.w), "r"(places), "n"(SELECT));
}

// Programmatic dependent launch: the next kernel of the stream may start; wait for the one before, whose output is x.
__device__ __forceinline__ void let_next_start() {
#if EARLY
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
__device__ __forceinline__ void wait_for_previous() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

__device__ __forceinline__ void barrier_init(u32 barrier, u32 count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}
__device__ __forceinline__ void barrier_arrive(u32 barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
__device__ __forceinline__ void barrier_expect(u32 barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
__device__ __forceinline__ void barrier_wait(u32 barrier, u32 parity) {
    asm volatile(
        "{\n.reg .pred done;\nAGAIN:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@done bra DONE;\nbra AGAIN;\nDONE:\n}" ::"r"(barrier), "r"(parity) : "memory");
}
__device__ __forceinline__ u64 passing_policy() {
    u64 policy;
    asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}
__device__ __forceinline__ void copy_bulk(u32 to, const void* from, u32 bytes, u32 barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
                 ::"r"(to), "l"(from), "r"(bytes), "r"(barrier) : "memory");
}
__device__ __forceinline__ void copy_bulk_once(u32 to, const void* from, u32 bytes, u32 barrier, u64 policy) {
#if HINTS
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;"
                 ::"r"(to), "l"(from), "r"(bytes), "r"(barrier), "l"(policy) : "memory");
#else
    copy_bulk(to, from, bytes, barrier);
#endif
}
