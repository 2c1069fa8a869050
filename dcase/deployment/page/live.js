"use strict";
const get = (id) => document.getElementById(id);
const text = (id) => get(id).textContent;
const model = JSON.parse(text("model"));
const rows = [...document.querySelectorAll("#scenes tbody tr")];
const seconds = (samples) => `${(samples / model.rate).toFixed(samples % model.rate ? 2 : 0)} s`;
const percent = (share) => `${(100 * share).toFixed(1)} %`;
const source = (id) => URL.createObjectURL(new Blob([text(id)], { type: "text/javascript" }));

const heard = []; // windows: { end, sound, fresh, logits, device, milliseconds, picture, probabilities, averaged, mean }
let attempt = 0; // counts what the user asks for
let session = 0; // counts what is heard
let chosen = -1; // in `heard`
let isFollowing = true;
let recording = null; // the microphone: { context, stream }
let held, filled, taken; // its last samples, how many they are, and how many there were
let playing = null; // { context, timer }

let doing = "Ready."; // the status that stays where an attempt fails
function say(status) {
  get("status").textContent = status;
}
function now(status) {
  say(doing = status);
}
function warn(what) {
  get("trouble").hidden = !what;
  get("trouble").textContent = what;
}
function fail(what) {
  say(doing);
  warn(what);
}

// ---- the model, in a worker ----

const worker = new Worker(source("worker"));
worker.onerror = (event) => actions.failed({ reason: event.message });
worker.onmessage = ({ data }) => actions[data.kind](data);
const actions = {
  ready({ difference, milliseconds }) {
    if (!(difference <= model.tolerance)) // NaN, too
      return unusable(`This browser calculates other logits than the trained model (by up to ` +
        `${difference}, ${model.tolerance} is allowed): try another browser, and report this one.`);
    const each = milliseconds * model.rate / model.step;
    get("check").textContent = `In this browser the WebAssembly differs by ${difference.toExponential(1)} on a clip ` +
      `to check with, and takes ${each.toFixed(1)} ms for each second of sound.`;
    now("Ready.");
    for (const id of ["microphone", "open"]) get(id).disabled = false;
  },
  hear(data) {
    if (data.session !== session) return;
    if (data.logits) add(data);
    else warn(`At ${seconds(data.end)} a sample is not finite, or far beyond full scale: that part is left out.`);
    if (data.next) data.next === "end" ? now(`Heard all of it, ${seconds(data.end)}.`) : hearFile(data.end);
  },
  failed({ reason }) {
    unusable(`The model fails in this browser: ${reason}`);
  },
};

function unusable(reason) {
  now("The model cannot be used.");
  warn(reason);
}

async function load() {
  const zipped = Uint8Array.from(atob(text("wasm").trim()), (c) => c.charCodeAt(0));
  const unzipped = new Blob([zipped]).stream().pipeThrough(new DecompressionStream("gzip"));
  const planes = new Uint8Array(await new Response(unzipped).arrayBuffer());
  const bytes = Uint8Array.from({ length: model.bytes }, (_, i) => planes[i % 4 * planes.length / 4 + (i >> 2)]);
  worker.postMessage({ kind: "load", model, bytes }, [bytes.buffer]);
}
load().catch((error) => actions.failed({ reason: String(error) }));

function begin() {
  stopMicrophone();
  stopPlaying();
  heard.length = 0;
  [chosen, isFollowing, announced] = [-1, true, ""];
  held = new Float32Array(model.samples);
  [filled, taken] = [0, 0];
  session++;
  show();
}

function softmax(logits) {
  const powers = Array.from(logits, (x) => Math.exp(x - Math.max(...logits)));
  return powers.map((x) => x / powers.reduce((a, b) => a + b));
}

const best = (shares) => shares.indexOf(Math.max(...shares));

let announced; // the scene that was read out
function add({ end, sound, logits, logMel, frames, milliseconds, device }) {
  const before = heard.length ? heard[heard.length - 1].end : 0;
  const one = { end, sound: sound.slice(-model.step), fresh: Math.min(model.step, end - before), logits, device, milliseconds };
  one.probabilities = softmax(logits);
  one.picture = picture(logMel, frames);
  heard.push(one);
  const last = heard.slice(-Math.max(1, Math.round(model.average * model.rate / model.step)));
  one.averaged = last.length;
  one.mean = one.probabilities.map((_, i) => last.reduce((sum, each) => sum + each.probabilities[i], 0) / last.length);
  const old = heard[heard.length - 1 - Math.floor(model.kept * model.rate / model.step)];
  if (old) old.sound = old.picture = null;
  if (isFollowing) chosen = heard.length - 1;
  const scene = model.scenes[best(one.mean)];
  if (recording && scene !== announced) now(`Listening. Scene: ${scene}.`); // read out only where it changes
  announced = scene;
  schedule();
}

