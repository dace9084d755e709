// Up to 64 rows of x at a time: a block of threads multiplies TM tiles of 16 outputs by all rows, 256 inputs at a time, with x and
// the weight in a ring of STAGES asynchronous copies: the weight in few large ones, x sixteen bytes a thread, as copies
// of its short rows would wait on each other. SPLIT blocks of a cluster share the inputs of the same outputs and
// add their parts through each other's shared memory, always in the same order.
//
//   ROWS rows of x at a time, NT = ceil(ROWS / 8); TM tiles per block of threads, one warp for MT of them

#define NT ((ROWS + 7) / 8)
#define WARPS (TM / MT)
#define HELPERS 128  // threads that copy
#define THREADS (32 * WARPS + HELPERS)
#define PART_STRIDE (TM * 16 + 4)
#define X_STRIDE (512 + 16)
#define X_BYTES (NT * 8 * X_STRIDE)
#define STAGE_BYTES (X_BYTES + TM * BLOCK_BYTES)
#define SPAN ((BLOCKS + SPLIT - 1) / SPLIT)

__device__ __forceinline__ void cluster_sync() {
    asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}

__device__ __forceinline__ void copy_some(u32 to, const void* from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}
__device__ __forceinline__ void arrive_when_copied(u32 barrier) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ uint4 load_rows(u32 at) {  // eight rows of x, 32 inputs, as the product takes them
    uint4 b;
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(b.x), "=r"(b.y), "=r"(b.z), "=r"(b.w) : "r"(at) : "memory");
    return b;
}

