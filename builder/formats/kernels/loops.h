/* The loops of native.c for one instruction set: included with TARGET and NAME. Each is written for the compiler to
 * vectorize: a tile of weights that stays in the first cache goes through one simple loop after another.
 *
 * Floats are compared and rounded by their bits where that is exact; magnitudes order as integers, NaN above Inf.
 */

#define TILE 2048 /* weights: 8 kB as float32 */
#define BLOCKS (TILE / 16)
#define FLAGS TARGET __attribute__((noinline))

/* One function for each conversion: the switch is outside of the loops. */
#define BITS(x) NAME(bits)(x)
#define FLOAT(x) NAME(number)(x)

TARGET INLINE uint32_t NAME(bits)(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return bits;
}

TARGET INLINE float NAME(number)(uint32_t bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

/* float16 bits -> float32. Subnormal numbers: the mantissa counts 2^-24, the last bit of 0.5. */
TARGET INLINE float NAME(of_half)(uint16_t half) {
    uint32_t m = half & 0x7FFFu;
    uint32_t normal = (m << 13) + (112u << 23) + (m >= 0x7C00u ? 112u << 23 : 0);
    uint32_t small = BITS(FLOAT(0x3F000000u | m) - 0.5f);
    return FLOAT((m < 0x400u ? small : normal) | (uint32_t)(half & 0x8000u) << 16);
}

/* To the nearest BF16, ties to even; NaN stays NaN. The result has 16 zeros at its end. */
TARGET INLINE uint32_t NAME(to_bf16)(uint32_t x) {
    uint32_t even = (x + 0x7FFFu + ((x >> 16) & 1)) & 0xFFFF0000u;
    return (x & 0x7FFFFFFFu) > 0x7F800000u ? (x | 0x400000u) & 0xFFFF0000u : even;
}

/* To the bits of the nearest float16, ties to even: Inf from 65520 on. */
TARGET INLINE uint32_t NAME(to_half)(uint32_t x) {
    uint32_t a = x & 0x7FFFFFFFu;
    uint32_t normal = (a - (112u << 23) + 0xFFFu + ((a >> 13) & 1)) >> 13;
    uint32_t small = BITS(FLOAT(a) + 0.5f) - 0x3F000000u;
    uint32_t found = a < 0x38800000u ? small : normal;
    found = a >= 0x477FF000u ? 0x7C00u : found;
    found = a > 0x7F800000u ? 0x7E00u : found;
    return found | (x >> 16 & 0x8000u);
}

/* A magnitude of at most 448 -> the nearest E4M3, ties to even; NaN -> 0x7F. Below 2^-6 E4M3 counts 2^-9, the last bit
 * of 2^14. */
TARGET INLINE uint32_t NAME(to_e4m3)(float x) {
    uint32_t a = BITS(x);
    uint32_t normal = ((a + 0x7FFFFu + ((a >> 20) & 1)) >> 20) - (120u << 3);
    uint32_t small = BITS(x + 16384.0f) - 0x46800000u;
    uint32_t found = a < 0x3C800000u ? small : normal;
    return a > 0x7F800000u ? 0x7Fu : found;
}

TARGET INLINE float NAME(of_e4m3)(uint32_t code) {
    uint32_t m = code & 0x7Fu;
    uint32_t normal = m == 0x7Fu ? 0x7FC00000u : (m << 20) + (120u << 23);
    uint32_t small = BITS(FLOAT(0x46800000u | m) - 16384.0f);
    return FLOAT((m < 8 ? small : normal) | (code & 0x80u) << 24);
}

FLAGS static void NAME(load)(const void *restrict values, int type, int rounded, size_t count, float *restrict out) {
    const Half *restrict halves = values;
    if (type == BF16)
        for (size_t i = 0; i < count; i++)
            out[i] = FLOAT((uint32_t)halves[i] << 16);
    else if (type == F16)
        for (size_t i = 0; i < count; i++)
            out[i] = NAME(of_half)(halves[i]);
    else
        memcpy(out, values, count * 4);
    if (rounded == BF16)
        for (size_t i = 0; i < count; i++)
            out[i] = FLOAT(NAME(to_bf16)(BITS(out[i])));
    else if (rounded == F16)
        for (size_t i = 0; i < count; i++)
            out[i] = NAME(of_half)(NAME(to_half)(BITS(out[i])));
}

FLAGS static void NAME(store)(const float *restrict values, int type, size_t count, void *restrict out) {
    Half *restrict halves = out;
    if (type == BF16)
        for (size_t i = 0; i < count; i++)
            halves[i] = NAME(to_bf16)(BITS(values[i])) >> 16;
    else if (type == F16)
        for (size_t i = 0; i < count; i++)
            halves[i] = NAME(to_half)(BITS(values[i]));
    else
        memcpy(out, values, count * 4);
}

FLAGS static void NAME(largest_rows)(const void *restrict values, int type, int rounded, size_t rows, size_t each,
                                     float *restrict out) {
    for (size_t row = 0; row < rows; row++) {
        uint16_t half = 0;
        uint32_t whole = 0;
        if (type == F32) {
            const Word *restrict x = (const Word *)values + row * each;
            for (size_t i = 0; i < each; i++) {
                uint32_t a = x[i] & 0x7FFFFFFFu;
                whole = a > whole ? a : whole;
            }
        } else {
            const Half *restrict x = (const Half *)values + row * each;
            for (size_t i = 0; i < each; i++) {
                uint16_t a = x[i] & 0x7FFFu;
                half = a > half ? a : half;
            }
            whole = type == BF16 ? (uint32_t)half << 16 : BITS(NAME(of_half)(half));
        }
        whole = rounded == BF16 ? NAME(to_bf16)(whole) : whole;
        out[row] = rounded == F16 ? NAME(of_half)(NAME(to_half)(whole)) : FLOAT(whole);
    }
}

/* The largest magnitude of each block of 16, by halves: each pass compares neighbours. */
FLAGS static void NAME(block_largest)(const float *restrict values, size_t blocks, float *restrict out) {
    int32_t a[TILE / 2], b[TILE / 4], c[TILE / 8];
    for (size_t i = 0; i < blocks * 8; i++) {
        int32_t x = BITS(values[2 * i]) & 0x7FFFFFFFu, y = BITS(values[2 * i + 1]) & 0x7FFFFFFFu;
        a[i] = x > y ? x : y;
    }
    for (size_t i = 0; i < blocks * 4; i++)
        b[i] = a[2 * i] > a[2 * i + 1] ? a[2 * i] : a[2 * i + 1];
    for (size_t i = 0; i < blocks * 2; i++)
        c[i] = b[2 * i] > b[2 * i + 1] ? b[2 * i] : b[2 * i + 1];
    for (size_t i = 0; i < blocks; i++)
        out[i] = FLOAT(c[2 * i] > c[2 * i + 1] ? c[2 * i] : c[2 * i + 1]);
}

/* In place: largest magnitude -> what the block's weights are divided by. */
FLAGS static void NAME(block_scales)(float *restrict factors, size_t blocks, float scale, uint8_t *restrict codes) {
    float six = 6.0f * scale;
    for (size_t i = 0; i < blocks; i++) {
        float s = factors[i] / six;
        s = s == 0.0f ? 1.0f : s;
        s = s < 0x1p-9f ? 0x1p-9f : s;
        s = s > 448.0f ? 448.0f : s;
        uint32_t code = NAME(to_e4m3)(s);
        codes[i] = code;
        factors[i] = NAME(of_e4m3)(code) * scale;
    }
}

/* Each factor 16 times, so that one loop over all weights reads them. */
FLAGS static void NAME(widen)(const float *restrict factors, size_t blocks, float *restrict out) {
    for (size_t block = 0; block < blocks; block++)
        for (size_t i = 0; i < 16; i++)
            out[16 * block + i] = factors[block];
}

/* float32 -> E2M1, one code in each byte. Where its numbers are 2^e apart, adding 2^(e+23) rounds to them, ties to even,
 * and leaves their number in the last bits. e is -1, 0 and 1 for magnitudes below 2, 4 and 8. */
TARGET INLINE int32_t NAME(to_e2m1)(float x) {
    int32_t a = BITS(x) & 0x7FFFFFFFu, exponent = a & 0x7F800000;
    exponent = exponent < 0x3F800000 ? 0x3F800000 : exponent;
    exponent = exponent > 0x40800000 ? 0x40800000 : exponent;
    int32_t magic = exponent + (22 << 23);
    int32_t steps = (int32_t)BITS(FLOAT(a) + FLOAT(magic)) - magic;
    int32_t code = steps + ((exponent - 0x3F800000) >> 22);
    return code < 7 ? code : 7; /* NaN too */
}

FLAGS static void NAME(encode)(const float *restrict values, const float *restrict factors, size_t count,
                               uint8_t *restrict codes) {
    for (size_t i = 0; i < count; i++) {
        float x = values[i] / factors[i];
        codes[i] = NAME(to_e2m1)(x) | (x < 0.0f ? 8 : 0);
    }
}

FLAGS static void NAME(join)(const uint8_t *restrict codes, size_t count, uint8_t *restrict out) {
    for (size_t i = 0; i < count; i++)
        out[i] = codes[2 * i] | codes[2 * i + 1] << 4;
}

#include "search.h"

FLAGS static void NAME(pack_nvfp4)(const void *values, int type, int rounded, size_t blocks, float scale, int searched,
                                   uint8_t *codes, uint8_t *scales) {
    float tile[TILE], wide[TILE], factors[BLOCKS];
    uint8_t single[TILE];
    for (size_t done = 0; done < blocks; done += BLOCKS) {
        size_t now = blocks - done < BLOCKS ? blocks - done : BLOCKS;
        NAME(load)((const char *)values + done * 16 * size_of(type), type, rounded, now * 16, tile);
        if (searched) {
            NAME(search_scales)(tile, now, scale, scales + done, factors);
        } else {
            NAME(block_largest)(tile, now, factors);
            NAME(block_scales)(factors, now, scale, scales + done);
        }
        NAME(widen)(factors, now, wide);
        NAME(encode)(tile, wide, now * 16, single);
        NAME(join)(single, now * 8, codes + done * 8);
    }
}

FLAGS static void NAME(encode_fp8)(const float *restrict values, float scale, size_t count, uint8_t *restrict codes) {
    for (size_t i = 0; i < count; i++) {
        float x = values[i] / scale;
        float a = FLOAT(BITS(x) & 0x7FFFFFFFu);
        a = a > 448.0f ? 448.0f : a;
        codes[i] = NAME(to_e4m3)(a) | (BITS(x) >> 24 & 0x80u);
    }
}

FLAGS static void NAME(pack_fp8)(const void *values, int type, int rounded, size_t rows, size_t each,
                                 const float *scales, size_t stride, uint8_t *codes) {
    float tile[TILE];
    for (size_t row = 0; row < rows; row++) {
        float scale = scales[row * stride] > 0.0f ? scales[row * stride] : 1.0f;
        for (size_t done = 0; done < each; done += TILE) {
            size_t now = each - done < TILE ? each - done : TILE, at = row * each + done;
            NAME(load)((const char *)values + at * size_of(type), type, rounded, now, tile);
            NAME(encode_fp8)(tile, scale, now, codes + at);
        }
    }
}

/* Adding 1.5 * 2^23 rounds to a whole number, ties to even, and leaves its two's complement in the last bits. */
FLAGS static void NAME(encode_int8)(const float *restrict values, float scale, uint8_t sign, size_t count,
                                    uint8_t *restrict codes) {
    for (size_t i = 0; i < count; i++) {
        float x = values[i] / scale;
        x = x > 127.0f ? 127.0f : x;
        x = x < -128.0f ? -128.0f : x;
        codes[i] = (uint8_t)BITS(x + 12582912.0f) ^ sign;
    }
}

FLAGS static void NAME(pack_int8)(const void *values, int type, int rounded, size_t rows, size_t each,
                                  const float *scales, uint8_t sign, uint8_t *codes) {
    float tile[TILE];
    for (size_t row = 0; row < rows; row++)
        for (size_t done = 0; done < each; done += TILE) {
            size_t now = each - done < TILE ? each - done : TILE, at = row * each + done;
            NAME(load)((const char *)values + at * size_of(type), type, rounded, now, tile);
            NAME(encode_int8)(tile, scales[row], sign, now, codes + at);
        }
}

/* One code in each byte -> its value. */
FLAGS static void NAME(decode)(const uint8_t *restrict codes, const float *restrict factors, size_t count,
                               float *restrict values) {
    for (size_t i = 0; i < count; i++) {
        uint32_t m = codes[i] & 7u;
        uint32_t large = (m << 22) + (126u << 23), small = m ? 0x3F000000u : 0;
        values[i] = FLOAT((m < 2 ? small : large) | (codes[i] & 8u) << 28) * factors[i];
    }
}

FLAGS static void NAME(split)(const uint8_t *restrict codes, size_t count, uint8_t *restrict out) {
    for (size_t i = 0; i < count; i++) {
        out[2 * i] = codes[i] & 15;
        out[2 * i + 1] = codes[i] >> 4;
    }
}

FLAGS static void NAME(unpack_nvfp4)(const uint8_t *codes, const uint8_t *scales, float scale, size_t blocks, int type,
                                     void *values) {
    float tile[TILE], wide[TILE], factors[BLOCKS];
    uint8_t single[TILE];
    for (size_t done = 0; done < blocks; done += BLOCKS) {
        size_t now = blocks - done < BLOCKS ? blocks - done : BLOCKS;
        for (size_t i = 0; i < now; i++)
            factors[i] = NAME(of_e4m3)(scales[done + i]) * scale;
        NAME(split)(codes + done * 8, now * 8, single);
        NAME(widen)(factors, now, wide);
        NAME(decode)(single, wide, now * 16, tile);
        NAME(store)(tile, type, now * 16, (char *)values + done * 16 * size_of(type));
    }
}

FLAGS static void NAME(decode_fp8)(const uint8_t *restrict codes, float factor, size_t count, float *restrict values) {
    for (size_t i = 0; i < count; i++)
        values[i] = NAME(of_e4m3)(codes[i]) * factor;
}

FLAGS static void NAME(unpack_fp8)(const uint8_t *codes, size_t rows, size_t each, const float *scales, size_t stride,
                                   int type, void *values) {
    float tile[TILE];
    for (size_t row = 0; row < rows; row++) {
        /* torch computes 448 / x as 1 / x * 448 (Tensor.__rtruediv__). */
        float up = 1.0f / (scales[row * stride] * 448.0f) * 448.0f, factor = 1.0f / up;
        for (size_t done = 0; done < each; done += TILE) {
            size_t now = each - done < TILE ? each - done : TILE, at = row * each + done;
            NAME(decode_fp8)(codes + at, factor, now, tile);
            NAME(store)(tile, type, now, (char *)values + at * size_of(type));
        }
    }
}

#undef TILE
#undef BLOCKS
#undef FLAGS
#undef BITS
#undef FLOAT
