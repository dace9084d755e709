// Many rows of x: warpgroups multiply straight from the packed weight, with the sparse instruction of 64 outputs, 32 inputs and
// ROWS rows. A warp brings its part of a weight, 16 outputs, from the arrangement of fragments.py into a ring of its own,
// each lane what it will take into registers itself: no two warps of a block of threads need the same weights, and nobody
// waits for another's. One warp more brings x, 64 inputs at a time, by the tensor copy engine into a ring, rows and inputs
// beyond the last as zeros.
//
//   ROWS    rows of x in a tile, 32 to 256                     GROUPS  warpgroups; MT instructions of 64 outputs for each
//   STAGES  of 64 inputs of x in its ring                      HELPERS threads that copy: 32, or 128 that give up registers
//   WEIGHTS stages of 64 inputs in the ring of a warp, a multiple of four
//   SHARE   blocks of a cluster, of other outputs each, that share x: each brings a part of the rows for all
//   SPLIT   blocks of a cluster that share the inputs of the same outputs and add their parts, always in the same order;
//           with both, a cluster has SHARE * SPLIT blocks

#define BM (GROUPS * MT * 64)
#define THREADS (GROUPS * 128 + HELPERS)
#define CLUSTER (SHARE * SPLIT)
#define HELD (ROWS / 2)  // sums of one instruction that a thread holds
#define STAGE_BYTES (ROWS * 128)
#define PART_STRIDE (BM + 4)
#define PART_BYTES (ROWS * PART_STRIDE * 4)  // in the memory of the rings and what is beyond them
#define RING_BYTES (STAGES * STAGE_BYTES)
#define WEIGHT_STAGE (1024 + 128)  // values and places of 16 outputs x 64 inputs
#define WARP_BYTES (MT * WEIGHTS * WEIGHT_STAGE)
#define RINGS_BYTES (RING_BYTES + GROUPS * 4 * WARP_BYTES)
#define CHUNK (ROWS % 64 == 0 ? 64 : ROWS % 48 == 0 ? 48 : 32)  // rows of y that a warpgroup sends at a time, two under way
#define STAGING_BYTES (SPLIT == 1 ? GROUPS * 2 * CHUNK * 128 : PART_BYTES > RINGS_BYTES ? PART_BYTES - RINGS_BYTES : 0)
#define SPAN ((BLOCKS + SPLIT - 1) / SPLIT)
#define OUT_BLOCKS ((OUT + BM * SHARE - 1) / (BM * SHARE))
#define BAND 8  // tiles of rows that are taken for the same outputs before the next outputs: both stay in the cache

static_assert(ROWS % (8 * SHARE) == 0 && WEIGHTS % 4 == 0, "parts of x are eights of rows; a block has four stages");

struct __align__(64) Map { u64 opaque[16]; };

// The descriptor of x in shared memory: rows of 128 bytes, swizzled; eight rows are 1,024 bytes.
#define DESCRIPTOR ((1ull << 62) | ((u64)(1024 >> 4) << 32) | (1ull << 16))

#define L0 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define L1 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define L2 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define L3 ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define L4 ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"
#define L5 ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define L6 ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111"
#define L7 ", %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define S4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define S16(i) S4(i), S4(i + 4), S4(i + 8), S4(i + 12)
#if ROWS == 32
#define SUMS S16(0)
#define NAMES "m64n32k32", L0, "{%16, %17, %18, %19}, %20, %21, %22"
#elif ROWS == 48
#define SUMS S16(0), S4(16), S4(20)
#define NAMES "m64n48k32", L0 ", %16, %17, %18, %19, %20, %21, %22, %23", "{%24, %25, %26, %27}, %28, %29, %30"
#elif ROWS == 64
#define SUMS S16(0), S16(16)
#define NAMES "m64n64k32", L0 L1, "{%32, %33, %34, %35}, %36, %37, %38"
#elif ROWS == 96
#define SUMS S16(0), S16(16), S16(32)
#define NAMES "m64n96k32", L0 L1 L2, "{%48, %49, %50, %51}, %52, %53, %54"
#elif ROWS == 128
#define SUMS S16(0), S16(16), S16(32), S16(48)
#define NAMES "m64n128k32", L0 L1 L2 L3, "{%64, %65, %66, %67}, %68, %69, %70"
#elif ROWS == 192
#define SUMS S16(0), S16(16), S16(32), S16(48), S16(64), S16(80)
#define NAMES "m64n192k32", L0 L1 L2 L3 L4 L5, "{%96, %97, %98, %99}, %100, %101, %102"
#elif ROWS == 256
#define SUMS S16(0), S16(16), S16(32), S16(48), S16(64), S16(80), S16(96), S16(112)
#define NAMES "m64n256k32", L0 L1 L2 L3 L4 L5 L6 L7, "{%128, %129, %130, %131}, %132, %133, %134"
#endif
#if BF16
#define WIDE_TYPES ".f32.bf16.bf16"
#else
#define WIDE_TYPES ".f32.f16.f16"
#endif
#define INSTRUCTION_(shape, sums, inputs) \
    "wgmma.mma_async.sp.sync.aligned." shape WIDE_TYPES " {" sums "}, " inputs ", 1, 1, 1, 0;"
