"use strict";
// Runs the model, so that the page never waits for it.
let model, wasm;

// Noise that grows, by integers alone: dcase/deployment/page_format.py makes the same samples.
function checkClip() {
  let state = 1;
  return Float32Array.from({ length: model.samples }, (_, i) => {
    state = (Math.imul(state, 1103515245) + 12345) & 0x7fffffff;
    return ((state >> 15) - 32768) * i / (32768 * model.samples);
  });
}

// Return what a device's model makes of a window; logits are null where a sample is not finite.
function classify(samples, device) {
  const start = performance.now();
  const floats = (at, n) => new Float32Array(wasm.memory.buffer, at, n);
  floats(wasm.samples_at(), model.samples).set(samples);
  wasm.listen(device);
  // The newest frames alone, of a model whose window is longer than the step between two.
  const frames = Math.max(1, Math.round(model.frames * model.step / model.samples)), row = wasm.log_mel_row();
  const all = floats(wasm.log_mel_at(), model.n_mels * row);
  const logMel = new Uint8ClampedArray(model.n_mels * frames); // mean 0 and deviation 1 in the training data
  for (let m = 0; m < model.n_mels; m++)
    for (let t = 0; t < frames; t++) logMel[m * frames + t] = 128 + 48 * all[m * row + model.frames - frames + t];
  const logits = wasm.classify() === 1 ? floats(wasm.logits_at(), model.scenes.length).slice() : null;
  return { logits, logMel, frames, milliseconds: performance.now() - start };
}

async function load({ bytes, ...of }) {
  model = of.model;
  wasm = (await WebAssembly.instantiate(bytes)).instance.exports;
  const clip = checkClip();
  const differences = model.expected.flatMap((expected, i) => {
    const { logits } = classify(clip, i);
    return expected.map((logit, k) => Math.abs(logits[k] - logit));
  });
  const times = Array.from({ length: 5 }, () => classify(clip, 0).milliseconds).sort((a, b) => a - b);
  return { kind: "ready", difference: Math.max(...differences), milliseconds: times[2] }; // a NaN stays one
}

const actions = { load, hear: (of) => ({ ...of, ...classify(of.sound, of.device) }) };
onmessage = ({ data }) => (async () => postMessage(await actions[data.kind](data)))().catch((error) => {
  postMessage({ kind: "failed", reason: String(error) });
});
