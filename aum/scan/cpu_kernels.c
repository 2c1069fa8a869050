/* The mixer's kernels for the CPU: depthwise convolution with SiLU, and the selective scan with softplus, skip and
 * gate, forward and backward, for one or two directions at once. Plain C with GCC's and Clang's vector extensions, so
 * that one source serves AVX-512, AVX2 and NEON. Compiled at first use by build.py, called by cpu_kernels.py.
 *
 * Axes: k convolutions, s scans, b batch, l steps, d channels, g groups of channels that share B and C, n states.
 * Tensors are channel-last: the VL lanes of a vector are neighbouring channels of one step (a "tile" of channels).
 * Work is cut into units of a few clips and a few tiles. The cut depends only on the sizes, and units write to
 * separate places, so results are the same bits with any number of threads.
 *
 * A direction is only an order of steps: what is read for a chunk of steps is put in scan order first, and everything
 * after that is blind to the direction.
 */
#include "vectors.h"

int aum_vector_lanes(void) { return VL; }

int aum_has_threads(void) {
#if defined(_OPENMP)
    return 1;
#else
    return 0;
#endif
}

/* ---- convolution ------------------------------------------------------------------------------------------------ */

typedef struct {
    int64_t k, b, l, d, w, half, threads, batch_pieces, channel_pieces;
    int64_t reverse[2];
    int64_t x_b, x_l, dx_b, dx_l; /* strides in elements; u and du are contiguous (k, b, l, d) */
    const void *x;
    const float *weight, *bias; /* (k, d, w), (k, d) or null */
    void *u, *du, *dx;
    float *dweight, *dbias; /* (batch_pieces, k, d, w), (batch_pieces, k, d) */
} Conv;

#define ROWS 16 /* steps of a tile at a time: enough to be worth loading the taps, few enough to stay in the cache */

typedef struct { /* what a unit works on */
    int64_t first, channels, tiles, b0, clips, batch_piece;
} ConvUnit;

INLINE ConvUnit conv_unit_of(const Conv *p, int64_t i) {
    ConvUnit u;
    u.channels = channel_piece(p->d, p->channel_pieces, i % p->channel_pieces, &u.first);
    u.tiles = (u.channels + VL - 1) / VL;
    u.batch_piece = i / p->channel_pieces;
    u.clips = piece(p->b, p->batch_pieces, u.batch_piece, &u.b0);
    return u;
}

/* (k, tiles, w + 1): the taps and, last, the bias */
INLINE void pack_taps(const Conv *p, const ConvUnit *u, vf *taps, const int64_t w) {
    for (int64_t at = 0; at < p->k * u->tiles; at++)
        for (int i = 0; i < VL; i++) {
            int64_t c = at % u->tiles * VL + i, from = at / u->tiles * p->d + u->first + c, in = c < u->channels;
            for (int64_t j = 0; j < w; j++) taps[at * (w + 1) + j][i] = in ? p->weight[from * w + j] : 0;
            taps[at * (w + 1) + w][i] = in && p->bias ? p->bias[from] : 0;
        }
}

/* Data at step i of direction k, 0 outside. In scan order, both directions are the same convolution. */
INLINE vf row(const Conv *p, const void *x, int64_t base, int64_t stride, int64_t k, int64_t i, int lanes, int half) {
    if (i < 0 || i >= p->l) return splat(0.f);
    return load(x, base + (p->reverse[k] ? p->l - 1 - i : i) * stride, lanes, half);
}

/* Steps start ... end of one tile: the output, or (backward) du[i] times the slope of SiLU, in place, and the gradients
 * of the taps and the bias added to dtaps. */
