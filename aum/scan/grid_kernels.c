/* Convolutions over a grid of mel bins and frames, forward and backward, each with what lies beside it in a small network:
 * before it the norm and ReLU of its input, after it the sums that the norm of its output needs. Plain C as in
 * cpu_kernels.c, called by grid.py, which says what is computed.
 *
 * Axes: b clips, h rows, w columns, c input channels, o output channels; channels are last and contiguous. A clip's
 * activations fit into the second-level cache, so a clip is finished before the next one. Units are pieces of the batch;
 * each writes sums of its own, so results are the same bits with any number of threads.
 *
 * The kw taps of a row and their channels lie side by side in memory. So a convolution is, for each of its kh rows, a
 * matrix product of kw c inputs with o outputs, whose input moves on by stride c for each column.
 */
#include "products.h"

typedef struct {
    int64_t b, h, w, c, o, kh, kw, sh, sw, ph, pw, h_out, w_out;
    int64_t depthwise, relu, pieces, threads;
    int64_t x_b, x_h, x_w;                 /* strides of x in elements, 1 on c */
    int64_t c_pad, o_pad;                  /* kw c (depthwise: c) and o, padded to whole vectors */
    const float *x, *scale, *shift;        /* (b, h, w, c); (c,) or null: the input is as it is */
    const float *weight, *turned, *bias;   /* (kh, kw c, o_pad); (kh, o, c_pad), backward; (o,) or null.
                                            * depthwise: (kh, kw, c_pad), and turned by half a circle */
    float *y, *sums;                       /* (b, h_out, w_out, o); (pieces, 2, o): of y and y^2, or null */
    const float *dy, *dsum, *dsquare;      /* like y; (o,) or null */
    float *dx, *dweight, *dbias, *daffine; /* like x, contiguous, or null; (pieces, kh, kw c, o_pad);
                                            * (pieces, o); (pieces, 2, c): of scale and shift */
} Grid;

/* ---- rows of the input ------------------------------------------------------------------------------------------ */

/* The values of (c,) for each column: (w, c), so that a row is one loop whatever c is. */
static void repeat(const float *of, int64_t c, int64_t w, float *row) {
    for (int64_t i = 0; i < w; i++) memcpy(row + i * c, of, c * sizeof(float));
}

/* Row `r` of a clip, normed, between zeros where the convolution is padded: (w + 2 pw, c). */
static void input_row(const Grid *p, const float *clip, int64_t r, const float *scale, const float *shift,
                      float *restrict row) {
    int64_t n = p->w * p->c;
    row += p->pw * p->c;
    if (r < 0 || r >= p->h) {
        memset(row, 0, n * sizeof(float));
        return;
    }
    const float *x = clip + r * p->x_h;
    if (p->x_w != p->c) {
        for (int64_t i = 0; i < p->w; i++)
            for (int64_t j = 0; j < p->c; j++) row[i * p->c + j] = x[i * p->x_w + j];
        x = row;
    }
    if (!p->scale) {
        if (x != row) memcpy(row, x, n * sizeof(float));
        return;
    }
    const float least = p->relu ? 0 : -INFINITY;
    EACH(n) {
        float t = x[i_] * scale[i_] + shift[i_];
        row[i_] = t < least ? least : t; /* NaN stays */
    }
}

typedef struct { /* the kh rows under the kernel, in a ring */
    float *memory, *rows[16];
    int64_t size, next; /* of a row; the input row that has not been read yet */
} Window;

/* Move the window down to where output row `r` needs it. */
INLINE void move(const Grid *p, Window *window, const float *clip, int64_t r, const float *scale, const float *shift) {
    int64_t first = r * p->sh - p->ph;
    if (r == 0 || window->next < first) window->next = first;
    for (; window->next < first + p->kh; window->next++)
        input_row(p, clip, window->next, scale, shift,
                  window->memory + (window->next + p->ph) % p->kh * window->size);
    for (int64_t i = 0; i < p->kh; i++) window->rows[i] = window->memory + (first + i + p->ph) % p->kh * window->size;
}

/* ---- depthwise convolution -------------------------------------------------------------------------------------- */