// ---- sound ----

// Why no sound comes from a microphone, by the name of the browser's error.
const REASONS = {
  NotAllowedError: "The browser does not let this page use the microphone: allow it beside the page's address, or open " +
    "a sound file.",
  NotFoundError: "No microphone was found: connect one, or open a sound file.",
  NotReadableError: "The microphone gives no sound: another program may be using it.",
};

async function startMicrophone() {
  const mine = ++attempt;
  if (!navigator.mediaDevices)
    return fail("This browser gives pages at such an address no microphone: open a sound file, or serve the page " +
      "from https or localhost.");
  say("Asking for the microphone ...");
  warn("");
  let stream, context;
  try {
    const plain = { echoCancellation: false, noiseSuppression: false, autoGainControl: false, channelCount: 1 };
    stream = await navigator.mediaDevices.getUserMedia({ audio: plain });
  } catch (error) {
    if (mine !== attempt) return;
    return fail(REASONS[error.name] || `There is no sound from the microphone: ${error.message}`);
  }
  try {
    context = new AudioContext({ sampleRate: model.rate });
    if (context.sampleRate !== model.rate) throw new DOMException("", "NotSupportedError");
    await context.audioWorklet.addModule(`data:text/javascript,${encodeURIComponent(text("worklet"))}`);
    const node = new AudioWorkletNode(context, "pieces", { channelCount: 1, channelCountMode: "explicit" });
    const microphone = context.createMediaStreamSource(stream);
    await context.resume();
    if (mine !== attempt) throw new DOMException("something else was begun", "AbortError");
    begin();
    node.port.onmessage = ({ data }) => recording?.stream === stream && take(data);
    microphone.connect(node).connect(context.destination); // which hears silence
  } catch (error) {
    for (const track of stream.getTracks()) track.stop();
    if (context) context.close();
    if (mine !== attempt) return;
    return fail(error.name === "NotSupportedError"
      ? `This browser does not record at ${model.rate} Hz, the model's rate: try a Chromium browser, set the microphone ` +
        `to ${model.rate} Hz, or open a sound file.`
      : `This browser cannot record: ${error.message}`);
  }
  recording = { context, stream };
  stream.getTracks()[0].onended = () => {
    stopMicrophone();
    now("Stopped.");
    warn("The microphone was taken away.");
  };
  get("microphone").textContent = "Stop microphone";
  now("Listening.");
}

function stopMicrophone() {
  if (!recording) return;
  for (const track of recording.stream.getTracks()) track.stop();
  recording.context.close();
  recording = null;
  get("microphone").textContent = "Start microphone";
}

async function openFile(file) {
  const mine = ++attempt;
  say(`Reading ${file.name} ...`);
  warn("");
  let sound;
  try {
    const decoder = new OfflineAudioContext(1, 1, model.rate); // it resamples what it decodes
    sound = await decoder.decodeAudioData(await file.arrayBuffer());
  } catch (error) {
    if (mine !== attempt) return;
    return fail(error.name === "NotSupportedError"
      ? `This browser does not resample to ${model.rate} Hz, the model's rate: try another one.`
      : `${file.name} is no sound that this browser reads: try WAV, FLAC, OGG or MP3.`);
  }
  if (mine !== attempt) return;
  if (sound.length < model.samples)
    return fail(`${file.name} is too short: it has ${(sound.length / model.rate).toFixed(2)} s, and the model ` +
      `needs ${(model.samples / model.rate).toFixed(2)} s.`);
  const mono = sound.getChannelData(0).slice();
  for (let c = 1; c < sound.numberOfChannels; c++) sound.getChannelData(c).forEach((x, i) => { mono[i] += x; });
  if (sound.numberOfChannels > 1) mono.forEach((x, i) => { mono[i] = x / sound.numberOfChannels; });
  begin();
  now(`Hearing ${file.name}, ${sound.duration.toFixed(1)} s ...`);
  held = mono;
  hearFile(model.samples - model.step);
}

function hear(sound, end, next) {
  const device = get("device") ? +get("device").value : 0;
  worker.postMessage({ kind: "hear", session, sound, end, next, device });
}

