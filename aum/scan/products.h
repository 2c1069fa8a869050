/* Products of small matrices, and what grid_kernels.c and short_kernels.c share beside them. */
#pragma once
#include "vectors.h"

#define MAX_ROWS 16 /* of a kernel over a grid */
#define PRAGMA(text) _Pragma(#text)
#define EACH(n) PRAGMA(omp simd) for (int64_t i_ = 0; i_ < (n); i_++) /* nothing written in it is read in it elsewhere */

INLINE int64_t whole(int64_t n) { return (n + VL - 1) / VL * VL; }

INLINE void fold(const float *row, int64_t c, int64_t w, float *sums) { /* over the columns */
    for (int64_t j = 0; j < c; j++) {
        double total = 0;
        for (int64_t i = 0; i < w; i++) total += row[i * c + j];
        sums[j] = (float)total;
    }
}

static float *take(float **memory, int64_t floats) { /* VL more: vectors may reach beyond the last channel */
    float *block = *memory;
    *memory += whole(floats + VL);
    return block;
}

/* Compute all units, each thread with its own scratch. 0, or 1 where there is no memory. */
static int each_unit(const void *p, int64_t units, int64_t threads, int64_t floats,
                     void (*compute)(const void *p, int64_t unit, float *memory)) {
    int failed = 0;
#pragma omp parallel num_threads((int)threads) reduction(| : failed)
    {
        float *memory = scratch(floats / VL + 1);
        failed |= !memory;
        unsigned long old = flush_denormals();
#pragma omp for schedule(dynamic)
        for (int64_t unit = 0; unit < units; unit++)
            if (memory) compute(p, unit, memory);
        restore(old);
        free(memory);
    }
    return failed;
}

/* ---- products ---- */

/* P columns, V vectors of outputs: out (+)= sum over rows i and inputs q of in[i][column * step + q] * weight[i][q]. */
INLINE void block(const float *const *in, int64_t rows, int64_t inputs, int64_t step, const float *weight, int64_t o_pad,
                  const float *start, float *out, int64_t out_step, int64_t o, int add, const int P, const int V) {
    vf acc[12];
#pragma GCC unroll 12
    for (int k = 0; k < P * V; k++) acc[k] = start ? load(start, k % V * VL, (int)min64(VL, o - k % V * VL), 0) : splat(0.f);
    for (int64_t i = 0; i < rows; i++) {
        const float *x = in[i], *w = weight + i * inputs * o_pad;
        for (int64_t q = 0; q < inputs; q++, w += o_pad) {
            vf tap[2];
#pragma GCC unroll 2
            for (int v = 0; v < V; v++) tap[v] = load(w, v * VL, VL, 0);
#pragma GCC unroll 6
            for (int k = 0; k < P; k++) {
                vf value = splat(x[k * step + q]);
#pragma GCC unroll 2
                for (int v = 0; v < V; v++) acc[k * V + v] += value * tap[v];
            }
        }
    }
    vf done[12]; /* by way of memory: what follows has branches, and with them GCC keeps sums of the loop in memory */
#pragma GCC unroll 12
    for (int k = 0; k < P * V; k++) done[k] = acc[k];
    __asm__ volatile("" : : "r"(done) : "memory");
    for (int k = 0; k < P; k++)
        for (int v = 0; v < V; v++) {
            int lanes = (int)min64(VL, o - v * VL);
            float *to = out + k * out_step;
            vf y = done[k * V + v];
            if (lanes == VL) store(to, v * VL, add ? y + load(to, v * VL, VL, 0) : y, VL, 0);
            else store(to, v * VL, add ? y + load(to, v * VL, lanes, 0) : y, lanes, 0);
        }
}

INLINE void columns(const float *const *in, int64_t rows, int64_t inputs, int64_t step, const float *weight,
                    int64_t o_pad, const float *start, float *out, int64_t out_step, int64_t o, int64_t w, int add,
                    const int V) {
    const float *at[MAX_ROWS];
    for (int64_t i = 0; i < rows; i++) at[i] = in[i];
    for (int64_t column = 0; column < w; column += 6) {
#define CASE(P) \
    case P: block(at, rows, inputs, step, weight, o_pad, start, out + column * out_step, out_step, o, add, P, V); break;
        switch (min64(6, w - column)) {
            CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6)
        }
#undef CASE
        for (int64_t i = 0; i < rows; i++) at[i] += 6 * step;
    }
}

/* A row of outputs (w, o), o_pad of them calculated: out (+)= in * weight. */
static void product(const float *const *in, int64_t rows, int64_t inputs, int64_t step, const float *weight,
                    int64_t o_pad, const float *start, float *out, int64_t out_step, int64_t o, int64_t w, int add) {
    int64_t v = 0;
    for (; v + 2 * VL <= o_pad; v += 2 * VL)
        columns(in, rows, inputs, step, weight + v, o_pad, start ? start + v : 0, out + v, out_step, o - v, w, add, 2);
    for (; v < o_pad; v += VL)
        columns(in, rows, inputs, step, weight + v, o_pad, start ? start + v : 0, out + v, out_step, o - v, w, add, 1);
}

/* Q inputs, V vectors of outputs: dweight += sum over columns of in[column * step + q] * g[column]. */
INLINE void outer_block(const float *in, int64_t step, const float *g, int64_t o_pad, int64_t w, float *dweight,
                        const int Q, const int V) {
    vf acc[12];
#pragma GCC unroll 12
    for (int k = 0; k < Q * V; k++) acc[k] = load(dweight, k / V * o_pad + k % V * VL, VL, 0);
    for (int64_t column = 0; column < w; column++, in += step, g += o_pad) {
        vf dy[2];
#pragma GCC unroll 2
        for (int v = 0; v < V; v++) dy[v] = load(g, v * VL, VL, 0);
#pragma GCC unroll 6
        for (int k = 0; k < Q; k++) {
            vf value = splat(in[k]);
#pragma GCC unroll 2
            for (int v = 0; v < V; v++) acc[k * V + v] += value * dy[v];
        }
    }
#pragma GCC unroll 12
    for (int k = 0; k < Q * V; k++) store(dweight, k / V * o_pad + k % V * VL, acc[k], VL, 0);
}

static void outer(const float *in, int64_t inputs, int64_t step, const float *g, int64_t o_pad, int64_t w,
                  float *dweight) {
    for (int64_t q = 0; q < inputs; q += 6) {
        int64_t v = 0;
#define CASE(Q, V) \
    case Q: outer_block(in + q, step, g + v, o_pad, w, dweight + q * o_pad + v, Q, V); break;
        for (; v + 2 * VL <= o_pad; v += 2 * VL) switch (min64(6, inputs - q)) {
                CASE(1, 2) CASE(2, 2) CASE(3, 2) CASE(4, 2) CASE(5, 2) CASE(6, 2)
            }
        for (; v < o_pad; v += VL) switch (min64(6, inputs - q)) {
                CASE(1, 1) CASE(2, 1) CASE(3, 1) CASE(4, 1) CASE(5, 1) CASE(6, 1)
            }
#undef CASE
    }
}