/* A row of outputs (w, c), taps (kh, kw, c_pad). */
INLINE void taps_row(const float *const *in, int64_t kh, int64_t kw, const float *weight, int64_t c_pad,
                     const float *start, float *out, int64_t c, int64_t w, const int small) {
    for (int64_t v = 0; v < c; v += VL) {
        int lanes = (int)min64(VL, c - v);
        vf first = start ? load(start, v, lanes, 0) : splat(0.f), tap[9];
#pragma GCC unroll 9
        for (int k = 0; k < 9 && small; k++) tap[k] = load(weight, k * c_pad + v, VL, 0);
        for (int64_t column = 0; column < w; column++) {
            vf y = first;
#pragma GCC unroll 3
            for (int64_t i = 0; i < (small ? 3 : kh); i++)
#pragma GCC unroll 3
                for (int64_t j = 0; j < (small ? 3 : kw); j++)
                    y += load(in[i], (column + j) * c + v, VL, 0) *
                         (small ? tap[i * 3 + j] : load(weight, (i * kw + j) * c_pad + v, VL, 0));
            if (lanes == VL) store(out, column * c + v, y, VL, 0);
            else store(out, column * c + v, y, lanes, 0);
        }
    }
}

static void taps(const float *const *in, int64_t kh, int64_t kw, const float *weight, int64_t c_pad, const float *start,
                 float *out, int64_t c, int64_t w) {
    if (kh == 3 && kw == 3) taps_row(in, 3, 3, weight, c_pad, start, out, c, w, 1);
    else taps_row(in, kh, kw, weight, c_pad, start, out, c, w, 0);
}

/* dweight (kh, kw, c_pad) += sum over columns of in * g (w, c). */
static void outer_taps(const float *const *in, int64_t kh, int64_t kw, const float *g, int64_t c, int64_t c_pad,
                       int64_t w, float *dweight) {
    for (int64_t v = 0; v < c; v += VL)
        for (int64_t i = 0; i < kh; i++)
            for (int64_t first = 0; first < kw; first += 3) {
                vf acc[3];
                int64_t count = min64(3, kw - first);
                for (int64_t j = 0; j < 3; j++)
                    acc[j] = j < count ? load(dweight, (i * kw + first + j) * c_pad + v, VL, 0) : splat(0.f);
                const float *x = in[i] + first * c + v;
                if (count == 3)
                    for (int64_t column = 0; column < w; column++) {
                        vf dy = load(g, column * c + v, VL, 0);
#pragma GCC unroll 3
                        for (int j = 0; j < 3; j++) acc[j] += dy * load(x, (column + j) * c, VL, 0);
                    }
                else
                    for (int64_t column = 0; column < w; column++)
                        for (int64_t j = 0; j < count; j++)
                            acc[j] += load(g, column * c + v, VL, 0) * load(x, (column + j) * c, VL, 0);
                for (int64_t j = 0; j < count; j++) store(dweight, (i * kw + first + j) * c_pad + v, acc[j], VL, 0);
            }
}

/* ---- forward ---------------------------------------------------------------------------------------------------- */

static void forward_unit(const void *arguments, int64_t unit, float *memory) {
    const Grid *p = arguments;
    int64_t b0, clips = piece(p->b, p->pieces, unit, &b0), n = p->w_out * p->o;
    Window window = {.size = whole((p->w + 2 * p->pw) * p->c + VL)};
    window.memory = take(&memory, p->kh * window.size);
    float *scale = take(&memory, p->w * p->c), *shift = take(&memory, p->w * p->c);
    float *sum = take(&memory, n), *square = take(&memory, n);
    memset(window.memory, 0, p->kh * window.size * sizeof(float));
    if (p->scale) repeat(p->scale, p->c, p->w, scale), repeat(p->shift, p->c, p->w, shift);
    memset(sum, 0, n * sizeof(float));
    memset(square, 0, n * sizeof(float));
    for (int64_t b = b0; b < b0 + clips; b++)
        for (int64_t r = 0; r < p->h_out; r++) {
            move(p, &window, p->x + b * p->x_b, r, scale, shift);
            const float *const *rows = (const float *const *)window.rows;
            float *restrict y = p->y + (b * p->h_out + r) * n;
            if (p->depthwise) taps(rows, p->kh, p->kw, p->weight, p->c_pad, p->bias, y, p->c, p->w_out);
            else
                product(rows, p->kh, p->kw * p->c, p->sw * p->c, p->weight, p->o_pad, p->bias, y, p->o, p->o, p->w_out,
                        0);
            if (p->sums) EACH(n) sum[i_] += y[i_], square[i_] += y[i_] * y[i_];
        }
    if (p->sums) {
        fold(sum, p->o, p->w_out, p->sums + unit * 2 * p->o);
        fold(square, p->o, p->w_out, p->sums + (unit * 2 + 1) * p->o);
    }
}

/* ---- backward --------------------------------------------------------------------------------------------------- */

/* The gradient of a row of outputs: dy and what comes back through the sums of y and y^2. */
INLINE void output_gradient(const Grid *p, int64_t at, const float *dsum, const float *dsquare, float *restrict g) {
    const float *dy = p->dy + at, *y = p->y + at;
    int64_t n = p->w_out * p->o;
    if (p->dsum) EACH(n) g[i_] = dy[i_] + dsum[i_] + 2 * y[i_] * dsquare[i_];
    else memcpy(g, dy, n * sizeof(float));
}