INLINE void conv_rows(const Conv *p, int64_t k, int64_t b, int64_t start, int64_t end, int64_t c, int lanes,
                      const vf *taps, vf *dtaps, const int64_t w, const int half, const int backward) {
    vf window[MAX_TAPS], tap[MAX_TAPS + 1], dtap[MAX_TAPS + 1]; /* of a fixed size: else they are not in registers */
    int64_t from = b * p->x_b + c;
#pragma GCC unroll 8
    for (int64_t j = 0; j <= w; j++) tap[j] = taps[j], dtap[j] = backward ? dtaps[j] : splat(0.f);
#pragma GCC unroll 8
    for (int64_t j = 1; j < w; j++) window[j] = row(p, p->x, from, p->x_l, k, start - w + j, lanes, half);
    const char *out = (const char *)(backward ? p->du : p->u);
    const int size = half ? 2 : 4;
    for (int64_t i = start; i < end; i++) {
        int64_t t = p->reverse[k] ? p->l - 1 - i : i, here = ((k * p->b + b) * p->l + t) * p->d + c;
        ask_for_line((const char *)p->x + (from + t * p->x_l + VL) * size);
        ask_for_line(out + (here + VL) * size);
#pragma GCC unroll 8
        for (int64_t j = 0; j + 1 < w; j++) window[j] = window[j + 1];
        window[w - 1] = row(p, p->x, from, p->x_l, k, i, lanes, half);
        vf y = tap[w];
#pragma GCC unroll 8
        for (int64_t j = 0; j < w; j++) y += tap[j] * window[j];
        vf s = sigmoid(y);
        if (backward) {
            vf g = load(p->du, here, lanes, half) * (s + y * (s - s * s));
            store(p->du, here, g, lanes, half);
#pragma GCC unroll 8
            for (int64_t j = 0; j < w; j++) dtap[j] += g * window[j];
            dtap[w] += g;
        } else store(p->u, here, y * s, lanes, half);
    }
#pragma GCC unroll 8
    for (int64_t j = 0; j <= w && backward; j++) dtaps[j] = dtap[j];
}

INLINE void conv_forward_unit(const Conv *p, int64_t index, vf *taps, const int64_t w, const int half) {
    ConvUnit u = conv_unit_of(p, index);
    pack_taps(p, &u, taps, w);
    for (int64_t b = u.b0; b < u.b0 + u.clips; b++)
        for (int64_t k = 0; k < p->k; k++)
            for (int64_t start = 0; start < p->l; start += ROWS)
                for (int64_t tile = 0; tile < u.tiles; tile++)
                    conv_rows(p, k, b, start, min64(start + ROWS, p->l), u.first + tile * VL,
                              (int)min64(VL, u.channels - tile * VL), taps + (k * u.tiles + tile) * (w + 1), 0, w, half,
                              0);
}

/* dx of one tile's steps: x[i] reached the outputs i ... i + w - 1, in scan order. */
INLINE void conv_dx_rows(const Conv *p, int64_t b, int64_t start, int64_t end, int64_t c, int lanes, const vf *taps,
                         int64_t stride_k, const int64_t w, const int half) {
    for (int64_t t = start; t < end; t++) {
        vf g = {0};
        for (int64_t k = 0; k < p->k; k++) {
            int64_t i = p->reverse[k] ? p->l - 1 - t : t;
#pragma GCC unroll 8
            for (int64_t j = 0; j < w; j++)
                g += taps[k * stride_k + j] *
                     row(p, p->du, (k * p->b + b) * p->l * p->d + c, p->d, k, i + w - 1 - j, lanes, half);
        }
        store(p->dx, b * p->dx_b + t * p->dx_l + c, g, lanes, half);
    }
}

INLINE void conv_backward_unit(const Conv *p, int64_t index, vf *taps, const int64_t w, const int half) {
    ConvUnit u = conv_unit_of(p, index);
    vf *dtaps = taps + p->k * u.tiles * (w + 1);
    pack_taps(p, &u, taps, w);
    memset(dtaps, 0, p->k * u.tiles * (w + 1) * sizeof(vf));
    for (int64_t b = u.b0; b < u.b0 + u.clips; b++) {
        for (int64_t k = 0; k < p->k; k++)
            for (int64_t start = 0; start < p->l; start += ROWS)
                for (int64_t tile = 0; tile < u.tiles; tile++) {
                    int64_t at = (k * u.tiles + tile) * (w + 1);
                    conv_rows(p, k, b, start, min64(start + ROWS, p->l), u.first + tile * VL,
                              (int)min64(VL, u.channels - tile * VL), taps + at, dtaps + at, w, half, 1);
                }
        for (int64_t start = 0; start < p->l; start += ROWS)
            for (int64_t tile = 0; tile < u.tiles; tile++)
                conv_dx_rows(p, b, start, min64(start + ROWS, p->l), u.first + tile * VL,
                             (int)min64(VL, u.channels - tile * VL), taps + tile * (w + 1), u.tiles * (w + 1), w, half);
    }
    for (int64_t at = 0; at < p->k * u.tiles; at++)
        for (int i = 0; i < VL && at % u.tiles * VL + i < u.channels; i++) {
            int64_t to = (u.batch_piece * p->k + at / u.tiles) * p->d + u.first + at % u.tiles * VL + i;
            for (int64_t j = 0; j < w; j++) p->dweight[to * w + j] = dtaps[at * (w + 1) + j][i];
            p->dbias[to] = dtaps[at * (w + 1) + w][i];
        }
}

