// The dense weight [OUT, COLUMNS] of a weight in fragments, for products that are fastest dense. One warp per block.

extern "C" __global__ void __launch_bounds__(32 * WARPS)
expand(const uint4* __restrict__ values, const uint4* __restrict__ places, u16* __restrict__ dense) {
    const int lane = threadIdx.x % 32, q = lane / 4, t = lane % 4;
    const int block = blockIdx.x * WARPS + threadIdx.x / 32;
    if (block >= TILES * BLOCKS) return;
    const int tile = block / BLOCKS, k = block % BLOCKS;
    const uint4 e = places[block * 32 + lane];
    const u32 words[4] = {e.x, e.y, e.z, e.w};
    wait_for_previous();  // a kernel in front may still read what lay where the dense weight is written
#pragma unroll
    for (int s = 0; s < STEPS; s++) {
        const uint4 a = load_once(values + ((size_t)block * STEPS + s) * 32 + lane);
        const u32 pairs[4] = {a.x, a.y, a.z, a.w};
#pragma unroll
        for (int p = 0; p < 4; p++) {  // output q + 8 half, group t + 4 upper
            const int half = p % 2, upper = p / 2;
            const u32 word = __shfl_sync(0xffffffffu, words[s / 2], q * 4 + (s % 2) * 2 + upper);
            const u32 two = word >> (16 * half + 4 * t);
            const u64 low = (u64)(pairs[p] & 0xffffu) << (16 * (two & 3)), high = (u64)(pairs[p] >> 16) << (16 * (two >> 2 & 3));
            const int column = k * 256 + s * 32 + (t + 4 * upper) * 4;
            if (column < COLUMNS) *(u64*)(dense + (size_t)(tile * 16 + q + 8 * half) * COLUMNS + column) = low | high;
        }
    }
}
