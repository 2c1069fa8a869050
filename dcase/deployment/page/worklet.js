"use strict";
// Runs beside the browser's audio thread: hands on the microphone's sound in pieces.
registerProcessor("pieces", class extends AudioWorkletProcessor {
  piece = new Float32Array(2048);
  filled = 0;

  process([[channel]]) {
    for (let i = 0; channel && i < channel.length; i++) {
      this.piece[this.filled++] = channel[i];
      if (this.filled < this.piece.length) continue;
      this.port.postMessage(this.piece, [this.piece.buffer]);
      this.piece = new Float32Array(2048);
      this.filled = 0;
    }
    return true;
  }
});