static void conv_unit(const Conv *p, int64_t unit, vf *memory, int backward) {
#define CASE(w, half) \
    (backward ? conv_backward_unit(p, unit, memory, w, half) : conv_forward_unit(p, unit, memory, w, half))
    if (p->w == 4) p->half ? CASE(4, 1) : CASE(4, 0);
    else p->half ? CASE(p->w, 1) : CASE(p->w, 0);
#undef CASE
}

/* 0, or 1 where there is no memory */
int aum_conv(const Conv *p, int backward) {
    int64_t units = p->batch_pieces * p->channel_pieces;
    int64_t tiles = (p->d + VL - 1) / VL / p->channel_pieces + 1; /* of the largest piece */
    int failed = 0;
#pragma omp parallel num_threads((int)p->threads) reduction(| : failed)
    {
        vf *memory = scratch(2 * p->k * (p->w + 1) * tiles);
        failed |= !memory;
        unsigned long old = flush_denormals();
#pragma omp for schedule(dynamic)
        for (int64_t unit = 0; unit < units; unit++)
            if (memory) conv_unit(p, unit, memory, backward);
        restore(old);
        free(memory);
    }
    return failed;
}

/* ---- scan ------------------------------------------------------------------------------------------------------- */

typedef struct {
    int64_t s, b, l, d, g, n, half, softplus, threads; /* s: 1 or 2 */
    int64_t batch_pieces, channel_pieces;              /* the latter of a group's channels */
    int64_t steps, chunks; /* of a chunk; their number */
    int64_t reverse[2];
    float scale;
    /* strides in elements, 1 on d but for B and C */
    int64_t u_s, u_b, u_l, delta_s, delta_b, delta_l, B_s, B_b, B_l, B_g, B_n, C_s, C_b, C_l, C_g, C_n;
    int64_t z_b, z_l, dz_b, dz_l, du_s, du_b, du_l, ddelta_s, ddelta_b, ddelta_l;
    const void *u, *delta, *B, *C, *z, *dy; /* dy and y: (b, l, d) contiguous; z may be null */
    const float *A, *D, *bias, *dlast;      /* (s, d, n); (s, d) or null; (s, d) or null; (s, b, n, d) or null */
    void *y, *du, *ddelta, *dz;
    float *last, *states;          /* (s, b, n, d); (s, b, chunks - 1, n, d), states before a chunk, or null */
    float *dA, *dD, *dbias;        /* (batch_pieces, s, d, n), (batch_pieces, s, d) twice */
    float *dB, *dC;                /* (channel_pieces, s, b, l, g, n) */
} Scan;

typedef struct { /* what a unit works on */
    int64_t group, first, tiles, end; /* channels first ... end of one group */
    int64_t b0, clips, np;            /* np: n padded */
    int64_t channel_piece, batch_piece;
} Unit;

INLINE Unit unit_of(const Scan *p, int64_t i) {
    Unit u;
    int64_t in_group = p->d / p->g, start;
    u.channel_piece = i % p->channel_pieces;
    u.group = i / p->channel_pieces % p->g;
    u.batch_piece = i / p->channel_pieces / p->g;
    int64_t tiles = (in_group + VL - 1) / VL;
    u.tiles = piece(tiles, p->channel_pieces, u.channel_piece, &start);
    u.first = u.group * in_group + start * VL;
    u.end = (u.group + 1) * in_group;
    u.clips = piece(p->b, p->batch_pieces, u.batch_piece, &u.b0);
    u.np = (p->n + NB - 1) / NB * NB;
    return u;
}