/* Back through norm and ReLU of row `r`: g (w, c) to dx, and the sums of scale's and shift's gradients. */
INLINE void input_gradient(const Grid *p, int64_t b, int64_t r, const float *restrict g, const float *scale,
                           const float *shift, float *restrict dscale, float *restrict dshift) {
    int64_t n = p->w * p->c;
    float *restrict dx = p->dx + (b * p->h + r) * n;
    const float *x = p->x + b * p->x_b + r * p->x_h;
    if (!p->scale) memcpy(dx, g, n * sizeof(float));
    const float least = p->relu ? 0 : -INFINITY;
    EACH(n * (p->scale != 0)) {
        float d = x[i_] * scale[i_] + shift[i_] <= least ? 0 : g[i_];
        dx[i_] = d * scale[i_];
        dscale[i_] += d * x[i_];
        dshift[i_] += d;
    }
}

/* In floats: a clip's gradient of its input (dense) or output (depthwise), with the padding around it. */
INLINE int64_t map_size(const Grid *p) {
    return p->depthwise ? (p->h + p->kh - 1) * (p->w + p->kw - 1) * p->c
                        : (p->h + 2 * p->ph + p->sh) * (p->w + 2 * p->pw) * p->c;
}

static void backward_unit(const void *arguments, int64_t unit, float *memory) {
    const Grid *p = arguments;
    int64_t b0, clips = piece(p->b, p->pieces, unit, &b0), n = p->w_out * p->o, n_in = p->w * p->c;
    int64_t inputs = p->kw * p->c, step = p->sw * p->c, across = (p->w + 2 * p->pw) * p->c;
    Window window = {.size = whole(across + VL)};
    window.memory = take(&memory, p->kh * window.size);
    float *scale = take(&memory, n_in), *shift = take(&memory, n_in);
    float *dscale = take(&memory, n_in), *dshift = take(&memory, n_in);
    float *dsum = take(&memory, n), *dsquare = take(&memory, n), *dbias = take(&memory, n), *row = take(&memory, n_in);
    float *g = take(&memory, p->w_out * p->o_pad), *flat = take(&memory, n), *map = take(&memory, map_size(p));
    float *dweight = p->dweight + unit * p->kh * (p->depthwise ? p->kw * p->c_pad : inputs * p->o_pad);
    memset(window.memory, 0, p->kh * window.size * sizeof(float));
    if (p->scale) repeat(p->scale, p->c, p->w, scale), repeat(p->shift, p->c, p->w, shift);
    if (p->dsum) repeat(p->dsum, p->o, p->w_out, dsum), repeat(p->dsquare, p->o, p->w_out, dsquare);
    memset(dscale, 0, n_in * sizeof(float));
    memset(dshift, 0, n_in * sizeof(float));
    memset(dbias, 0, n * sizeof(float));
    memset(g, 0, p->w_out * p->o_pad * sizeof(float));
    memset(map, 0, map_size(p) * sizeof(float));
    for (int64_t b = b0; b < b0 + clips; b++) {
        if (!p->depthwise && p->dx) memset(map, 0, map_size(p) * sizeof(float));
        for (int64_t r = 0; r < p->h_out; r++) {
            int64_t at = (b * p->h_out + r) * n;
            move(p, &window, p->x + b * p->x_b, r, scale, shift);
            const float *const *rows = (const float *const *)window.rows;
            float *here = p->depthwise ? map + ((r + p->kh / 2) * (p->w + p->kw - 1) + p->kw / 2) * p->c
                                       : p->o == p->o_pad ? g : flat;
            output_gradient(p, at, dsum, dsquare, here);
            if (p->dbias) EACH(n) dbias[i_] += here[i_];
            if (p->depthwise) {
                outer_taps(rows, p->kh, p->kw, here, p->c, p->c_pad, p->w_out, dweight);
                continue;
            }
            if (here == flat)
                for (int64_t i = 0; i < p->w_out; i++)
                    memcpy(g + i * p->o_pad, flat + i * p->o, p->o * sizeof(float));
            for (int64_t i = 0; i < p->kh; i++) {
                outer(rows[i], inputs, step, g, p->o_pad, p->w_out, dweight + i * inputs * p->o_pad);
                const float *from = g;
                if (p->dx)
                    product(&from, 1, p->o, p->o_pad, p->turned + i * p->o * p->c_pad, p->c_pad, 0,
                            map + (r * p->sh + i) * across, step, inputs, p->w_out, 1);
            }
        }
        for (int64_t r = 0; r < p->h && p->dx; r++) {
            const float *from = map + (r + p->ph) * across + p->pw * p->c, *rows[MAX_ROWS];
            if (p->depthwise) {
                for (int64_t i = 0; i < p->kh; i++) rows[i] = map + (r + i) * (p->w + p->kw - 1) * p->c;
                taps(rows, p->kh, p->kw, p->turned, p->c_pad, 0, row, p->c, p->w);
                from = row;
            }
            input_gradient(p, b, r, from, scale, shift, dscale, dshift);
        }
    }
    if (p->dbias) fold(dbias, p->o, p->w_out, p->dbias + unit * p->o);
    if (p->daffine) {
        fold(dscale, p->c, p->w, p->daffine + unit * 2 * p->c);
        fold(dshift, p->c, p->w, p->daffine + (unit * 2 + 1) * p->c);
    }
}

