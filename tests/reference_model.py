"""Audio Mamba written apart from the code, in numpy and float64, from the formulas of the papers: clip by clip, token
by token. It takes a state dict of published names, so what it checks is also what the names mean."""

import numpy as np


def silu(x):
    return x / (1 + np.exp(-x))


def softplus(x):
    return np.where(x > 20, x, np.log1p(np.exp(np.minimum(x, 20))))


def rms_norm(x, weight, eps):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weight


def causal_conv(x, weight, bias):
    """x (l, d), weight (d, 1, k): output t sees t-k+1 ... t, zeros before the start."""
    k = weight.shape[-1]
    out = np.empty_like(x)
    for t in range(len(x)):
        out[t] = bias
        for j in range(k):
            if t - k + 1 + j >= 0:
                out[t] = out[t] + weight[:, 0, j] * x[t - k + 1 + j]
    return out


def scan(u, dt, B, C, A, D):
    """u, dt (l, d), B, C (l, n), A (d, n), D (d,) -> (l, d)."""
    h, y = np.zeros_like(A), np.empty_like(u)
    for t in range(len(u)):
        h = np.exp(dt[t][:, None] * A) * h + dt[t][:, None] * B[t][None] * u[t][:, None]
        y[t] = h @ C[t] + D * u[t]
    return y


def projections(p, x, suffix, rank, n):
    u = silu(causal_conv(x, p[f"conv1d{suffix}.weight"], p[f"conv1d{suffix}.bias"]))
    low, B, C = np.split(u @ p[f"x_proj{suffix}.weight"].T, [rank, rank + n], axis=1)
    dt = softplus(low @ p[f"dt_proj{suffix}.weight"].T + p[f"dt_proj{suffix}.bias"])
    return u, dt, B, C


def mixer(p, x, config):
    """x (l, d_model) through one mixer with parameters p (names below ``mixer.``)."""
    d, rank = p["dt_proj.weight"].shape
    n = config.d_state
    both = x @ p["in_proj.weight"].T + p.get("in_proj.bias", 0)
    x, z = both[:, :d], both[:, d:]
    forward = projections(p, x, "", rank, n)
    y = scan(*forward, -np.exp(p["A_log"]), p["D"]) * silu(z)
    if config.direction == "fo_bi":
        y = y + scan(*(v[::-1] for v in forward), -np.exp(p["A_b_log"]), p["D"])[::-1] * silu(z)
    elif config.direction == "bi_bi":
        back = scan(*projections(p, x[::-1], "_b", rank, n), -np.exp(p["A_b_log"]), p["D_b"]) * silu(z[::-1])
        y = (y + back[::-1]) / 2
    return y @ p["out_proj.weight"].T + p.get("out_proj.bias", 0)


def tokens(state, logmel, config):
    """(n_mels, frames) -> (l, d) with the class token, and its index."""
    (pf, pt), (sf, st) = config.patch_size, config.strides or config.patch_size
    kernel, bias = state["patch_embed.proj.weight"][:, 0], state["patch_embed.proj.bias"]
    out = []
    for f in range(0, logmel.shape[0] - pf + 1, sf):
        for t in range(0, logmel.shape[1] - pt + 1, st):
            out.append((kernel * logmel[f : f + pf, t : t + pt]).sum((1, 2)) + bias)
    out = np.array(out)
    if config.cls_position == "none":
        return (out + state["pos_embed.pos_embed"][0] if config.pos_embed else out), None
    cls = state["cls_token"][0, 0]
    if config.pos_embed:
        pos = state["pos_embed.pos_embed"][0]
        cls, out = cls + pos[0], out + pos[1:]
    index = {"start": 0, "middle": len(out) // 2, "end": len(out)}[config.cls_position]
    return np.concatenate([out[:index], cls[None], out[index:]]), index


def vim_tokens(state, image, config):
    """Vim's own: (3, height, width) -> (l, d), the class token in the middle before the position embedding is added."""
    (ph, pw), kernel = config.patch_size, state["patch_embed.proj.weight"]
    out = []
    for top in range(0, image.shape[1] - ph + 1, ph):
        for left in range(0, image.shape[2] - pw + 1, pw):
            patch = image[None, :, top : top + ph, left : left + pw]
            out.append((kernel * patch).sum((1, 2, 3)) + state["patch_embed.proj.bias"])
    index = len(out) // 2
    out.insert(index, state["cls_token"][0, 0])
    return np.array(out) + state["pos_embed"][0], index


def features(state, logmel, config, tokens=tokens):
    """One clip's (n_mels, frames) log-mel -> (d,), in the published two-stream form: hidden and residual apart."""
    layers = [
        {k.removeprefix(f"layers.{i}."): v for k, v in state.items() if k.startswith(f"layers.{i}.")}
        for i in range(config.depth)
    ]

    def block(p, h, r):
        r = h if r is None else h + r
        inner = {k.removeprefix("mixer."): v for k, v in p.items() if k.startswith("mixer.")}
        return mixer(inner, rms_norm(r, p["norm.weight"], config.norm_eps), config), r

    (h, index), r = tokens(state, logmel, config), None
    if config.paired_layers:
        for even, odd in zip(layers[::2], layers[1::2], strict=True):
            hf, rf = block(even, h, r)
            hb, rb = block(odd, h[::-1], None if r is None else r[::-1])
            h, r = hf + hb[::-1], rf + rb[::-1]
    else:
        for p in layers:
            h, r = block(p, h, r)
    x = rms_norm(h + r, state["norm_f.weight"], config.norm_eps)
    return x.mean(0) if config.pool == "mean" else x[index]


def logits(state, logmel, config, tokens=tokens):
    x = features(state, logmel, config, tokens)
    if config.head == "linear":
        return x @ state["head.weight"].T + state["head.bias"]
    x = (x - x.mean()) / np.sqrt(x.var() + 1e-5) * state["classifier.0.weight"] + state["classifier.0.bias"]
    x = np.maximum(x @ state["classifier.2.weight"].T + state["classifier.2.bias"], 0)
    return x @ state["classifier.5.weight"].T + state["classifier.5.bias"]