#define INSTRUCTION(names) INSTRUCTION_(names)

// d[64 x ROWS] += a[64 x 32, 2:4] x[32 x ROWS], of which this warp has 16 outputs; SELECT as in multiply().
template <int SELECT>
__device__ __forceinline__ void multiply_wide(float (&d)[HELD], const uint4& a, u64 x, u32 places) {
    asm volatile(INSTRUCTION(NAMES) : SUMS
                 : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "l"(x), "r"(places), "n"(SELECT) : "memory");
}
__device__ __forceinline__ void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void end_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int LEFT>
__device__ __forceinline__ void wait_for_products() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory"); }

__device__ __forceinline__ void cluster_sync() {
    asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}
__device__ __forceinline__ void some_sync(int barrier, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}
__device__ __forceinline__ u32 there(u32 address, u32 rank) {
    u32 found;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(found) : "r"(address), "r"(rank));
    return found;
}
// A barrier that is not reached within GIVE_UP nanoseconds ends the kernel with an error, where a sweep asks for that.
__device__ __forceinline__ void wait_for(u32 barrier, u32 parity) {
#ifdef GIVE_UP
    u32 begin, now, done = 0;
    asm volatile("mov.u32 %0, %%globaltimer_lo;" : "=r"(begin));
    while (!done) {
        asm volatile("{\n.reg .pred done;\nmbarrier.try_wait.parity.shared::cta.b64 done, [%1], %2;\n"
                     "selp.u32 %0, 1, 0, done;\n}" : "=r"(done) : "r"(barrier), "r"(parity) : "memory");
        asm volatile("mov.u32 %0, %%globaltimer_lo;" : "=r"(now));
        if (now - begin > GIVE_UP) asm volatile("trap;");
    }
#else
    barrier_wait(barrier, parity);
#endif
}

__device__ __forceinline__ void copy_tile(u32 to, const Map& map, int column, int row, u32 barrier, u16 blocks) {
    if (SHARE == 1)
        asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];"
                     ::"r"(to), "l"(&map), "r"(column), "r"(row), "r"(barrier) : "memory");
    else
        asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
                     " [%0], [%1, {%2, %3}], [%4], %5;"
                     ::"r"(to), "l"(&map), "r"(column), "r"(row), "r"(barrier), "h"(blocks) : "memory");
}

__device__ __forceinline__ u32 pair_of(float low, float high) {
    u32 both;
#if BF16
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
#else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
#endif
    return both;
}

// Where a warp is: in the ring, and the slot whose products may still be under way.
struct Place {
    u32 full, empty, memory;
    int slot, held;
    u32 parity;
    int sharing;  // the first block of the cluster with the same x
};

__device__ __forceinline__ void let_go(Place& at, int lane) {
    if (at.held >= 0 && lane < SHARE) {
        const u32 barrier = at.empty + 8 * at.held;
        if (SHARE == 1) barrier_arrive(barrier);
        else asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(there(barrier, at.sharing + lane)) : "memory");
    }
    at.held = -1;
}

// Where the weights of a lane begin; a block of them has a number, and those of a warp's next 64 outputs are DISTANCE on.
struct Weights {
    const char *values, *places;
};
#define DISTANCE (OUT % (BM * SHARE) == 0 ? 4 * BLOCKS : 0)  // where tiles reach beyond the last output, each is found by itself

// What a lane multiplies in 64 inputs: two steps, and the places of both.
struct Stage {
    uint4 values[MT][2];
    u32 places[MT];
};

