/* The mixer between its outer projections for short sequences, forward and backward: all of it for one sequence after the
 * other, in the caches. The backward pass calculates the forward values again, so that nothing but the input is kept.
 * Called by cpu_kernels.py. The channels are whole vectors.
 *
 * Axes: k branches, b sequences, l steps, d channels, n states, r dt_rank, w taps, q = r + 2 n inner projections. Rows
 * are steps in scan order, (l, d): branch 1 runs from the last step to the first. All is float32.
 */
#include "products.h"

typedef struct {
    int64_t k, b, l, d, n, r, w, q_pad, r_pad, pieces, threads, xz_b, xz_l;
    float scale;
    const float *xz;                                 /* (b, l, 2 d): x first, the gate z last */
    const float *conv, *conv_bias;                   /* (k, w, d), (k, d) */
    const float *in_q, *q_out, *dt, *dt_out;         /* (k, d, q_pad); (k, q, d); (k, r, d); (k, d, r_pad) */
    const float *bias, *A, *D;                       /* (k, d); (k, n, d), times log2(e); (k, d) */
    float *y;                                        /* (b, l, d) */
    const float *dy;
    float *dxz, *dconv, *dq, *ddt, *dA;              /* (b, l, 2 d); (pieces, k, w + 1, d), the bias last; (pieces, k, q, d); */
    float *dD_bias;                                  /* (pieces, k, r, d); (pieces, k, n, d); (pieces, k, 2, d) */
} Short;

typedef struct { /* the rows of one branch */
    float *before, *u, *p, *delta, *slope; /* before SiLU; after; inner projections (l, q_pad); after softplus; its slope */
} Rows;

/* Row of the input for step `i` of a branch. */
INLINE int64_t when(const Short *p, int64_t k, int64_t i) { return k ? p->l - 1 - i : i; }

INLINE vf at(const float *x, int64_t i) { return load(x, i, VL, 0); }

INLINE void put(float *x, int64_t i, vf value) { store(x, i, value, VL, 0); }

/* The causal convolution of a tile of channels. */
INLINE void causal(const Short *p, int64_t k, const float *xz, const float *conv, int64_t c, float *out, const int64_t w) {
    vf window[MAX_TAPS], tap[MAX_TAPS], bias = at(p->conv_bias, k * p->d + c);
#pragma GCC unroll 4
    for (int64_t j = 0; j < w; j++) tap[j] = at(conv, j * p->d + c), window[j] = splat(0.f);
    for (int64_t i = 0; i < p->l; i++) {
#pragma GCC unroll 4
        for (int64_t j = 0; j + 1 < w; j++) window[j] = window[j + 1];
        window[w - 1] = at(xz, when(p, k, i) * p->xz_l + c);
        vf y = bias;
#pragma GCC unroll 4
        for (int64_t j = 0; j < w; j++) y += tap[j] * window[j];
        put(out, i * p->d + c, y);
    }
}

/* Its backward pass: g (l, d), the gradient of its output, to dx, added to it for branch 1, and to dconv (w + 1, d). */
INLINE void causal_backward(const Short *p, int64_t k, const float *xz, const float *conv, int64_t c, const float *g,
                            float *dx, float *dconv, const int64_t w) {
    vf window[MAX_TAPS], ahead[MAX_TAPS], tap[MAX_TAPS], dtap[MAX_TAPS], sum_bias = at(dconv, w * p->d + c);
#pragma GCC unroll 4
    for (int64_t j = 0; j < w; j++) {
        tap[j] = at(conv, j * p->d + c), dtap[j] = at(dconv, j * p->d + c), window[j] = splat(0.f);
        ahead[j] = j && j <= p->l ? at(g, (j - 1) * p->d + c) : splat(0.f); /* moved on before it is used */
    }
    for (int64_t i = 0; i < p->l; i++) {
#pragma GCC unroll 4
        for (int64_t j = 0; j + 1 < w; j++) window[j] = window[j + 1], ahead[j] = ahead[j + 1];
        int64_t t = when(p, k, i);
        window[w - 1] = at(xz, t * p->xz_l + c);
        ahead[w - 1] = i + w - 1 < p->l ? at(g, (i + w - 1) * p->d + c) : splat(0.f);
        vf sum = k ? at(dx, t * 2 * p->d + c) : splat(0.f);
#pragma GCC unroll 4
        for (int64_t j = 0; j < w; j++) {
            dtap[j] += ahead[0] * window[j];
            sum += tap[w - 1 - j] * ahead[j];
        }
        sum_bias += ahead[0];
        put(dx, t * 2 * p->d + c, sum);
    }
#pragma GCC unroll 4
    for (int64_t j = 0; j < w; j++) put(dconv, j * p->d + c, dtap[j]);
    put(dconv, w * p->d + c, sum_bias);
}