/* Step i of the scan, in time. */
INLINE int64_t when(const Scan *p, int64_t s, int64_t i) { return p->reverse[s] ? p->l - 1 - i : i; }

/* The rows of a tile in a chunk of steps: element `at` first, then each `stride` further (negative against time). */
typedef struct {
    int64_t at, stride;
} Rows;

INLINE Rows rows(const Scan *p, int64_t s, int64_t start, int64_t base, int64_t stride) {
    Rows r = {base + when(p, s, start) * stride, p->reverse[s] ? -stride : stride};
    return r;
}

INLINE void gather(const void *x, Rows r, int64_t steps, int lanes, int half, vf *out) {
    if (lanes == VL) for (int64_t i = 0; i < steps; i++) out[i] = load(x, r.at + i * r.stride, VL, half);
    else for (int64_t i = 0; i < steps; i++) out[i] = load(x, r.at + i * r.stride, lanes, half);
}

INLINE void scatter(void *x, Rows r, int64_t steps, int lanes, int half, const vf *in) {
    if (lanes == VL) for (int64_t i = 0; i < steps; i++) store(x, r.at + i * r.stride, in[i], VL, half);
    else for (int64_t i = 0; i < steps; i++) store(x, r.at + i * r.stride, in[i], lanes, half);
}

typedef struct {
    const char *at;
    int64_t stride; /* in bytes */
} Next;

INLINE Next next_tile(const void *x, Rows r, int half) {
    int size = half ? 2 : 4;
    Next next = {(const char *)x + (r.at + VL) * size, r.stride * size};
    return next;
}

INLINE void ask_for(const Next *next, int64_t i) { ask_for_line(next->at + i * next->stride); }

/* Step i of scan s in the order of scan 0. */
INLINE int64_t other(const Scan *p, int64_t s, int64_t i) { return p->reverse[s] == p->reverse[0] ? i : p->l - 1 - i; }

/* B or C of a chunk, in scan order, padded with zeros: (steps, np). */
INLINE void pack_rows(const Scan *p, const void *x, int64_t s, int64_t base, int64_t stride_l, int64_t stride_n,
                      int64_t start, int64_t steps, int64_t np, float *rows, int half) {
    for (int64_t i = 0; i < steps; i++) {
        int64_t at = base + when(p, s, start + i) * stride_l;
        for (int64_t n = 0; n < np; n++) rows[i * np + n] = n < p->n ? load1(x, at + n * stride_n, half) : 0;
    }
}

/* A log2(e) of the unit's channels: (s, tiles, np) */
INLINE void pack_A(const Scan *p, const Unit *u, vf *A) {
    for (int64_t s = 0; s < p->s; s++)
        for (int64_t tile = 0; tile < u->tiles; tile++)
            for (int64_t n = 0; n < u->np; n++)
                for (int i = 0; i < VL; i++) {
                    int64_t c = u->first + tile * VL + i;
                    A[(s * u->tiles + tile) * u->np + n][i] =
                        c < u->end && n < p->n ? p->A[(s * p->d + c) * p->n + n] * LOG2E : 0;
                }
}

/* y += C . h over `count` (a constant) states of a chunk's steps; h is carried on. */
INLINE void scan_states(int64_t steps, const vf *delta, const vf *delta_u, const float *B, const float *C, int64_t np,
                        const vf *A, vf *h, vf *y, const Next *next, const int count) {
    vf H[2 * NB], a[2 * NB];
    for (int k = 0; k < count; k++) H[k] = h[k], a[k] = A[k];
    for (int64_t i = 0; i < steps; i++) {
        vf dl = delta[i], x = delta_u[i], out = y[i];
        ask_for(next, i);
        ask_for(next + 1, i);
#pragma GCC unroll 8
        for (int k = 0; k < count; k++) {
            H[k] = exp2v(dl * a[k]) * H[k] + x * B[i * np + k];
            out += H[k] * C[i * np + k];
        }
        y[i] = out;
    }
    for (int k = 0; k < count; k++) h[k] = H[k];
}