/* 0, or 1 where there is no memory */
int aum_grid(const Grid *p, int backward) {
    int64_t rows = 6 * (p->w * p->c + 2 * VL) + 5 * (p->w_out * p->o_pad + 2 * VL);
    int64_t floats = p->kh * ((p->w + 2 * p->pw) * p->c + 3 * VL) + rows + (backward ? map_size(p) + 2 * VL : 0);
    return each_unit(p, p->pieces, p->threads, floats, backward ? backward_unit : forward_unit);
}

/* ---- the sum at a residual's end -------------------------------------------------------------------------------- */

typedef struct {
    int64_t n, c, relu, pieces, threads;                     /* n: pixels; relu: of the first, before the sum */
    const float *x, *x_scale, *x_shift, *y, *scale, *shift;  /* (n, c); (c,) or null */
    float *out;                                              /* ReLU of both: (n, c) */
    const float *dout;
    float *dx, *dy, *dx_affine, *dy_affine;                  /* (n, c); (pieces, 2, c) */
} Sum;

#define PIXELS 16 /* at a time */

static void sum_unit(const Sum *p, int64_t unit, float *memory, int backward) {
    int64_t first, count = piece(p->n, p->pieces, unit, &first), n = PIXELS * p->c;
    float *x_scale = take(&memory, n), *x_shift = take(&memory, n), *scale = take(&memory, n), *shift = take(&memory, n);
    const float least = p->relu ? 0 : -INFINITY;
    float *sums[4];
    for (int k = 0; k < 4; k++) memset(sums[k] = take(&memory, n), 0, n * sizeof(float));
    if (p->x_scale) repeat(p->x_scale, p->c, PIXELS, x_scale), repeat(p->x_shift, p->c, PIXELS, x_shift);
    else for (int64_t i = 0; i < n; i++) x_scale[i] = 1, x_shift[i] = 0;
    repeat(p->scale, p->c, PIXELS, scale), repeat(p->shift, p->c, PIXELS, shift);
    for (int64_t at = first * p->c; at < (first + count) * p->c; at += n) {
        int64_t here = min64(n, (first + count) * p->c - at);
        const float *restrict x = p->x + at, *restrict y = p->y + at;
        if (!backward) {
            float *restrict out = p->out + at;
            EACH(here) {
                float t = x[i_] * x_scale[i_] + x_shift[i_];
                t = t < least ? least : t;
                t += y[i_] * scale[i_] + shift[i_];
                out[i_] = t < 0 ? 0 : t;
            }
            continue;
        }
        const float *restrict out = p->out + at, *restrict dout = p->dout + at;
        float *restrict dx = p->dx + at, *restrict dy = p->dy + at;
        float *restrict s0 = sums[0], *restrict s1 = sums[1], *restrict s2 = sums[2], *restrict s3 = sums[3];
        EACH(here) {
            float d = dout[i_], t = x[i_] * x_scale[i_] + x_shift[i_];
            d = out[i_] <= 0 ? 0 : d;
            float e = t <= least ? 0 : d;
            dx[i_] = e * x_scale[i_];
            dy[i_] = d * scale[i_];
            s0[i_] += e * x[i_];
            s1[i_] += e;
            s2[i_] += d * y[i_];
            s3[i_] += d;
        }
    }
    for (int k = 0; k < 4 && backward; k++)
        fold(sums[k], p->c, PIXELS, (k < 2 ? p->dx_affine : p->dy_affine) + (unit * 2 + k % 2) * p->c);
}

static void sum_forward(const void *p, int64_t unit, float *memory) { sum_unit(p, unit, memory, 0); }

static void sum_backward(const void *p, int64_t unit, float *memory) { sum_unit(p, unit, memory, 1); }

/* 0, or 1 where there is no memory */
int aum_sum(const Sum *p, int backward) {
    int64_t floats = 8 * (PIXELS * p->c + 2 * VL);
    return each_unit(p, p->pieces, p->threads, floats, backward ? sum_backward : sum_forward);
}