static void branch_rows(const Short *p, int64_t k, const float *xz, Rows *rows, const int backward) {
    const int64_t l = p->l, d = p->d;
    const float *conv = p->conv + k * p->w * d, *dt = p->dt + k * p->r * d;
    for (int64_t c = 0; c < d; c += VL)
        if (p->w == 4) causal(p, k, xz, conv, c, rows->before, 4);
        else causal(p, k, xz, conv, c, rows->before, p->w);
    for (int64_t c = 0; c < l * d; c += VL) {
        vf x = at(rows->before, c);
        put(rows->u, c, x * sigmoid(x));
    }
    const float *u = rows->u;
    product(&u, 1, d, d, p->in_q + k * d * p->q_pad, p->q_pad, 0, rows->p, p->q_pad, p->q_pad, l, 0);
    for (int64_t c = 0; c < d; c += VL) {
        vf bias = at(p->bias, k * d + c), first = at(dt, c);
        for (int64_t i = 0; i < l; i++) {
            const float *rank = rows->p + i * p->q_pad;
            vf raw = bias + splat(rank[0]) * first;
            for (int64_t j = 1; j < p->r; j++) raw += splat(rank[j]) * at(dt, j * d + c);
            put(rows->delta, i * d + c, raw);
        }
    }
    for (int64_t c = 0; c < l * d; c += VL) {
        vf raw = at(rows->delta, c), e = exp_minus_abs(raw);
        put(rows->delta, c, softplus_of(raw, e));
        if (backward) put(rows->slope, c, sigmoid_of(raw, e));
    }
}

/* States n ... n + count (at most NB) of a tile of channels: their decays (l, NB), and the states themselves (l + 1, NB),
 * the first of them 0. Their outputs are added to y. */
INLINE void tile_states(const Short *p, int64_t k, const Rows *rows, int64_t c, int64_t n, vf *decays, vf *states, vf *y) {
    const int64_t l = p->l, d = p->d;
    int64_t count = min64(NB, p->n - n);
    vf A[NB], H[NB];
#pragma GCC unroll 4
    for (int m = 0; m < NB; m++)
        A[m] = m < count ? at(p->A, (k * p->n + n + m) * d + c) : splat(0.f), H[m] = states[m] = splat(0.f);
    for (int64_t i = 0; i < l; i++) {
        vf delta = at(rows->delta, i * d + c);
#pragma GCC unroll 4
        for (int m = 0; m < NB; m++) decays[i * NB + m] = exp2v(delta * A[m]);
    }
    for (int64_t i = 0; i < l; i++) {
        const float *B = rows->p + i * p->q_pad + p->r + n, *C = B + p->n;
        vf delta_u = at(rows->delta, i * d + c) * at(rows->u, i * d + c), out = y[i];
#pragma GCC unroll 4
        for (int m = 0; m < NB; m++) {
            if (m >= count) break;
            H[m] = decays[i * NB + m] * H[m] + delta_u * B[m];
            states[(i + 1) * NB + m] = H[m];
            out += H[m] * C[m];
        }
        y[i] = out;
    }
}

static Rows take_rows(const Short *p, float **memory) {
    int64_t n = p->l * p->d;
    Rows rows = {take(memory, n), take(memory, n), take(memory, p->l * p->q_pad), take(memory, n), take(memory, n)};
    return rows;
}

