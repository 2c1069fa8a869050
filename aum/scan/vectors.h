/* Vectors of floats, their nonlinear functions, and how work is cut into units: for all kernels. */
#pragma once
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define VL 16
#elif defined(__AVX__)
#define VL 8
#else
#define VL 4
#endif
#define MAX_TAPS 32 /* of a causal convolution */
#define NB 4 /* states held in registers at a time; n is padded to a multiple of it */

#define INLINE static inline __attribute__((always_inline))
typedef float vf __attribute__((vector_size(4 * VL)));
typedef int32_t vi __attribute__((vector_size(4 * VL)));
typedef uint32_t vu __attribute__((vector_size(4 * VL)));
typedef uint16_t vh __attribute__((vector_size(2 * VL)));

static const float LOG2E = 1.4426950408889634f, LN2 = 0.6931471805599453f;

/* ---- vectors ---------------------------------------------------------------------------------------------------- */

INLINE vf splat(float x) { return x - (vf){0}; }

INLINE vf pick(vi mask, vf yes, vf no) { return (vf)((mask & (vi)yes) | (~mask & (vi)no)); }

INLINE float widen(uint16_t x) {
    uint32_t bits = (uint32_t)x << 16;
    float y;
    memcpy(&y, &bits, 4);
    return y;
}