__device__ __forceinline__ void bring(u32 to, const Weights& from, const int (&block)[MT], int stage) {
#pragma unroll
    for (int m = 0; m < MT; m++) {
        const size_t number = DISTANCE ? block[0] + m * DISTANCE : block[m];
        const char* at = from.values + number * BLOCK_VALUES + stage * 1024;
        const u32 mine = to + m * WEIGHTS * WEIGHT_STAGE;
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(mine), "l"(at) : "memory");
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(mine + 512), "l"(at + 512) : "memory");
        // the other words of the same 16 bytes are those of the next stages, and found in L1; [lane] behind the values
        asm volatile("cp.async.ca.shared.global [%0], [%1], 4;"
                     ::"r"(mine + 1024 - threadIdx.x % 32 * 12), "l"(from.places + number * BLOCK_PLACES + stage * 4) : "memory");
    }
}
__device__ __forceinline__ void end_bringing() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int LEFT>
__device__ __forceinline__ void wait_for_weights() { asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory"); }

__device__ __forceinline__ uint4 load_shared(u32 at) {
    uint4 v;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(at) : "memory");
    return v;
}
__device__ __forceinline__ void take(Stage& a, u32 from) {
#pragma unroll
    for (int m = 0; m < MT; m++) {
        const u32 mine = from + m * WEIGHTS * WEIGHT_STAGE;
        a.values[m][0] = load_shared(mine), a.values[m][1] = load_shared(mine + 512);
        asm volatile("ld.shared.u32 %0, [%1];" : "=r"(a.places[m]) : "r"(mine + 1024 - threadIdx.x % 32 * 12) : "memory");
    }
}

// 256 inputs: four stages, of which the first is in a[0]. What a warp has taken gives its place to what comes WEIGHTS stages
// later, if there is a block for it.
__device__ __forceinline__ void multiply_block(float (&d)[MT][HELD], Stage (&a)[2], const Weights& from, u32 ring, u32 next_ring,
                                               const int (&block)[MT], bool more, Place& at, int lane) {
#pragma unroll
    for (int s = 0; s < 4; s++) {
        wait_for(at.full + 8 * at.slot, at.parity);
        const u64 x = DESCRIPTOR | (u64)((at.memory + at.slot * STAGE_BYTES) >> 4);
        begin_products();
#pragma unroll
        for (int m = 0; m < MT; m++) multiply_wide<0>(d[m], a[s % 2].values[m][0], x, a[s % 2].places[m]);
#pragma unroll
        for (int m = 0; m < MT; m++) multiply_wide<1>(d[m], a[s % 2].values[m][1], x + 4, a[s % 2].places[m]);
        end_products();
        wait_for_products<1>();
        let_go(at, lane);
        at.held = at.slot;
        if (++at.slot == STAGES) at.slot = 0, at.parity ^= 1;
        wait_for_weights<WEIGHTS - 2>();
        take(a[(s + 1) % 2], s < 3 ? ring + (s + 1) * WEIGHT_STAGE : next_ring);
        if (more) bring(ring + s * WEIGHT_STAGE, from, block, s);
        end_bringing();
    }
}

extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(THREADS, MIN_CTAS)
wide(const char* __restrict__ values, const char* __restrict__ places, const __grid_constant__ Map x_map,
     const __grid_constant__ Map y_map, const u16* __restrict__ bias, u16* __restrict__ y, int rows) {
    extern __shared__ __align__(1024) char memory[];
    const u32 ring = (shared_address(memory) + 1023) / 1024 * 1024, staging = ring + RINGS_BYTES;
    const u32 full = staging + STAGING_BYTES, empty = full + 8 * STAGES;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int rank = blockIdx.x % SHARE, split = blockIdx.x % CLUSTER / SHARE;
    const int row_tiles = (rows + ROWS - 1) / ROWS, tiles = row_tiles * OUT_BLOCKS;
    const int first = SPLIT == 1 ? 0 : split * SPAN, last = SPLIT == 1 ? BLOCKS : min(first + SPAN, BLOCKS);

    if (threadIdx.x == 0) {
        for (int s = 0; s < STAGES; s++) barrier_init(full + 8 * s, 1), barrier_init(empty + 8 * s, SHARE * GROUPS * 4);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    if (CLUSTER > 1) cluster_sync();
    else __syncthreads();
    let_next_start();

    // Which outputs and rows a number means: BAND tiles of rows side by side, then the next outputs.
    const auto place = [&](int tile, int& out_block, int& row) {
        const int begin = tile / (BAND * OUT_BLOCKS) * BAND, width = min(row_tiles - begin, BAND);
        const int inside = tile % (BAND * OUT_BLOCKS);
        row = (begin + inside % width) * ROWS;
        out_block = inside / width * SHARE + rank;
    };

    int out_block = 0, row = 0;
    if (warp >= GROUPS * 4) {
#if HELPERS == 128
        asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
#endif
        if (warp == GROUPS * 4 && lane == 0) {
            const u16 sharing = ((1 << SHARE) - 1) << (split * SHARE);
            const int part = rank * (ROWS / SHARE);
            int slot = 0, turn = 0;
            wait_for_previous();
            for (int tile = blockIdx.x / CLUSTER; tile < tiles; tile += gridDim.x / CLUSTER) {
                place(tile, out_block, row);
                for (int k = first * 4; k < last * 4; k++) {
                    if (turn > 0) wait_for(empty + 8 * slot, (turn & 1) ^ 1);
                    barrier_expect(full + 8 * slot, STAGE_BYTES);
                    copy_tile(ring + slot * STAGE_BYTES + part * 128, x_map, k * 64, row + part, full + 8 * slot, sharing);
                    if (++slot == STAGES) slot = 0, turn++;
                }
            }
        }
        __syncwarp();
        if (CLUSTER > 1) cluster_sync();
    } else {
#if HELPERS == 128
        asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");
#endif
        const int group = warp / 4, q = lane / 4, t = lane % 4;
        const auto tile_of = [&](int out_block, int m) {  // of 16 outputs, this warp's; beyond the last nothing is kept
            return min(out_block * (BM / 16) + (group * MT + m) * 4 + warp % 4, TILES - 1);
        };
        Place at = {full, empty, ring, 0, -1, 0, split * SHARE};
        const Weights from = {values + lane * 16, places + lane * 16};
        const u32 own = ring + RING_BYTES + warp * WARP_BYTES + lane * 16;
        Stage a[2];
        float d[MT][HELD];
        const auto start_of = [&](int tile, int (&found)[MT]) {
            int out_block, row;
            place(min(tile, tiles - 1), out_block, row);
#pragma unroll
            for (int m = 0; m < MT; m++) found[m] = tile_of(out_block, m) * BLOCKS + min(first, BLOCKS - 1);
        };
        // What is brought next: a block of a tile, behind the last one that of the next tile, as long as there is one.
        int coming = blockIdx.x / CLUSTER, coming_k = first, block[MT];
        bool more = first < last && coming < tiles;
        start_of(coming, block);
        const auto go_on = [&]() {
            if (++coming_k < last) {
#pragma unroll
                for (int m = 0; m < MT; m++) block[m]++;
            } else {
                coming += gridDim.x / CLUSTER, coming_k = first, more = more && coming < tiles;
                start_of(coming, block);
            }
        };
#pragma unroll
        for (int b = 0; b < WEIGHTS / 4; b++) {
#pragma unroll
            for (int s = 0; s < 4; s++) {
                if (more) bring(own + (b * 4 + s) * WEIGHT_STAGE, from, block, s);
                end_bringing();
            }
            go_on();
        }
        wait_for_weights<WEIGHTS - 1>();
        take(a[0], own);
        u32 mine = own;

        for (int tile = blockIdx.x / CLUSTER; tile < tiles; tile += gridDim.x / CLUSTER) {
            place(tile, out_block, row);
#pragma unroll
            for (int m = 0; m < MT; m++)
#pragma unroll
                for (int i = 0; i < HELD; i++) d[m][i] = 0.0f;
            for (int k = first; k < last; k++) {
                const u32 next = WEIGHTS == 4 || mine + 4 * WEIGHT_STAGE == own + WEIGHTS * WEIGHT_STAGE ? own : mine + 4 * WEIGHT_STAGE;
                multiply_block(d, a, from, mine, next, block, more, at, lane);
                mine = next;
                go_on();
            }
            wait_for_products<0>();
            let_go(at, lane);
#pragma unroll
            for (int m = 0; m < MT; m++)
#pragma unroll
                for (int i = 0; i < HELD; i++) asm volatile("" : "+f"(d[m][i])::"memory");

            wait_for_previous();
            if (SPLIT == 1) {
                // [CHUNK, 64 outputs] at a time, swizzled as the copy engine wants it
                const bool leads = warp % 4 == 0 && lane == 0;
                const u32 to = (lane / 16 * 8 + lane % 8) * 128 + ((warp % 4 * 2 + lane / 8 % 2) ^ (lane % 8)) * 16;
#pragma unroll
                for (int m = 0; m < MT; m++) {
                    const int from_bias = tile_of(out_block, m) * 16 + q, out = out_block * BM + (group * MT + m) * 64;
                    const float low = bias ? load_bias(bias + from_bias) : 0.0f;
                    const float high = bias ? load_bias(bias + from_bias + 8) : 0.0f;
#pragma unroll
                    for (int c = 0; c < ROWS / CHUNK; c++) {
                        const u32 chunk = staging + (group * 2 + (m * (ROWS / CHUNK) + c) % 2) * CHUNK * 128;
                        if (leads) asm volatile("cp.async.bulk.wait_group.read 1;" ::: "memory");
                        some_sync(1 + group, 128);
#pragma unroll
                        for (int j = 0; j < CHUNK / 8; j += 2) {
                            const float* sum = d[m] + 4 * (c * (CHUNK / 8) + j);
                            asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};"
                                         ::"r"(chunk + to + j * 1024), "r"(pair_of(sum[0] + low, sum[1] + low)),
                                         "r"(pair_of(sum[2] + high, sum[3] + high)), "r"(pair_of(sum[4] + low, sum[5] + low)),
                                         "r"(pair_of(sum[6] + high, sum[7] + high)) : "memory");
                        }
                        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
                        some_sync(1 + group, 128);
                        if (leads && out < OUT && row + c * CHUNK < rows)
                            asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];"
                                         ::"l"(&y_map), "r"(out), "r"(row + c * CHUNK), "r"(chunk) : "memory");
                        if (leads) asm volatile("cp.async.bulk.commit_group;" ::: "memory");
                    }
                }
            } else {
                some_sync(1, GROUPS * 128);  // every copy into the ring was waited for, and its last reader is done
                const u32 part = ring + ((group * MT * 4 + warp % 4) * 16 + q) * 4;
#pragma unroll
                for (int m = 0; m < MT; m++)
#pragma unroll
                    for (int i = 0; i < HELD; i++)
                        asm volatile("st.shared.f32 [%0], %1;" ::"r"(part + (8 * (i / 4) + 2 * t + i % 2) * PART_STRIDE * 4
                                     + (m * 64 + i % 4 / 2 * 8) * 4), "f"(d[m][i]) : "memory");
                cluster_sync();
                const int here = min(rows - row, ROWS);
                for (int o = split * GROUPS * 128 + threadIdx.x; o < here * (BM / 8); o += SPLIT * GROUPS * 128) {
                    const int at_row = o / (BM / 8), at = o % (BM / 8) * 8, out = out_block * BM + at;
                    if (out >= OUT) continue;
                    float sum[8];
#pragma unroll
                    for (int i = 0; i < 8; i++) sum[i] = bias ? load_bias(bias + out + i) : 0.0f;
#pragma unroll
                    for (int r = 0; r < SPLIT; r++) {
                        const u32 from = there(ring + (at_row * PART_STRIDE + at) * 4, r * SHARE + rank);
#pragma unroll
                        for (int i = 0; i < 8; i += 4) {
                            float4 f;
                            asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
                                         : "=f"(f.x), "=f"(f.y), "=f"(f.z), "=f"(f.w) : "r"(from + i * 4) : "memory");
                            sum[i] += f.x, sum[i + 1] += f.y, sum[i + 2] += f.z, sum[i + 3] += f.w;
                        }
                    }
                    *(uint4*)(y + (size_t)(row + at_row) * OUT + out) = make_uint4(
                        pair_of(sum[0], sum[1]), pair_of(sum[2], sum[3]), pair_of(sum[4], sum[5]), pair_of(sum[6], sum[7]));
                }
            }
        }
        if (SPLIT == 1 && warp % 4 == 0 && lane == 0) asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
        if (SHARE > 1 && SPLIT == 1) cluster_sync();  // nobody leaves while another may write or arrive here
    }
    if (SPLIT > 1) cluster_sync();  // nobody leaves while another reads its part
}