static void forward_unit(const void *arguments, int64_t unit, float *memory) {
    const Short *p = arguments;
    int64_t b0, count = piece(p->b, p->pieces, unit, &b0), l = p->l, d = p->d;
    Rows rows = take_rows(p, &memory);
    float *total = take(&memory, l * d);
    vf *decays = (vf *)take(&memory, l * NB * VL), *states = (vf *)take(&memory, (l + 1) * NB * VL);
    vf *y = (vf *)take(&memory, l * VL);
    for (int64_t b = b0; b < b0 + count; b++) {
        const float *xz = p->xz + b * p->xz_b;
        for (int64_t k = 0; k < p->k; k++) {
            branch_rows(p, k, xz, &rows, 0);
            for (int64_t c = 0; c < d; c += VL) {
                vf D = at(p->D, k * d + c);
                for (int64_t i = 0; i < l; i++) y[i] = D * at(rows.u, i * d + c);
                for (int64_t n = 0; n < p->n; n += NB) tile_states(p, k, &rows, c, n, decays, states, y);
                for (int64_t i = 0; i < l; i++) {
                    int64_t to = when(p, k, i) * d + c;
                    put(total, to, k ? y[i] + at(total, to) : y[i]);
                }
            }
        }
        for (int64_t i = 0; i < l; i++)
            for (int64_t c = 0; c < d; c += VL) {
                vf z = at(xz, i * p->xz_l + d + c);
                put(p->y, (b * l + i) * d + c, p->scale * at(total, i * d + c) * (z * sigmoid(z)));
            }
    }
}