/* For a tile's chunk: the step sizes, the input they scale, and the skip. */
INLINE void prepare(const Scan *p, Rows at_u, Rows at_delta, int64_t steps, int lanes, int half, vf bias, vf D,
                    vf *delta, vf *delta_u, vf *y) {
    const void *u = p->u, *raw_delta = p->delta;
    const int64_t softplus = p->softplus;
    for (int64_t i = 0; i < steps; i++) {
        vf x = load(u, at_u.at + i * at_u.stride, lanes, half);
        vf raw = load(raw_delta, at_delta.at + i * at_delta.stride, lanes, half) + bias;
        delta[i] = softplus ? softplus_of(raw, exp_minus_abs(raw)) : raw;
        delta_u[i] = delta[i] * x;
        y[i] = D * x;
    }
}

INLINE void scan_forward_unit(const Scan *p, int64_t index, vf *memory, const int half) {
    Unit u = unit_of(p, index);
    int64_t tiles = u.tiles, np = u.np, steps = p->steps;
    vf *A = memory, *h = A + p->s * tiles * np, *delta = h + tiles * np, *delta_u = delta + steps;
    vf *y = delta_u + steps;
    int64_t packed = (steps * np + VL - 1) / VL;
    float *B = (float *)(y + steps), *C = (float *)(y + steps + packed);
    vf *total = y + steps + 2 * packed; /* (tiles, l): the first scan's output, where there are two */
    pack_A(p, &u, A);
    for (int64_t b = u.b0; b < u.b0 + u.clips; b++)
        for (int64_t s = 0; s < p->s; s++) {
            memset(h, 0, tiles * np * sizeof(vf));
            for (int64_t chunk = 0; chunk < p->chunks; chunk++) {
                int64_t start = chunk * steps, count = min64(steps, p->l - start);
                int64_t at_B = s * p->B_s + b * p->B_b + u.group * p->B_g;
                int64_t at_C = s * p->C_s + b * p->C_b + u.group * p->C_g;
                pack_rows(p, p->B, s, at_B, p->B_l, p->B_n, start, count, np, B, half);
                pack_rows(p, p->C, s, at_C, p->C_l, p->C_n, start, count, np, C, half);
                for (int64_t tile = 0; tile < tiles; tile++) {
                    int64_t c = u.first + tile * VL;
                    int lanes = (int)min64(VL, u.end - c);
                    vf D = {0}, bias = {0}, *state = h + tile * np;
                    if (p->D) D = load(p->D, s * p->d + c, lanes, 0);
                    if (p->bias) bias = load(p->bias, s * p->d + c, lanes, 0);
                    if (p->states && chunk)
                        for (int64_t n = 0; n < p->n; n++)
                            store(p->states, (((s * p->b + b) * (p->chunks - 1) + chunk - 1) * p->n + n) * p->d + c,
                                  state[n], lanes, 0);
                    Rows at_u = rows(p, s, start, s * p->u_s + b * p->u_b + c, p->u_l);
                    Rows at_delta = rows(p, s, start, s * p->delta_s + b * p->delta_b + c, p->delta_l);
                    Rows at_z = rows(p, s, start, b * p->z_b + c, p->z_l);
                    Rows at_y = rows(p, s, start, b * p->l * p->d + c, p->d);
                    Next next[] = {next_tile(p->u, at_u, half), next_tile(p->delta, at_delta, half),
                                   next_tile(p->y, at_y, half), next_tile(p->z, at_z, half)};
                    if (lanes == VL) prepare(p, at_u, at_delta, count, VL, half, bias, D, delta, delta_u, y);
                    else prepare(p, at_u, at_delta, count, lanes, half, bias, D, delta, delta_u, y);
                    const vf *A_here = A + (s * tiles + tile) * np;
                    int64_t n = 0;
                    for (; n + 2 * NB <= np && VL == 16; n += 2 * NB) /* AVX-512 has registers for twice as many */
                        scan_states(count, delta, delta_u, B + n, C + n, np, A_here + n, state + n, y,
                                    next + (n ? 2 : 0), 2 * NB);
                    for (; n < np; n += NB)
                        scan_states(count, delta, delta_u, B + n, C + n, np, A_here + n, state + n, y,
                                    next + (n ? 2 : 0), NB);
                    if (s + 1 < p->s) { /* kept in scan order; the other scan may run the other way */
                        memcpy(total + tile * p->l + start, y, count * sizeof(vf));
                        continue;
                    }
                    if (s) for (int64_t i = 0; i < count; i++) y[i] += total[tile * p->l + other(p, s, start + i)];
                    if (p->z) {
                        gather(p->z, at_z, count, lanes, half, delta);
                        for (int64_t i = 0; i < count; i++) y[i] *= p->scale * (delta[i] * sigmoid(delta[i]));
                    } else for (int64_t i = 0; i < count; i++) y[i] *= p->scale;
                    scatter(p->y, at_y, count, lanes, half, y);
                }
            }
            for (int64_t tile = 0; tile < tiles && p->last; tile++)
                for (int64_t n = 0; n < p->n; n++)
                    store(p->last, ((s * p->b + b) * p->n + n) * p->d + u.first + tile * VL, h[tile * np + n],
                          (int)min64(VL, u.end - u.first - tile * VL), 0);
        }
}

