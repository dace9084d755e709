// A few rows of x, all of them in shared memory: each block of threads streams whole tiles of 16 outputs through a ring
// of asynchronous copies, so that the memory is never idle between tiles.
//
//   ROWS most rows of x: 1, which takes a cheaper order of x, or a multiple of 8
//   WARPS consumers, each taking every WARPS-th block of all; SLOTS blocks in the ring, a multiple of WARPS, so that
//   a slot always meets the same consumer: another could be a whole turn of the ring ahead, and a barrier knows only
//   the last turn from the one before

static_assert(SLOTS % WARPS == 0, "a slot must meet one consumer");

#define NT ((ROWS + 7) / 8)
#define THREADS (32 * (WARPS + 1))
#define X_LANES (ROWS == 1 ? 4 : 32)
#define X_BYTES (BLOCKS * STEPS * NT * X_LANES * 16)
#define RED_FLOATS (ROWS == 1 ? 16 : 128 * NT)

__device__ __forceinline__ void consumers_sync() { asm volatile("bar.sync 1, %0;" ::"n"(32 * WARPS) : "memory"); }

// x [rows, COLUMNS] into the order in which lanes take it; what is beyond the rows or columns is zero.
__device__ __forceinline__ void stage_x(u32* xs, const u16* x, int rows, int thread) {
    for (int j = thread; j < NT * 8 * BLOCKS * 32; j += 32 * WARPS) {
        int row = j / (BLOCKS * 32), chunk = j % (BLOCKS * 32);  // chunk: 8 inputs
        if (ROWS == 1 && row > 0) break;
        uint4 v = make_uint4(0, 0, 0, 0);
        if (row < rows && chunk * 8 < COLUMNS) v = load_x(x + (size_t)row * COLUMNS + chunk * 8);
        int step = chunk / 4, i = chunk % 4;
        u32* to = xs + (ROWS == 1 ? step * 16 : ((step * NT + row / 8) * 32 + (row % 8) * 4) * 4) + i;
        to[0] = v.x, to[4] = v.y, to[8] = v.z, to[12] = v.w;
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, MIN_CTAS)
stream(const char* __restrict__ values, const char* __restrict__ places, const u16* __restrict__ x,
       const u16* __restrict__ bias, u16* __restrict__ y, int rows) {
    extern __shared__ __align__(128) char memory[];
    char* ring = memory;
    uint4* xs = (uint4*)(ring + SLOTS * BLOCK_BYTES);
    float* red = (float*)((char*)xs + X_BYTES);  // [2, WARPS, RED_FLOATS]
    u64* barriers = (u64*)(red + 2 * WARPS * RED_FLOATS);
    const u32 full = shared_address(barriers), empty = full + 8 * SLOTS, ring_at = shared_address(ring);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;

    if (threadIdx.x == 0) {
        for (int s = 0; s < SLOTS; s++) barrier_init(full + 8 * s, 1), barrier_init(empty + 8 * s, 1);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
    let_next_start();

    if (warp == WARPS) {
        if (lane == 0) {
            const u64 policy = passing_policy();
            int n = 0;
            for (int tile = blockIdx.x; tile < TILES; tile += gridDim.x) {
                for (int k = 0; k < BLOCKS; k++, n++) {
                    const int slot = n % SLOTS;
                    if (n >= SLOTS) barrier_wait(empty + 8 * slot, ((n / SLOTS) & 1) ^ 1);
                    const size_t block = (size_t)tile * BLOCKS + k;
                    const u32 at = ring_at + slot * BLOCK_BYTES;
                    barrier_expect(full + 8 * slot, BLOCK_BYTES);
                    copy_bulk_once(at, values + block * BLOCK_VALUES, BLOCK_VALUES, full + 8 * slot, policy);
                    copy_bulk_once(at + BLOCK_VALUES, places + block * BLOCK_PLACES, BLOCK_PLACES, full + 8 * slot, policy);
                }
            }
        }
        return;
    }

    wait_for_previous();
    stage_x((u32*)xs, x, rows, threadIdx.x);
    consumers_sync();
    const int q = lane / 4, t = lane % 4;
    int turn = 0;
    for (int tile = blockIdx.x; tile < TILES; tile += gridDim.x, turn++) {
        float d[2][NT][4] = {};
        for (int k = (warp + WARPS - turn * BLOCKS % WARPS) % WARPS; k < BLOCKS; k += WARPS) {
            const int n = turn * BLOCKS + k, slot = n % SLOTS;
            barrier_wait(full + 8 * slot, (n / SLOTS) & 1);
            const uint4* block = (const uint4*)(ring + slot * BLOCK_BYTES) + lane;
            const uint4 e = block[STEPS * 32];
            const u32 words[4] = {e.x, e.y, e.z, e.w};
            const uint4* mine = xs + k * STEPS * NT * X_LANES + (ROWS == 1 ? t : lane);
#pragma unroll
            for (int s = 0; s < STEPS; s += 2) {
                const uint4 a0 = block[s * 32], a1 = block[(s + 1) * 32];
#pragma unroll
                for (int j = 0; j < NT; j++) {
                    multiply<0>(d[0][j], a0, mine[(s * NT + j) * X_LANES], words[s / 2]);
                    multiply<1>(d[1][j], a1, mine[((s + 1) * NT + j) * X_LANES], words[s / 2]);
                }
            }
            __syncwarp();
            if (lane == 0) barrier_arrive(empty + 8 * slot);
        }
        float* part = red + ((turn & 1) * WARPS + warp) * RED_FLOATS;
        if (ROWS == 1) {
            if (t == 0) part[q] = d[0][0][0] + d[1][0][0], part[q + 8] = d[0][0][2] + d[1][0][2];
        } else {
#pragma unroll
            for (int j = 0; j < NT; j++)
#pragma unroll
                for (int c = 0; c < 4; c++) part[(8 * j + 2 * t + c % 2) * 16 + q + 8 * (c / 2)] = d[0][j][c] + d[1][j][c];
        }
        consumers_sync();
        if (warp == turn % WARPS) {  // the others go on with the next tile; parts of this one are overwritten two later
            const float* parts = red + (turn & 1) * WARPS * RED_FLOATS;
            for (int o = lane; o < 16 * rows; o += 32) {
                float sum = bias ? load_bias(bias + tile * 16 + o % 16) : 0.0f;
#pragma unroll
                for (int w = 0; w < WARPS; w++) sum += parts[w * RED_FLOATS + o];
                y[(size_t)(o / 16) * OUT + tile * 16 + o % 16] = from_float(sum);
            }
            __syncwarp();
        }
    }
}