extern "C" __global__ void __cluster_dims__(SPLIT, 1, 1) __launch_bounds__(THREADS, MIN_CTAS)
tiles(const char* __restrict__ values, const char* __restrict__ places, const u16* __restrict__ x,
      const u16* __restrict__ bias, u16* __restrict__ y, int rows) {
    extern __shared__ __align__(128) char memory[];
    __shared__ u64 barriers[2 * STAGES];
    const u32 full = shared_address(barriers), empty = full + 8 * STAGES, ring = shared_address(memory);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    // Blocks of threads that need the same weights for other rows are neighbours, so that the cache serves all but one.
    const int passes = (rows + NT * 8 - 1) / (NT * 8), pass = blockIdx.x / SPLIT % passes;
    const int rank = blockIdx.x % SPLIT, first_tile = blockIdx.x / SPLIT / passes * TM;
    const int first = rank * SPAN, last = min(first + SPAN, BLOCKS);
    x += (size_t)pass * (NT * 8) * COLUMNS, y += (size_t)pass * (NT * 8) * OUT;
    rows = min(rows - pass * NT * 8, NT * 8);

    if (threadIdx.x == 0) {
        for (int s = 0; s < STAGES; s++) barrier_init(full + 8 * s, 1 + HELPERS), barrier_init(empty + 8 * s, WARPS);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    // Rows that no copy will write, and inputs beyond the last, count as zero.
    for (int j = threadIdx.x; j < STAGES * (X_BYTES / 16); j += THREADS) {
        const int s = j / (X_BYTES / 16);
        *(uint4*)(memory + s * STAGE_BYTES + j % (X_BYTES / 16) * 16) = make_uint4(0, 0, 0, 0);
    }
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    __syncthreads();
    let_next_start();

    float d[MT][NT][4] = {};
    if (warp >= WARPS) {
        const int helper = threadIdx.x - 32 * WARPS;
        for (int k = first; k < last; k++) {
            const int n = k - first, stage = n % STAGES;
            const u32 at = ring + stage * STAGE_BYTES, on = full + 8 * stage;
            const int width = min(256, COLUMNS - k * 256) * 2;
            if (n >= STAGES) barrier_wait(empty + 8 * stage, ((n / STAGES) & 1) ^ 1);
            if (helper == 0) barrier_expect(on, TM * BLOCK_BYTES);
            __syncwarp();
            if (helper < TM) {
                const int tile = min(first_tile + helper, TILES - 1);
                const size_t block = (size_t)tile * BLOCKS + k;
                const u32 to = at + X_BYTES + helper * BLOCK_BYTES;
                copy_bulk(to, values + block * BLOCK_VALUES, BLOCK_VALUES, on);
                copy_bulk(to + BLOCK_VALUES, places + block * BLOCK_PLACES, BLOCK_PLACES, on);
            }
            if (n == 0) wait_for_previous();
            for (int c = helper; c < rows * 32; c += HELPERS) {
                const int row = c / 32, byte = c % 32 * 16;
                if (byte < width)
                    copy_some(at + row * X_STRIDE + byte, (const char*)(x + (size_t)row * COLUMNS + k * 256) + byte);
            }
            arrive_when_copied(on);
        }
    } else {
        const u32 row_at = (lane % 8) * X_STRIDE + lane / 8 * 16;
        for (int k = first; k < last; k++) {
            const int n = k - first, stage = n % STAGES;
            barrier_wait(full + 8 * stage, (n / STAGES) & 1);
            const u32 x_at = ring + stage * STAGE_BYTES + row_at;
            const uint4* block = (const uint4*)(memory + stage * STAGE_BYTES + X_BYTES + warp * MT * BLOCK_BYTES) + lane;
            u32 words[MT][4];
#pragma unroll
            for (int m = 0; m < MT; m++) {
                const uint4 e = block[m * (BLOCK_BYTES / 16) + STEPS * 32];
                words[m][0] = e.x, words[m][1] = e.y, words[m][2] = e.z, words[m][3] = e.w;
            }
#pragma unroll
            for (int s = 0; s < STEPS; s += 2) {
                uint4 a[MT][2];
#pragma unroll
                for (int m = 0; m < MT; m++)
                    a[m][0] = block[m * (BLOCK_BYTES / 16) + s * 32], a[m][1] = block[m * (BLOCK_BYTES / 16) + s * 32 + 32];
#pragma unroll
                for (int j = 0; j < NT; j++) {
                    const uint4 b0 = load_rows(x_at + j * 8 * X_STRIDE + s * 64);
                    const uint4 b1 = load_rows(x_at + j * 8 * X_STRIDE + s * 64 + 64);
#pragma unroll
                    for (int m = 0; m < MT; m++) {
                        multiply<0>(d[m][j], a[m][0], b0, words[m][s / 2]);
                        multiply<1>(d[m][j], a[m][1], b1, words[m][s / 2]);
                    }
                }
            }
            __syncwarp();
            if (lane == 0) barrier_arrive(empty + 8 * stage);
        }
    }

    // Parts [NT * 8, TM * 16] of the outputs in the memory of the ring, whose last copies every warp has waited for.
    __syncthreads();
    float* part = (float*)memory;
    const int q = lane / 4, t = lane % 4;
    if (warp < WARPS) {
#pragma unroll
        for (int m = 0; m < MT; m++)
#pragma unroll
            for (int j = 0; j < NT; j++)
#pragma unroll
                for (int c = 0; c < 4; c++)
                    part[(8 * j + 2 * t + c % 2) * PART_STRIDE + (warp * MT + m) * 16 + q + 8 * (c / 2)] = d[m][j][c];
    }
    if (SPLIT > 1) cluster_sync();
    else __syncthreads();
    for (int o = rank * THREADS + threadIdx.x; o < rows * TM * 16; o += SPLIT * THREADS) {
        const int row = o / (TM * 16), at = first_tile * 16 + o % (TM * 16);
        if (at >= OUT) continue;
        float sum = bias ? load_bias(bias + at) : 0.0f;
        const u32 mine = shared_address(part + row * PART_STRIDE + o % (TM * 16));
#pragma unroll
        for (int r = 0; r < SPLIT; r++) {
            float other;
            u32 there;
            asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(mine), "r"(r));
            asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(other) : "r"(there) : "memory");
            sum += other;
        }
        y[(size_t)row * OUT + at] = from_float(sum);
    }
    if (SPLIT > 1) cluster_sync();  // nobody leaves while another reads its part
}