/* NB states of a chunk: the states again from the one before the chunk, then the gradients, last step first.
 *   G_t = dy_t C_t + decay_{t+1} G_{t+1}, the gradient of h_t;   ddelta_u = G . B;   with e = G decay h_{t-1}:
 *   dexponent (of delta A, by delta) = e . A,  dA = sum over steps of e delta;
 *   dB = sum over channels of G delta u,  dC = sum over channels of dy h.
 * decays and states are scratch, (steps, NB) and (steps + 1, NB). */
INLINE void scan_states_backward(int64_t steps, const vf *delta, const vf *delta_u, const vf *dy, const float *B,
                                 const float *C, int64_t np, const vf *A, const vf *before, vf *carry, vf *decays,
                                 vf *states, vf *y, vf *ddelta_u, vf *dexponent, vf *dA, vf *dB, vf *dC,
                                 const Next *next) {
    vf H[NB], a[NB];
    for (int k = 0; k < NB; k++) states[k] = H[k] = before[k], a[k] = A[k];
    for (int64_t i = 0; i < steps; i++) {
        vf dl = delta[i], x = delta_u[i], out = y[i];
        ask_for(next, i);
#pragma GCC unroll 8
        for (int k = 0; k < NB; k++) {
            vf decay = exp2v(dl * a[k]);
            decays[i * NB + k] = decay;
            H[k] = decay * H[k] + x * B[i * np + k];
            states[(i + 1) * NB + k] = H[k];
            out += H[k] * C[i * np + k];
        }
        y[i] = out;
    }
    vf G[NB], da[NB];
    for (int k = 0; k < NB; k++) G[k] = carry[k], da[k] = dA[k];
    for (int64_t i = steps - 1; i >= 0; i--) {
        vf g_y = dy[i], x = delta_u[i], dl = delta[i], g_u = ddelta_u[i], g_e = dexponent[i];
        ask_for(next + 1, i);
#pragma GCC unroll 8
        for (int k = 0; k < NB; k++) {
            vf g = G[k] + g_y * C[i * np + k];
            dC[i * np + k] += g_y * states[(i + 1) * NB + k];
            dB[i * np + k] += g * x;
            g_u += g * B[i * np + k];
            G[k] = g * decays[i * NB + k];
            vf e = G[k] * states[i * NB + k];
            g_e += e * a[k];
            da[k] += e * dl;
        }
        ddelta_u[i] = g_u;
        dexponent[i] = g_e;
    }
    for (int k = 0; k < NB; k++) carry[k] = G[k], dA[k] = da[k];
}

