"use strict";
// Runs the model, so that the page never waits for it.
let model, wasm;
let device = 0;
let session = 0; // of sound; what is left of earlier ones is dropped
let held, filled, end; // the last samples of a stream, how many, and where they end

// Noise that grows, by integers alone: dcase/deployment/page_format.py makes the same samples.
function checkClip() {
  const clip = new Float32Array(model.samples);
  let state = 1;
  for (let i = 0; i < clip.length; i++) {
    state = (Math.imul(state, 1103515245) + 12345) & 0x7fffffff;
    clip[i] = ((state >> 15) - 32768) * i / (32768 * clip.length);
  }
  return clip;
}

// Return what the model makes of a window.
function classify(samples, which) {
  const start = performance.now();
  const { buffer } = wasm.memory;
  new Float32Array(buffer, wasm.samples_at(), model.samples).set(samples);
  wasm.listen(which);
  // The newest frames alone, of a model whose window is longer than the step between two.
  const frames = Math.max(1, Math.round(model.frames * model.step / model.samples));
  const row = wasm.log_mel_row();
  const all = new Float32Array(buffer, wasm.log_mel_at(), model.n_mels * row);
  const logMel = new Uint8ClampedArray(model.n_mels * frames); // mean 0 and deviation 1 in the training data
  for (let m = 0; m < model.n_mels; m++)
    for (let t = 0; t < frames; t++)
      logMel[m * frames + t] = 128 + 48 * all[m * row + model.frames - frames + t];
  const isTaken = wasm.classify() === 1;
  const logits = isTaken ? new Float32Array(buffer, wasm.logits_at(), model.scenes.length).slice() : null;
  return { logits, logMel, frames, milliseconds: performance.now() - start };
}

function tell(samples, end) {
  const step = Math.min(model.step, end);
  const found = classify(samples, device);
  postMessage({ kind: "window", session, end, sound: samples.slice(samples.length - step), device, ...found });
}

async function load({ bytes, ...of }) {
  model = of.model;
  wasm = (await WebAssembly.instantiate(bytes)).instance.exports;
  const clip = checkClip();
  let difference = 0;
  model.expected.forEach((expected, i) => {
    const { logits } = classify(clip, i);
    // NaN is kept by Math.max.
    expected.forEach((logit, k) => { difference = Math.max(difference, Math.abs(logits[k] - logit)); });
  });
  const times = Array.from({ length: 5 }, () => classify(clip, 0).milliseconds).sort((a, b) => a - b);
  postMessage({ kind: "ready", difference, milliseconds: times[2] });
}

function begin(message) {
  session = message.session;
  held = new Float32Array(model.samples);
  filled = end = 0;
}

function stream({ sound, session: of }) {
  for (let i = 0; of === session && i < sound.length;) {
    const part = sound.subarray(i, i + model.samples - filled);
    held.set(part, filled);
    filled += part.length;
    end += part.length;
    i += part.length;
    if (filled < model.samples) return;
    tell(held, end);
    held.copyWithin(0, model.step);
    filled -= model.step;
  }
}

// A whole recording: the last window ends with it, as those of `python -m dcase.predict` do.
async function whole({ sound, session: of }) {
  const last = sound.length - model.samples;
  for (let start = 0; of === session; start = Math.min(start + model.step, last)) {
    tell(sound.subarray(start, start + model.samples), start + model.samples);
    if (start === last) break;
    await new Promise((go) => setTimeout(go)); // for messages that come meanwhile
  }
  postMessage({ kind: "end", session: of });
}

const actions = { load, begin, stream, whole, device(message) { device = message.device; } };
onmessage = ({ data }) => Promise.resolve(actions[data.kind](data)).catch((error) => {
  postMessage({ kind: "failed", reason: String(error) });
});
