// One row of x, weights straight into registers: WARPS warps share a tile of 16 outputs, each warp every WARPS-th block
// of 256 inputs, with the loads of DEPTH blocks under way. A warp stages the part of x that it needs itself.

#define ROUNDS ((BLOCKS + WARPS - 1) / WARPS)

extern "C" __global__ void __launch_bounds__(32 * WARPS * GROUP, MIN_CTAS)
gemv(const uint4* __restrict__ values, const uint4* __restrict__ places, const u16* __restrict__ x,
     const u16* __restrict__ bias, u16* __restrict__ y, int) {
    __shared__ uint4 xs[GROUP * WARPS][ROUNDS][STEPS * 4];
    __shared__ float red[GROUP][WARPS][16];
    const int warp = threadIdx.x / 32 % WARPS, group = threadIdx.x / 32 / WARPS, lane = threadIdx.x % 32;
    const int q = lane / 4, t = lane % 4, tile = blockIdx.x * GROUP + group;
    let_next_start();

    uint4 a[DEPTH][STEPS], e[DEPTH];
    const size_t first = (size_t)(tile < TILES ? tile : TILES - 1) * BLOCKS + warp;
    auto fetch = [&](int slot, int r) {
        if (warp + r * WARPS < BLOCKS) {
            const uint4* block = values + (first + r * WARPS) * (BLOCK_VALUES / 16) + lane;
            e[slot] = load_once(places + (first + r * WARPS) * (BLOCK_PLACES / 16) + lane);
#pragma unroll
            for (int s = 0; s < STEPS; s++) a[slot][s] = load_once(block + s * 32);
        }
    };
#pragma unroll
    for (int r = 0; r < DEPTH && r < ROUNDS; r++) fetch(r, r);

    wait_for_previous();
    uint4(*mine)[STEPS * 4] = xs[group * WARPS + warp];
#pragma unroll
    for (int r = 0; r < ROUNDS; r++) {
        const int chunk = (warp + r * WARPS) * 32 + lane;  // 8 inputs a lane
        uint4 v = make_uint4(0, 0, 0, 0);
        if (chunk * 8 < COLUMNS) v = load_x(x + chunk * 8);
        u32* to = (u32*)mine[r] + lane / 4 * 16 + lane % 4;
        to[0] = v.x, to[4] = v.y, to[8] = v.z, to[12] = v.w;
    }
    __syncwarp();

    float d[2][4] = {};
#pragma unroll
    for (int r = 0; r < ROUNDS; r++) {
        if (warp + r * WARPS < BLOCKS) {
            const int slot = r % DEPTH;
            const u32 words[4] = {e[slot].x, e[slot].y, e[slot].z, e[slot].w};
#pragma unroll
            for (int s = 0; s < STEPS; s += 2) {
                multiply<0>(d[0], a[slot][s], mine[r][s * 4 + t], words[s / 2]);
                multiply<1>(d[1], a[slot][s + 1], mine[r][s * 4 + 4 + t], words[s / 2]);
            }
        }
        if (r + DEPTH < ROUNDS) fetch(r % DEPTH, r + DEPTH);
    }

    if (t == 0) red[group][warp][q] = d[0][0] + d[1][0], red[group][warp][q + 8] = d[0][2] + d[1][2];
    __syncthreads();
    const int o = threadIdx.x % 16, g = threadIdx.x / 16;
    if (g < GROUP && blockIdx.x * GROUP + g < TILES) {
        const int at = (blockIdx.x * GROUP + g) * 16 + o;
        float sum = bias ? load_bias(bias + at) : 0.0f;
#pragma unroll
        for (int w = 0; w < WARPS; w++) sum += red[g][w][o];
        y[at] = from_float(sum);
    }
}
