/**
 * A worker that holds the samples of a long recording and makes pictures of any stretch of it.
 *
 * A spectrogram of an hour has more columns than a screen has pixels: here each pixel gets a few spectra of its
 * stretch, whatever the zoom, so that it takes a tenth of a second instead of minutes.
 *
 * In:  {samples, rate}                        once; answered by {peaks, loud}
 *      {from, to, columns, bands, highest}    a stretch in seconds; answered by {from, to, columns, levels}
 */

import { hertz, mel } from "./mel.js";

const SIZE = 1024;
const PEAKS_PER_SECOND = 200;
const SPECTRA_PER_COLUMN = 3;

let samples = new Float32Array();
let rate = 1;
let wanted = null;

// --- Fourier transform -------------------------------------------------------------------------

const hann = Float64Array.from({ length: SIZE }, (_, i) => 0.5 - 0.5 * Math.cos((2 * Math.PI * i) / SIZE));
const cosines = Float64Array.from({ length: SIZE / 2 }, (_, i) => Math.cos((2 * Math.PI * i) / SIZE));
const sines = Float64Array.from({ length: SIZE / 2 }, (_, i) => Math.sin((2 * Math.PI * i) / SIZE));
const order = Uint16Array.from({ length: SIZE }, (_, i) => {
  let reversed = 0;
  for (let bit = 1; bit < SIZE; bit *= 2) reversed = 2 * reversed + (i & bit ? 1 : 0);
  return reversed;
});
const real = new Float64Array(SIZE);
const imaginary = new Float64Array(SIZE);

/** Add the power spectrum of the SIZE samples from `start` on to `power`. */
function addSpectrum(start, power) {
  for (let i = 0; i < SIZE; i++) {
    real[order[i]] = (samples[start + i] ?? 0) * hann[i];
    imaginary[i] = 0;
  }
  for (let half = 1; half < SIZE; half *= 2) {
    const stride = SIZE / (2 * half);
    for (let block = 0; block < SIZE; block += 2 * half) {
      for (let i = 0; i < half; i++) {
        const [a, b] = [block + i, block + i + half];
        const [c, s] = [cosines[i * stride], sines[i * stride]];
        const x = real[b] * c + imaginary[b] * s;
        const y = imaginary[b] * c - real[b] * s;
        real[b] = real[a] - x;
        imaginary[b] = imaginary[a] - y;
        real[a] += x;
        imaginary[a] += y;
      }
    }
  }
  for (let i = 0; i < power.length; i++) power[i] += real[i] * real[i] + imaginary[i] * imaginary[i];
}

// --- pictures ----------------------------------------------------------------------------------

function spectrogram({ from, to, columns, bands, highest }) {
  const edges = Array.from({ length: bands + 1 }, (_, i) => (hertz((i / bands) * mel(highest)) * SIZE) / rate);
  const levels = new Float32Array(columns * bands);
  const power = new Float64Array(SIZE / 2 + 1);
  const stretch = ((to - from) / columns) * rate;
  const spectra = stretch <= SIZE ? 1 : SPECTRA_PER_COLUMN;
  for (let column = 0; column < columns; column++) {
    power.fill(0);
    const start = from * rate + column * stretch;
    for (let k = 0; k < spectra; k++) {
      addSpectrum(Math.max(0, Math.round(start + ((k + 0.5) / spectra) * stretch - SIZE / 2)), power);
    }
    for (let band = 0; band < bands; band++) {
      const first = Math.round(edges[band]);
      const last = Math.max(first + 1, Math.round(edges[band + 1]));
      let most = 0;
      for (let bin = first; bin < last && bin < power.length; bin++) if (power[bin] > most) most = power[bin];
      // relative to a full-scale sine
      levels[column * bands + band] = 10 * Math.log10(most / spectra / (SIZE / 4) ** 2 + 1e-12);
    }
  }
  return levels;
}

function load(message) {
  ({ samples, rate } = message);
  const step = Math.max(1, Math.round(rate / PEAKS_PER_SECOND));
  const peaks = new Float32Array(Math.ceil(samples.length / step));
  for (let i = 0; i < samples.length; i++) {
    const value = Math.abs(samples[i]);
    const at = Math.floor(i / step);
    if (value > peaks[at]) peaks[at] = value;
  }
  postMessage({ peaks }, [peaks.buffer]);
}

onmessage = ({ data }) => {
  if (data.samples) return load(data);
  // only the newest wish counts: while one picture is made, several may have come
  const idle = wanted === null;
  wanted = data;
  if (!idle) return;
  setTimeout(() => {
    const wish = wanted;
    wanted = null;
    const levels = spectrogram(wish);
    postMessage({ ...wish, levels }, [levels.buffer]);
  });
};