// Hear the window behind the one that ended at ``before``; the last one ends with the recording, as those of
// `python -m dcase.predict` do.
function hearFile(before) {
  const end = Math.min(before + model.step, held.length);
  hear(held.slice(end - model.samples, end), end, end < held.length ? "more" : "end");
}

// Take samples of the microphone, and hear each window that they fill.
function take(sound) {
  while (recording && sound.length) {
    const part = sound.subarray(0, model.samples - filled);
    held.set(part, filled);
    [filled, taken, sound] = [filled + part.length, taken + part.length, sound.subarray(part.length)];
    if (filled < model.samples) return;
    hear(held, taken);
    held.copyWithin(0, model.step);
    filled -= model.step;
  }
}

function stopPlaying() {
  if (!playing) return;
  const { context, timer } = playing;
  playing = null;
  clearInterval(timer);
  context.close();
  show();
}

// Play windows from the chosen one on, as far as their sound is kept.
function play() {
  const start = chosen;
  const parts = heard.slice(start).map((one, i) => one.sound.subarray(i ? one.sound.length - one.fresh : 0));
  const ends = parts.map(((sum) => (part) => sum += part.length)(0));
  const context = new AudioContext();
  const buffer = context.createBuffer(1, ends[ends.length - 1], model.rate);
  parts.forEach((part, i) => buffer.copyToChannel(part, 0, ends[i] - part.length));
  const node = new AudioBufferSourceNode(context, { buffer });
  node.connect(context.destination);
  node.onended = stopPlaying;
  node.start();
  const begun = context.currentTime;
  const timer = setInterval(() => {
    const at = (context.currentTime - begun) * model.rate;
    const index = ends.findIndex((end) => at < end);
    choose(start + (index < 0 ? ends.length - 1 : index));
  }, 100);
  isFollowing = false;
  playing = { context, timer };
  show();
}

// ---- what is shown ----

// Red, green and blue from dark blue through violet and orange to light yellow, lighter at every step.
const RAMP = [[8, 8, 32], [70, 20, 105], [160, 45, 110], [225, 95, 65], [250, 175, 60], [252, 250, 190], [252, 250, 190]];
const COLOURS = Uint32Array.from({ length: 256 }, (_, i) => {
  const k = Math.floor(i / 51), [r, g, b] = RAMP[k].map((low, c) => low + (RAMP[k + 1][c] - low) * (i / 51 - k));
  return 255 << 24 | b << 16 | g << 8 | r;
});

function picture(logMel, frames) {
  const canvas = new OffscreenCanvas(frames, model.n_mels);
  const image = new ImageData(frames, model.n_mels);
  const pixels = new Uint32Array(image.data.buffer);
  logMel.forEach((x, i) => { pixels[(model.n_mels - 1 - Math.floor(i / frames)) * frames + i % frames] = COLOURS[x]; });
  canvas.getContext("2d").putImageData(image, 0, 0);
  return canvas;
}

let isScheduled = false;
function schedule() {
  if (!isScheduled) requestAnimationFrame(() => { isScheduled = false; show(); });
  isScheduled = true;
}

function choose(index) {
  chosen = Math.max(0, Math.min(heard.length - 1, index));
  schedule();
}

function show() {
  const one = heard[chosen];
  get("when").textContent = one ? `At ${seconds(one.end)}` : "Nothing heard yet";
  get("scene").textContent = one ? model.scenes[best(one.probabilities)] : "-";
  get("share").textContent = one ? percent(Math.max(...one.probabilities)) : "";
  if (one)
    get("average").textContent = `Mean of ${seconds(one.averaged * model.step)}: ${model.scenes[best(one.mean)]} ` +
      percent(Math.max(...one.mean));
  rows.forEach((row, i) => {
    const [fill, mark] = row.querySelectorAll(".bar > *");
    fill.style.width = `${one ? 100 * one.probabilities[i] : 0}%`;
    mark.hidden = !one;
    if (one) mark.style.left = `${100 * one.mean[i]}%`;
    row.cells[2].textContent = one ? percent(one.probabilities[i]) : "-";
    row.cells[3].textContent = one ? percent(one.mean[i]) : "-";
    row.classList.toggle("strong", Boolean(one) && i === best(one.probabilities));
  });
  const slider = get("chosen");
  slider.disabled = get("follow").disabled = !one;
  slider.max = Math.max(0, heard.length - 1);
  slider.value = Math.max(0, chosen);
  slider.setAttribute("aria-valuetext", one ? `${seconds(one.end)}: ${text("scene")} ${text("share")}` : "none");
  get("follow").setAttribute("aria-pressed", isFollowing);
  get("play").disabled = !(one && one.sound) && !playing;
  get("play").textContent = playing ? "Stop playing" : "Play from here";
  draw();
}