INLINE void scan_backward_unit(const Scan *p, int64_t index, vf *memory, const int half) {
    Unit u = unit_of(p, index);
    int64_t tiles = u.tiles, np = u.np, steps = p->steps;
    vf *A = memory, *dA = A + p->s * tiles * np, *dD = dA + p->s * tiles * np, *dbias = dD + p->s * tiles;
    vf *carry = dbias + p->s * tiles, *dB = carry + tiles * np, *dC = dB + steps * np;
    vf *decays = dC + steps * np, *states = decays + steps * NB, *before = states + (steps + 1) * NB;
    vf *x = before + np, *delta = x + steps, *delta_u = delta + steps, *slope = delta_u + steps, *dy = slope + steps;
    vf *dgate = dy + steps, *y = dgate + steps, *ddelta_u = y + steps, *dexponent = ddelta_u + steps;
    float *B = (float *)(dexponent + steps), *C = B + steps * np;
    pack_A(p, &u, A);
    memset(dA, 0, p->s * tiles * (np + 2) * sizeof(vf)); /* and dD, dbias */
    for (int64_t b = u.b0; b < u.b0 + u.clips; b++)
        for (int64_t s = 0; s < p->s; s++) {
            memset(carry, 0, tiles * np * sizeof(vf));
            for (int64_t tile = 0; tile < tiles && p->dlast; tile++)
                for (int64_t n = 0; n < p->n; n++)
                    carry[tile * np + n] = load(p->dlast, ((s * p->b + b) * p->n + n) * p->d + u.first + tile * VL,
                                                (int)min64(VL, u.end - u.first - tile * VL), 0);
            for (int64_t chunk = p->chunks - 1; chunk >= 0; chunk--) {
                int64_t start = chunk * steps, count = min64(steps, p->l - start);
                int64_t at_B = s * p->B_s + b * p->B_b + u.group * p->B_g;
                int64_t at_C = s * p->C_s + b * p->C_b + u.group * p->C_g;
                pack_rows(p, p->B, s, at_B, p->B_l, p->B_n, start, count, np, B, half);
                pack_rows(p, p->C, s, at_C, p->C_l, p->C_n, start, count, np, C, half);
                memset(dB, 0, 2 * steps * np * sizeof(vf)); /* and dC */
                for (int64_t tile = 0; tile < tiles; tile++) {
                    int64_t c = u.first + tile * VL;
                    int lanes = (int)min64(VL, u.end - c);
                    vf D = {0}, bias = {0};
                    if (p->D) D = load(p->D, s * p->d + c, lanes, 0);
                    if (p->bias) bias = load(p->bias, s * p->d + c, lanes, 0);
                    memset(before, 0, np * sizeof(vf));
                    for (int64_t n = 0; n < p->n && chunk; n++)
                        before[n] = load(p->states,
                                         (((s * p->b + b) * (p->chunks - 1) + chunk - 1) * p->n + n) * p->d + c, lanes,
                                         0);
                    Rows at_u = rows(p, s, start, s * p->u_s + b * p->u_b + c, p->u_l);
                    Rows at_delta = rows(p, s, start, s * p->delta_s + b * p->delta_b + c, p->delta_l);
                    Rows at_du = rows(p, s, start, s * p->du_s + b * p->du_b + c, p->du_l);
                    Rows at_ddelta = rows(p, s, start, s * p->ddelta_s + b * p->ddelta_b + c, p->ddelta_l);
                    Rows at_z = rows(p, s, start, b * p->z_b + c, p->z_l);
                    Rows at_dz = rows(p, s, start, b * p->dz_b + c, p->dz_l);
                    Rows at_dy = rows(p, s, start, b * p->l * p->d + c, p->d);
                    Next next[] = {next_tile(p->u, at_u, half), next_tile(p->delta, at_delta, half),
                                   next_tile(p->dy, at_dy, half), next_tile(p->z, at_z, half),
                                   next_tile(p->du, at_du, half), next_tile(p->ddelta, at_ddelta, half),
                                   next_tile(p->dz, at_dz, half), {p->u, 0}};
                    gather(p->u, at_u, count, lanes, half, x);
                    gather(p->delta, at_delta, count, lanes, half, delta);
                    gather(p->dy, at_dy, count, lanes, half, dy);
                    for (int64_t i = 0; i < count; i++) {
                        vf raw = delta[i] + bias, e = exp_minus_abs(raw);
                        delta[i] = p->softplus ? softplus_of(raw, e) : raw;
                        slope[i] = p->softplus ? sigmoid_of(raw, e) : splat(1.f);
                        delta_u[i] = delta[i] * x[i];
                        y[i] = D * x[i];
                        dy[i] *= p->scale;
                        ddelta_u[i] = dexponent[i] = splat(0.f);
                    }
                    if (p->z) {
                        gather(p->z, at_z, count, lanes, half, dgate);
                        for (int64_t i = 0; i < count; i++) {
                            vf z = dgate[i], sig = sigmoid(z);
                            dgate[i] = dy[i] * (sig + z * (sig - sig * sig));
                            dy[i] *= z * sig;
                        }
                    }
                    for (int64_t n = 0; n < np; n += NB) {
                        int64_t at = (s * tiles + tile) * np + n;
                        scan_states_backward(count, delta, delta_u, dy, B + n, C + n, np, A + at, before + n,
                                             carry + tile * np + n, decays, states, y, ddelta_u, dexponent, dA + at,
                                             dB + n, dC + n, next + min64(n / NB * 2, 6));
                    }
                    vf sum_D = {0}, sum_bias = {0};
                    for (int64_t i = 0; i < count; i++) {
                        vf g = (dexponent[i] * LN2 + ddelta_u[i] * x[i]) * slope[i];
                        sum_bias += g;
                        sum_D += dy[i] * x[i];
                        dexponent[i] = g;
                        ddelta_u[i] = ddelta_u[i] * delta[i] + D * dy[i];
                    }
                    scatter(p->du, at_du, count, lanes, half, ddelta_u);
                    scatter(p->ddelta, at_ddelta, count, lanes, half, dexponent);
                    if (p->z) {
                        for (int64_t i = 0; i < count; i++) y[i] *= dgate[i];
                        if (s) { /* the other scan's share is there already */
                            gather(p->dz, at_dz, count, lanes, half, dgate);
                            for (int64_t i = 0; i < count; i++) y[i] += dgate[i];
                        }
                        scatter(p->dz, at_dz, count, lanes, half, y);
                    }
                    dD[s * tiles + tile] += sum_D;
                    dbias[s * tiles + tile] += sum_bias;
                }
                for (int64_t i = 0; i < count; i++)
                    for (int64_t n = 0; n < p->n; n++) {
                        int64_t at = (((u.channel_piece * p->s + s) * p->b + b) * p->l + when(p, s, start + i)) * p->g;
                        at = (at + u.group) * p->n + n;
                        p->dB[at] = sum(dB[i * np + n]);
                        p->dC[at] = sum(dC[i * np + n]);
                    }
            }
        }
    for (int64_t s = 0; s < p->s; s++)
        for (int64_t tile = 0; tile < tiles; tile++)
            for (int i = 0; i < VL && u.first + tile * VL + i < u.end; i++) {
                int64_t to = (u.batch_piece * p->s + s) * p->d + u.first + tile * VL + i, from = s * tiles + tile;
                for (int64_t n = 0; n < p->n; n++) p->dA[to * p->n + n] = dA[from * np + n][i];
                p->dD[to] = dD[from][i];
                p->dbias[to] = dbias[from][i];
            }
}

