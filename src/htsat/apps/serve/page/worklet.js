/**
 * Gathers what the microphone hears, mixed to one channel, into blocks of about 100 ms.
 *
 * Each block says at which sample of the audio clock it begins, so that the page can tell where samples were lost.
 */
class Gatherer extends AudioWorkletProcessor {
  constructor() {
    super();
    this.block = new Float32Array(Math.round(sampleRate / 10));
    this.filled = 0;
    this.start = 0;
  }

  process([channels]) {
    if (!channels.length) return true;
    const count = channels[0].length;
    // samples that were never delivered end a block early: a block is one stretch of time
    if (this.filled && this.start + this.filled !== currentFrame) this.flush();
    for (let i = 0; i < count; i++) {
      if (!this.filled) this.start = currentFrame + i;
      let sum = 0;
      for (const channel of channels) sum += channel[i];
      this.block[this.filled++] = sum / channels.length;
      if (this.filled === this.block.length) this.flush();
    }
    return true;
  }

  flush() {
    const samples = this.block.slice(0, this.filled);
    this.port.postMessage({ start: this.start, samples }, [samples.buffer]);
    this.filled = 0;
  }
}

registerProcessor("gatherer", Gatherer);