static void backward_unit(const void *arguments, int64_t unit, float *memory) {
    const Short *p = arguments;
    const int64_t l = p->l, d = p->d, q = p->r + 2 * p->n;
    int64_t b0, count = piece(p->b, p->pieces, unit, &b0);
    Rows rows = take_rows(p, &memory);
    float *total = take(&memory, l * d), *dscan = take(&memory, l * d); /* of both branches, in time */
    float *du = take(&memory, l * d), *ddelta = take(&memory, l * d), *dp = take(&memory, l * p->q_pad);
    float *ranks = take(&memory, l * p->r_pad);
    vf *decays = (vf *)take(&memory, l * NB * VL), *states = (vf *)take(&memory, (l + 1) * NB * VL);
    vf *y = (vf *)take(&memory, l * VL), *sums = (vf *)take(&memory, l * 2 * p->n * VL); /* of dB and dC */
    vf *ddelta_u = (vf *)take(&memory, l * VL), *dexponent = (vf *)take(&memory, l * VL);
    for (int64_t b = b0; b < b0 + count; b++) {
        const float *xz = p->xz + b * p->xz_b;
        float *dxz = p->dxz + b * l * 2 * d;
        for (int64_t i = 0; i < l; i++)
            for (int64_t c = 0; c < d; c += VL) {
                vf z = at(xz, i * p->xz_l + d + c);
                put(dscan, i * d + c, p->scale * at(p->dy, (b * l + i) * d + c) * (z * sigmoid(z)));
            }
        for (int64_t k = 0; k < p->k; k++) {
            branch_rows(p, k, xz, &rows, 1);
            float *dD = p->dD_bias + (unit * p->k + k) * 2 * d, *dbias = dD + d;
            memset(sums, 0, l * 2 * p->n * sizeof(vf));
            for (int64_t c = 0; c < d; c += VL) {
                vf D = at(p->D, k * d + c), sum_D = at(dD, c), sum_bias = at(dbias, c);
                for (int64_t i = 0; i < l; i++) {
                    y[i] = D * at(rows.u, i * d + c);
                    ddelta_u[i] = dexponent[i] = splat(0.f);
                }
                for (int64_t n = 0; n < p->n; n += NB) {
                    int64_t states_here = min64(NB, p->n - n);
                    tile_states(p, k, &rows, c, n, decays, states, y);
                    float *dA = p->dA + ((unit * p->k + k) * p->n + n) * d + c;
                    vf G[NB], A[NB], sum_A[NB];
#pragma GCC unroll 4
                    for (int m = 0; m < NB; m++) {
                        G[m] = splat(0.f);
                        A[m] = m < states_here ? at(p->A, (k * p->n + n + m) * d + c) : splat(0.f);
                        sum_A[m] = m < states_here ? at(dA, m * d) : splat(0.f);
                    }
                    for (int64_t i = l - 1; i >= 0; i--) { /* as scan_states_backward of cpu_kernels.c */
                        const float *B = rows.p + i * p->q_pad + p->r + n, *C = B + p->n;
                        vf delta = at(rows.delta, i * d + c), delta_u = delta * at(rows.u, i * d + c);
                        vf dy = at(dscan, when(p, k, i) * d + c), g_u = ddelta_u[i], g_e = dexponent[i];
                        vf *dB = sums + i * 2 * p->n + n, *dC = dB + p->n;
#pragma GCC unroll 4
                        for (int m = 0; m < NB; m++) {
                            if (m >= states_here) break;
                            vf g = G[m] + dy * C[m];
                            dC[m] += dy * states[(i + 1) * NB + m];
                            dB[m] += g * delta_u;
                            g_u += g * B[m];
                            G[m] = g * decays[i * NB + m];
                            vf e = G[m] * states[i * NB + m];
                            g_e += e * A[m];
                            sum_A[m] += e * delta;
                        }
                        ddelta_u[i] = g_u;
                        dexponent[i] = g_e;
                    }
                    for (int m = 0; m < states_here; m++) put(dA, m * d, sum_A[m]);
                }
                for (int64_t i = 0; i < l; i++) {
                    int64_t here = i * d + c, to = when(p, k, i) * d + c;
                    vf u = at(rows.u, here), dy = at(dscan, to);
                    vf g = (dexponent[i] * LN2 + ddelta_u[i] * u) * at(rows.slope, here);
                    sum_bias += g;
                    sum_D += dy * u;
                    put(ddelta, here, g);
                    put(du, here, ddelta_u[i] * at(rows.delta, here) + D * dy);
                    put(total, to, k ? y[i] + at(total, to) : y[i]);
                }
                put(dD, c, sum_D);
                put(dbias, c, sum_bias);
            }
            const float *from = ddelta;
            product(&from, 1, d, d, p->dt_out + k * d * p->r_pad, p->r_pad, 0, ranks, p->r_pad, p->r_pad, l, 0);
            for (int64_t i = 0; i < l; i++) {
                memcpy(dp + i * p->q_pad, ranks + i * p->r_pad, p->r * sizeof(float));
                for (int64_t n = 0; n < 2 * p->n; n++) dp[i * p->q_pad + p->r + n] = sum(sums[i * 2 * p->n + n]);
            }
            outer(rows.p, p->r, p->q_pad, ddelta, d, l, p->ddt + (unit * p->k + k) * p->r * d);
            outer(dp, q, p->q_pad, rows.u, d, l, p->dq + (unit * p->k + k) * q * d);
            from = dp;
            product(&from, 1, q, p->q_pad, p->q_out + k * q * d, d, 0, du, d, d, l, 1);
            for (int64_t c = 0; c < l * d; c += VL) {
                vf x = at(rows.before, c), s = sigmoid(x);
                put(du, c, at(du, c) * (s + x * (s - s * s)));
            }
            float *dconv = p->dconv + (unit * p->k + k) * (p->w + 1) * d;
            const float *conv = p->conv + k * p->w * d;
            for (int64_t c = 0; c < d; c += VL)
                if (p->w == 4) causal_backward(p, k, xz, conv, c, du, dxz, dconv, 4);
                else causal_backward(p, k, xz, conv, c, du, dxz, dconv, p->w);
        }
        for (int64_t i = 0; i < l; i++)
            for (int64_t c = 0; c < d; c += VL) {
                vf z = at(xz, i * p->xz_l + d + c), s = sigmoid(z), dy = at(p->dy, (b * l + i) * d + c);
                put(dxz, i * 2 * d + d + c, p->scale * at(total, i * d + c) * dy * (s + z * (s - s * s)));
            }
    }
}

/* 0, or 1 where there is no memory */
int aum_short(const Short *p, int backward) {
    int64_t floats = p->l * (9 * p->d + 2 * p->q_pad + p->r_pad) + (p->l * (2 * NB + 2 * p->n + 3) + NB) * VL;
    floats += 50 * VL; /* for what take() adds to at most 20 blocks */
    return each_unit(p, p->pieces, p->threads, floats, backward ? backward_unit : forward_unit);
}