static void scan_unit(const Scan *p, int64_t unit, vf *memory, int backward) {
    if (backward) p->half ? scan_backward_unit(p, unit, memory, 1) : scan_backward_unit(p, unit, memory, 0);
    else p->half ? scan_forward_unit(p, unit, memory, 1) : scan_forward_unit(p, unit, memory, 0);
}

/* 0, or 1 where there is no memory */
int aum_scan(const Scan *p, int backward) {
    int64_t units = p->batch_pieces * p->g * p->channel_pieces;
    int64_t tiles = (p->d / p->g + VL - 1) / VL / p->channel_pieces + 1, np = (p->n + NB - 1) / NB * NB;
    int64_t rows = 2 * ((p->steps * np + VL - 1) / VL); /* B and C */
    int64_t vectors = backward ? p->s * tiles * (2 * np + 2) + tiles * np + p->steps * (2 * np + 2 * NB + 9) + NB + np +
                                     rows
                               : (p->s + 1) * tiles * np + 3 * p->steps + rows + (p->s > 1 ? p->l * tiles : 0);
    int failed = 0;
#pragma omp parallel num_threads((int)p->threads) reduction(| : failed)
    {
        vf *memory = scratch(vectors);
        failed |= !memory;
        unsigned long old = flush_denormals();
#pragma omp for schedule(dynamic)
        for (int64_t unit = 0; unit < units; unit++)
            if (memory) scan_unit(p, unit, memory, backward);
        restore(old);
        free(memory);
    }
    return failed;
}