let first = 0, shown = 1, width = 1; // of the windows that are drawn
function prepared(canvas) {
  const box = canvas.getBoundingClientRect(), scale = devicePixelRatio;
  canvas.width = Math.round(box.width * scale);
  canvas.height = Math.round(box.height * scale);
  const context = canvas.getContext("2d");
  context.scale(scale, scale);
  return [context, box.width, box.height];
}

function draw() {
  const style = getComputedStyle(document.documentElement);
  const [ink, soft, line, accent] = ["ink", "soft", "line", "accent"].map((name) => style.getPropertyValue(`--${name}`));
  const [sound, across, high] = prepared(get("log-mel"));
  const [roll, , tall] = prepared(get("roll"));
  shown = Math.max(1, Math.floor(across / (across < 400 ? 16 : 28)));
  width = across / shown;
  // The chosen one stays in view, and the newest is at the right edge while it is chosen.
  first = Math.min(first, Math.max(0, heard.length - 1), Math.max(0, chosen));
  first = Math.max(first, chosen - shown + 1);
  if (isFollowing) first = Math.max(0, heard.length - shown);
  const axis = 20, row = (tall - axis) / model.scenes.length;
  [roll.font, roll.textAlign, roll.fillStyle] = ["12px system-ui, sans-serif", "right", line];
  for (let i = 0; i <= model.scenes.length; i++) roll.fillRect(0, i * row, across, 1);
  const every = Math.ceil(56 / width);
  heard.slice(first, first + shown).forEach((one, i) => {
    const x = i * width;
    if (one.picture) sound.drawImage(one.picture, x, 0, width + .5, high);
    one.probabilities.forEach((share, k) => {
      const height = Math.max(1, (row - 3) * share), y = (k + 1) * row - height - 1;
      if (k === best(one.probabilities)) {
        roll.fillStyle = accent;
        roll.fillRect(x + 1, y, width - 2, height);
      } else if (share > .01) {
        roll.strokeStyle = soft;
        roll.strokeRect(x + 1.5, y + .5, width - 3, Math.max(.5, height - 1));
      }
    });
    if ((first + i + 1) % every === 0) {
      roll.fillStyle = soft;
      roll.fillText(seconds(one.end), x + width - 1, tall - 5);
    }
  });
  const frame = (context, colour, thick, height) => { // around the chosen one
    [context.strokeStyle, context.lineWidth] = [colour, thick];
    if (heard.length) context.strokeRect((chosen - first) * width + 1, 1, width - 2, height - 2);
  };
  frame(sound, "#000", 5, high); // the log-mel is light and dark
  frame(sound, "#fff", 2, high);
  frame(roll, ink, 2, tall - axis);
  const newest = heard.slice(-5).map((one) => model.scenes[best(one.probabilities)]);
  get("roll").setAttribute("aria-label", `Scenes over time, newest last: ${newest.join(", ") || "none yet"}`);
}

// ---- what the user does ----

get("microphone").onclick = () => {
  if (!recording) return startMicrophone();
  stopMicrophone();
  now("Stopped.");
};
get("open").onclick = () => get("file").click();
get("file").onchange = ({ target }) => {
  if (target.files.length) openFile(target.files[0]);
  target.value = ""; // so that the same file can be chosen again
};
function pick(index, follows) {
  stopPlaying();
  isFollowing = follows;
  choose(index);
}
get("chosen").oninput = ({ target }) => pick(+target.value, +target.value === heard.length - 1);
get("follow").onclick = () => pick(isFollowing ? chosen : heard.length - 1, !isFollowing);
get("play").onclick = () => (playing ? stopPlaying() : play());
get("log-mel").onclick = get("roll").onclick = ({ offsetX }) => {
  const index = first + Math.floor(offsetX / width);
  if (index < heard.length) pick(index, false);
};
addEventListener("dragover", (event) => event.preventDefault());
addEventListener("drop", (event) => {
  event.preventDefault();
  const [file] = event.dataTransfer.files;
  if (get("open").disabled) return;
  if (file) openFile(file);
  else warn("What was dropped is no file.");
});
addEventListener("resize", schedule);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", schedule);
show();
