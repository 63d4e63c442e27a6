/** The axis of the spectrograms, as wavesurfer.js has it. */
export const mel = (hz) => 2595 * Math.log10(1 + hz / 700);
export const hertz = (m) => 700 * (10 ** (m / 2595) - 1);