INLINE uint16_t narrow(float x) { /* to bfloat16, round to nearest even */
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return x != x ? 0x7fc0 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

/* `lanes` values from index `at` on, float32 or (half) bfloat16; the lanes beyond are 0. */
INLINE vf load(const void *base, int64_t at, int lanes, int half) {
    vf x = {0};
    if (half) {
        const uint16_t *p = (const uint16_t *)base + at;
        vh y = {0};
        if (lanes == VL) memcpy(&y, p, sizeof y);
        else for (int i = 0; i < lanes; i++) y[i] = p[i];
        x = (vf)(__builtin_convertvector(y, vu) << 16);
    } else {
        const float *p = (const float *)base + at;
        if (lanes == VL) memcpy(&x, p, sizeof x);
        else for (int i = 0; i < lanes; i++) x[i] = p[i];
    }
    return x;
}

INLINE void store(void *base, int64_t at, vf x, int lanes, int half) {
    if (half) {
        uint16_t *p = (uint16_t *)base + at;
        if (lanes == VL) {
            vu bits = (vu)x;
            bits = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
            vi nan = (vi)(x != x);
            vh y = __builtin_convertvector((vu)((nan & 0x7fc0) | (~nan & (vi)bits)), vh);
            memcpy(p, &y, sizeof y);
        } else for (int i = 0; i < lanes; i++) p[i] = narrow(x[i]);
    } else {
        float *p = (float *)base + at;
        if (lanes == VL) memcpy(p, &x, sizeof x);
        else for (int i = 0; i < lanes; i++) p[i] = x[i];
    }
}

/* Neighbouring tiles of a step are neighbouring cache lines, but a tile's steps are pages apart, where no hardware
 * prefetcher follows. So while one tile is computed, the rows of the next are asked for, one a step. */
INLINE void ask_for_line(const char *address) { __builtin_prefetch(address, 0, 2); }

INLINE float load1(const void *base, int64_t at, int half) {
    return half ? widen(((const uint16_t *)base)[at]) : ((const float *)base)[at];
}

INLINE float sum(vf x) {
    float y = 0;
    for (int i = 0; i < VL; i++) y += x[i];
    return y;
}

/* 2^x to 2e-7. Beyond float32's range: 0 (or 1e-38) and infinity. NaN stays. */
#if defined(__AVX512F__)
static const float POWERS[32] __attribute__((aligned(64))) = { /* 2^(j/32) */
    1.f, 1.02189715f, 1.04427378f, 1.0671404f, 1.09050773f, 1.11438674f, 1.13878863f, 1.16372486f,
    1.18920712f, 1.21524736f, 1.24185781f, 1.26905096f, 1.29683955f, 1.32523664f, 1.35425555f, 1.38390988f,
    1.41421356f, 1.44518081f, 1.47682615f, 1.50916443f, 1.54221083f, 1.57598085f, 1.61049033f, 1.64575548f,
    1.68179283f, 1.7186193f, 1.75625216f, 1.79470908f, 1.83400809f, 1.87416763f, 1.91520656f, 1.95714412f};

/* x is rounded to 32nds, whose powers are in two registers; the rest, within 1/64, needs but two terms (minimax for the
 * relative error: 5.3e-8). The scan is bound by multiplications, and this needs few. */
INLINE vf exp2v(vf x) {
    vf shifted = x + 393216.f; /* 1.5 * 2^18: its last five bits are now the number of 32nds */
    vf whole = shifted - 393216.f, f = x - whole;
    vf power = (vf)_mm512_permutex2var_ps(_mm512_load_ps(POWERS), (__m512i)shifted, _mm512_load_ps(POWERS + 16));
    vf p = f * (0.240226507f * f + 0.693157344f);
    return (vf)_mm512_scalef_ps((__m512)(p * power + power), (__m512)whole); /* times 2^floor(whole) */
}
#else
/* x is split into its nearest integer and a rest within 1/2, whose power is a polynomial of degree 5 (minimax for the
 * relative error among those with p(0) = 1: 9.1e-8). */
INLINE vf exp2v(vf x) {
#if defined(__AVX__)
    x = (vf)_mm256_max_ps(_mm256_set1_ps(-126.f), _mm256_min_ps(_mm256_set1_ps(128.f), (__m256)x));
#else
    x = pick(x < -126.f, splat(-126.f), pick(x > 128.f, splat(128.f), x));
#endif
    vf shifted = x + 12582912.f; /* 1.5 * 2^23: its last bits are now the nearest integer */
    vf f = x - (shifted - 12582912.f);
    vf p = 1.3264727247e-3f * f + 9.6715126882e-3f;
    p = p * f + 5.5507337436e-2f;
    p = p * f + 2.4022242085e-1f;
    p = p * f + 6.9314697760e-1f;
    p = p * f + 1.0f;
    return p * (vf)(((vi)shifted + 127) << 23);
}
#endif

/* exp(-|x|) gives both of these without overflow and without cancellation. */
INLINE vf exp_minus_abs(vf x) { return exp2v((vf)((vu)x | 0x80000000u) * LOG2E); }

/* y / x, x in 1 ... 3, to the last bit or two */
INLINE vf ratio(vf y, vf x) {
#if defined(__AVX512F__)
    vf r = (vf)_mm512_rcp14_ps((__m512)x);
    return y * (r * (2.f - x * r));
#else
    return y / x;
#endif
}

INLINE vf sigmoid_of(vf x, vf e) { return ratio(pick(x >= 0.f, splat(1.f), e), 1.f + e); }

INLINE vf sigmoid(vf x) { return sigmoid_of(x, exp_minus_abs(x)); }

/* max(x, 0) + log(1 + e), the logarithm as 2 atanh(e / (2 + e)): exact for small e too */
INLINE vf softplus_of(vf x, vf e) {
    vf r = ratio(e, 2.f + e), q = r * r;
    vf p = 1.4089167702e-1f * q + 1.3980301364e-1f; /* minimax for atanh(r) / r, q = r^2 up to 1/9: 4e-9 */
    p = p * q + 2.0012455138e-1f;
    p = p * q + 3.3333157341e-1f;
    p = p * q + 1.f;
    return pick(x < 0.f, splat(0.f), x) + 2.f * r * p;
}

/* Decays reach the denormal numbers, with which some processors calculate a hundred times slower: here they are 0. */
#if defined(__x86_64__)
INLINE unsigned flush_denormals(void) {
    unsigned old = _mm_getcsr();
    _mm_setcsr(old | 0x8040);
    return old;
}
INLINE void restore(unsigned old) { _mm_setcsr(old); }
#elif defined(__aarch64__)
INLINE uint64_t flush_denormals(void) {
    uint64_t old;
    __asm__ volatile("mrs %0, fpcr" : "=r"(old));
    __asm__ volatile("msr fpcr, %0" ::"r"(old | (1u << 24)));
    return old;
}
INLINE void restore(uint64_t old) { __asm__ volatile("msr fpcr, %0" ::"r"(old)); }
#else
INLINE int flush_denormals(void) { return 0; }
INLINE void restore(int old) { (void)old; }
#endif

/* ---- how work is cut -------------------------------------------------------------------------------------------- */

static void *scratch(int64_t vectors) { return aligned_alloc(64, (vectors * (int64_t)sizeof(vf) / 64 + 1) * 64); }

INLINE int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }

/* Piece `i` of `pieces` of `whole`: from *start on, its size returned. */
INLINE int64_t piece(int64_t whole, int64_t pieces, int64_t i, int64_t *start) {
    *start = whole * i / pieces;
    return whole * (i + 1) / pieces - *start;
}

/* Piece `i` of `pieces` of `channels`, cut between tiles: from *start on, its size returned. */
INLINE int64_t channel_piece(int64_t channels, int64_t pieces, int64_t i, int64_t *start) {
    int64_t tiles = piece((channels + VL - 1) / VL, pieces, i, start);
    *start *= VL;
    return min64(tiles * VL, channels - *start);
}
