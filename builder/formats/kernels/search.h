/* The NVFP4 block scales with the least squared error: included by loops.h. builder/formats/arithmetic/nvfp4_search.py
 * says which scales are tried and why no other can win.
 *
 * A block in each lane: 16 blocks are searched side by side, each from its own first scale downward, until none of them
 * can improve. All is in units of the global scale, so the multiples of a scale are exact. A lane that is finished goes
 * on without effect: its clipped magnitude alone costs more than its best.
 */

#define LANES 16

/* The E2M1 multiple of a scale that is nearest to a magnitude of `times` scales. The magic number is that of to_e2m1. */
TARGET INLINE float NAME(nearest)(float times) {
    int32_t exponent = BITS(times) & 0x7F800000;
    exponent = exponent < 0x3F800000 ? 0x3F800000 : exponent;
    exponent = exponent > 0x40800000 ? 0x40800000 : exponent;
    float magic = FLOAT(exponent + (22 << 23));
    float near = (times + magic) - magic;
    return near < 6.0f ? near : 6.0f;
}

/* sizes: magnitudes [16][LANES], those of a block below each other. In place: codes of the first scales -> of the best. */
FLAGS static void NAME(search_lanes)(const float *restrict sizes, const float *restrict largest, int32_t *restrict codes) {
    float best[LANES], scales[LANES], factors[LANES];
    int32_t first[LANES];
    for (size_t b = 0; b < LANES; b++) {
        best[b] = __builtin_inff();
        first[b] = codes[b];
    }
    for (int32_t step = 0; step < 126; step++) {
        int32_t any = 0;
        for (size_t b = 0; b < LANES; b++) {
            int32_t code = first[b] - step;
            scales[b] = NAME(of_e4m3)(code > 0 ? code : 1);
            factors[b] = 1.0f / scales[b];
            float clipped = largest[b] - 6.0f * scales[b];
            int32_t finished = (code < 1) | ((clipped > 0.0f) & (clipped * clipped > best[b]));
            any |= finished ^ 1;
        }
        if (!any)
            return;
        for (size_t b = 0; b < LANES; b++) {
            float total = 0.0f, error;
            int32_t code = first[b] - step;
/* Written out: the loop over lanes is the one to vectorize. */
#define ADD(i)                                                                                              \
    error = sizes[i * LANES + b] - NAME(nearest)(sizes[i * LANES + b] * factors[b]) * scales[b];            \
    total += error * error;
            ADD(0) ADD(1) ADD(2) ADD(3) ADD(4) ADD(5) ADD(6) ADD(7)
            ADD(8) ADD(9) ADD(10) ADD(11) ADD(12) ADD(13) ADD(14) ADD(15)
#undef ADD
            int32_t better = (total <= best[b]) & (total < __builtin_inff());
            best[b] = better ? total : best[b];
            codes[b] = better ? (code > 0 ? code : 1) : codes[b];
        }
    }
}

/* values [blocks][16] -> codes of the block scales, and what the blocks' weights are divided by. */
FLAGS static void NAME(search_scales)(const float *restrict values, size_t blocks, float scale,
                                      uint8_t *restrict codes, float *restrict factors) {
    float rows[LANES * 16], sizes[16 * LANES], largest[LANES];
    int32_t found[LANES];
    for (size_t done = 0; done < blocks; done += LANES) {
        size_t now = blocks - done < LANES ? blocks - done : LANES;
        memset(rows, 0, sizeof rows);
        for (size_t i = 0; i < now * 16; i++)
            rows[i] = FLOAT(BITS(values[done * 16 + i]) & 0x7FFFFFFFu) / scale;
        for (size_t i = 0; i < 16; i++)
            for (size_t b = 0; b < LANES; b++)
                sizes[i * LANES + b] = rows[b * 16 + i];
        NAME(block_largest)(rows, LANES, largest);
        for (size_t b = 0; b < LANES; b++) {
            float most = largest[b] / 3.5f;
            int32_t code = NAME(to_e4m3)(most > 448.0f ? 448.0f : most);
            code = code < 15 ? 15 : code;
            found[b] = code > 126 ? 126 : code;
        }
        NAME(search_lanes)(sizes, largest, found);
        for (size_t b = 0; b < now; b++) {
            codes[done + b] = found[b];
            factors[done + b] = NAME(of_e4m3)(found[b]) * scale;
        }
    }
}

#undef LANES
